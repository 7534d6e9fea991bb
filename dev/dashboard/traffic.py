#!/usr/bin/env python3
"""Traffic for looking at the dashboard: two workers and a bridge, tenants with and without troubles, and a Prometheus.

    eval "$(dev/servers up)" && cargo build --release
    pip install aiosmtpd pika requests
    python3 dev/dashboard/traffic.py --minutes 15 [--binary target/release/postroom] [--prometheus prometheus]

Everything listens on the loopback interface, in a vhost and a database of its own, which are dropped at the end. While
it runs, and for --linger minutes after, Prometheus answers at the address printed first: point Grafana at it, or let
dev/dashboard/render.py draw the dashboard.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, urlsplit

import pika
import requests
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP

TOP = Path(__file__).resolve().parents[2]
# Tenant: share of the jobs, limit of its account, share of webhooks that fail.
TENANTS = {
    "acme": (0.30, "60/1m", 0.00),
    "blue": (0.35, "2000/1m", 0.10),
    "corp": (0.25, None, 0.00),
    "dusk": (0.10, None, 0.50),
}
LEVELS = {"immediate": 0.05, "high": 0.25, "medium": 0.4, "low": 0.3}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Mailbox:
    """A server with moods: some recipients are unknown, some are deferred, everything takes its time."""

    async def handle_RCPT(self, _server, _session, envelope, address, _options):
        mood = random.random()
        if mood < 0.02:
            return "550 5.1.1 No such user here"
        if mood < 0.05:
            return "451 4.7.1 Greylisted, please try again"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server, _session, _envelope):
        await asyncio.sleep(random.lognormvariate(-3.2, 0.8))
        return "250 2.0.0 Queued" if random.random() > 0.01 else "452 4.3.1 Too busy"


class Hook(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        time.sleep(random.lognormvariate(-3.5, 0.7))
        tenant = self.path.rsplit("/", 1)[-1]
        self.send_response(503 if random.random() < TENANTS[tenant][2] else 204)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


class World:
    def __init__(self, binary: str, folder: Path):
        self.binary, self.folder, self.children = binary, folder, []
        self.name = "dashboard_" + secrets.token_hex(4)
        self.management = os.environ["POSTROOM_TEST_AMQP_MANAGEMENT_URL"]
        amqp = urlsplit(os.environ["POSTROOM_TEST_AMQP_URL"])
        database = urlsplit(os.environ["POSTROOM_TEST_DATABASE_URL"])
        self.amqp_url = f"amqp://{amqp.netloc}/{self.name}"
        self.server_url = database.geturl()
        self.smtp_port, self.hook_port = free_port(), free_port()
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("POSTROOM_")},
            "POSTROOM_AMQP_URL": self.amqp_url,
            "POSTROOM_DATABASE_URL": database._replace(path="/" + self.name).geturl(),
            "POSTROOM_EGRESS_ALLOW": "127.0.0.0/8",
            "POSTROOM_RETRY_BASE": "5s",
            "POSTROOM_LOG": "warn",
            "POSTROOM_CONCURRENCY": "16",
        }

    def postroom(self, *arguments: str) -> str:
        done = subprocess.run([self.binary, *arguments], env=self.env, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def start(self, name: str, command: list[str], **env: str) -> None:
        log = open(self.folder / f"{name}.log", "ab")
        self.children.append(subprocess.Popen(command, env={**self.env, **env}, stdout=log, stderr=log))

    def __enter__(self):
        requests.put(f"{self.management}/api/vhosts/{self.name}", timeout=10).raise_for_status()
        user = quote(urlsplit(self.amqp_url).username or "guest")
        allow = {"configure": ".*", "write": ".*", "read": ".*"}
        url = f"{self.management}/api/permissions/{self.name}/{user}"
        requests.put(url, json=allow, timeout=10).raise_for_status()
        subprocess.run(["psql", "-qc", f"CREATE DATABASE {self.name}", self.server_url], check=True)
        self.env["POSTROOM_ENCRYPTION_KEYS"] = self.postroom("key", "generate")
        self.postroom("migrate")
        self.postroom("topology", "apply")
        for tenant, (_, limit, _) in TENANTS.items():
            self.postroom("tenant", "set", tenant)
            limits = ["--limit", limit] if limit else []
            self.postroom("account", "set", tenant, "main", "--host", "127.0.0.1", "--port", str(self.smtp_port),
                          "--tls", "none", "--from", f"post@{tenant}.example", *limits)
            hook = f"http://127.0.0.1:{self.hook_port}/{tenant}"
            self.postroom("endpoint", "set", tenant, "--url", hook, "--generate-secret")
        return self

    def __exit__(self, *_):
        for child in reversed(self.children):
            child.send_signal(signal.SIGTERM)
        for child in self.children:
            try:
                child.wait(70)
            except subprocess.TimeoutExpired:
                child.kill()
        requests.delete(f"{self.management}/api/vhosts/{self.name}", timeout=10)
        subprocess.run(["psql", "-qc", f"DROP DATABASE {self.name} WITH (FORCE)", self.server_url])


def publish(world: World, until: float) -> None:
    """Waves of jobs; now and then a burst of the kind a newsletter makes, and a message that is no job."""
    connection = pika.BlockingConnection(pika.URLParameters(world.amqp_url))
    channel, number, begun = connection.channel(), 0, time.time()
    tenants, shares = list(TENANTS), [share for share, *_ in TENANTS.values()]
    while time.time() < until:
        at = time.time() - begun
        rate = 8 + 5 * math.sin(at / 60) + (25 if at % 300 < 20 else 0)
        for _ in range(max(1, round(rate / 2))):
            tenant = random.choices(tenants, shares)[0]
            level = random.choices(list(LEVELS), list(LEVELS.values()))[0]
            job = {"id": f"job-{number}", "tenant": tenant, "to": f"person{number}@example.org",
                   "subject": "Your order", "text": "Thank you. " * 40}
            number += 1
            properties = pika.BasicProperties(content_type="application/json", delivery_mode=2,
                                              timestamp=int(time.time()))
            body = b"no job" if random.random() < 0.001 else json.dumps(job).encode()
            channel.basic_publish("mail.jobs", f"{level}.{tenant}", body, properties)
        connection.sleep(0.5)
    connection.close()


def smtp(port: int) -> Controller:
    class Quiet(Controller):
        def factory(self):
            return SMTP(self.handler, hostname="mail.example", enable_SMTPUTF8=True)

    return Quiet(Mailbox(), hostname="127.0.0.1", port=port)


def prometheus(world: World, program: str, targets: dict[str, list[int]]) -> int:
    port = free_port()
    jobs = [{"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{p}" for p in ports],
                                                    "labels": {"namespace": "mail"}}]}
            for job, ports in targets.items()]
    config = {"global": {"scrape_interval": "5s", "evaluation_interval": "5s"}, "scrape_configs": jobs,
              "rule_files": [str(TOP / "helm/postroom/files/alerts.yaml")]}
    path = world.folder / "prometheus.yml"
    path.write_text(json.dumps(config))  # JSON is YAML
    world.start("prometheus", [program, f"--config.file={path}", f"--storage.tsdb.path={world.folder / 'tsdb'}",
                               f"--web.listen-address=127.0.0.1:{port}"])
    return port


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--linger", type=float, default=0)
    parser.add_argument("--binary", default=str(TOP / "target/release/postroom"))
    parser.add_argument("--prometheus", default="prometheus")
    options = parser.parse_args()
    # An end by SIGTERM cleans up, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="postroom-dashboard-"))
    with World(options.binary, folder) as world:
        workers, bridge = [free_port(), free_port()], free_port()
        address = prometheus(world, options.prometheus, {"postroom-worker": workers, "postroom-bridge": [bridge]})
        print(f"http://127.0.0.1:{address}  (logs: {folder})", flush=True)
        hooks = ThreadingHTTPServer(("127.0.0.1", world.hook_port), Hook)
        threading.Thread(target=hooks.serve_forever, daemon=True).start()
        mail = smtp(world.smtp_port)
        mail.start()
        for port in workers:
            world.start("worker", [options.binary, "worker"], POSTROOM_HTTP_ADDR=f"127.0.0.1:{port}")
        world.start("bridge", [options.binary, "bridge"], POSTROOM_HTTP_ADDR=f"127.0.0.1:{bridge}")
        end = time.time() + options.minutes * 60
        publisher = threading.Thread(target=publish, args=(world, end))
        publisher.start()
        # A trouble to see: the mail server is away for a minute, in the second half.
        time.sleep(max(0, options.minutes * 60 * 0.6))
        mail.stop()
        time.sleep(min(60, options.minutes * 6))
        mail = smtp(world.smtp_port)
        mail.start()
        publisher.join()
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(options.linger * 60)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
