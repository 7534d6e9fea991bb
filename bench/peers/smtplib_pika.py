"""smtplib and pika: consume, send, publish a report, acknowledge once it is confirmed. One of several processes."""

import json
import os
import smtplib
import threading
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import make_msgid

import pika


def work() -> None:
    """One connection to the broker and one to the sink: neither library is for sharing."""
    smtp = smtplib.SMTP("127.0.0.1", int(os.environ["BENCH_PORT"]))
    broker = pika.BlockingConnection(pika.URLParameters(os.environ["BENCH_AMQP"]))
    channel = broker.channel()
    channel.confirm_delivery()
    channel.basic_qos(prefetch_count=64)
    properties = pika.BasicProperties(delivery_mode=2, content_type="application/json")
    for method, _, body in channel.consume("mail.jobs.medium"):
        job = json.loads(body)
        message = EmailMessage()
        message["From"], message["To"], message["Subject"] = "shop@example.com", job["to"], job["subject"]
        message["Message-ID"] = make_msgid(domain="example.com")
        message.set_content(job["text"])
        smtp.send_message(message)
        report = {
            "type": "mail.sent", "id": f"{job['tenant']}/{job['id']}/1", "tenant": job["tenant"], "job": job["id"],
            "time": datetime.now(UTC).isoformat(), "message_id": message["Message-ID"],
            "results": [{"address": job["to"], "status": "sent", "reply": "250"}],
        }
        key = f"report.{job['tenant']}.mail.sent"
        channel.basic_publish("mail.reports", key, json.dumps(report).encode(), properties)
        channel.basic_ack(method.delivery_tag)


threads = [threading.Thread(target=work) for _ in range(int(os.environ["BENCH_CONNECTIONS"]))]
for thread in threads:
    thread.start()
