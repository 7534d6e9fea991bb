"""aio-pika, which gives every message a random message_id."""

import asyncio
import json

import aio_pika

from job import DECLARES, EXCHANGE, URL, job, names


async def main():
    connection = await aio_pika.connect_robust(URL)
    async with connection:
        channel = await connection.channel(publisher_confirms=True)
        if DECLARES:
            exchange = await channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
        else:
            exchange = await channel.get_exchange(EXCHANGE)
        for name in names():
            message = aio_pika.Message(
                json.dumps(job(name), ensure_ascii=False).encode(),
                content_type="application/json",
                delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            )
            await exchange.publish(message, routing_key="medium.acme")


asyncio.run(main())
