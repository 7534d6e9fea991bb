"""kombu, as Celery users have it: COMPRESSION names one of kombu's compressions, or nothing."""

import os

from kombu import Connection, Exchange, Producer

from job import DECLARES, EXCHANGE, URL, job, names

# Without `declare`, kombu would still declare an Exchange object it publishes to; a name it leaves alone.
exchange = Exchange(EXCHANGE, type="topic", durable=True) if DECLARES else EXCHANGE
compression = os.environ.get("COMPRESSION") or None
with Connection(URL, transport_options={"confirm_publish": True}) as connection:
    producer = Producer(connection.channel(), serializer="json")
    for name in names():
        producer.publish(
            job(name),
            exchange=exchange,
            routing_key="low.acme",
            declare=[exchange] if DECLARES else [],
            compression=compression,
            delivery_mode=2,
            mandatory=True,
        )
