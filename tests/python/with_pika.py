"""pika, blocking, with confirms; DECLARES=yes declares the exchange as pika users do."""

import json

import pika

from job import DECLARES, EXCHANGE, URL, job, names

connection = pika.BlockingConnection(pika.URLParameters(URL))
channel = connection.channel()
channel.confirm_delivery()
if DECLARES:
    channel.exchange_declare(exchange=EXCHANGE, exchange_type="topic", durable=True)
for name in names():
    channel.basic_publish(
        exchange=EXCHANGE,
        routing_key="high.acme",
        body=json.dumps(job(name)),
        properties=pika.BasicProperties(
            content_type="application/json", delivery_mode=2, correlation_id="pika/" + name
        ),
        mandatory=True,
    )
connection.close()
