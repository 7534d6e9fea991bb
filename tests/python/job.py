"""What every producer here publishes: one job, named on the command line."""

import os
import sys

URL = os.environ["AMQP_URL"]
DECLARES = os.environ.get("DECLARES") == "yes"
EXCHANGE = "mail.jobs"


def job(name):
    return {
        "id": name,
        "tenant": "acme",
        "to": ["ann@example.org"],
        "subject": "Grüße von " + name,
        "text": "Hello from Python. " * 50,
    }


def names():
    return sys.argv[1:]
