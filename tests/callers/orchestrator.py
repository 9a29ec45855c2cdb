"""An orchestrator in Python: store a model, name it, have it checked, and follow what becomes of it.

python -m tests.callers.orchestrator AMQP_URL RACK
"""

from __future__ import annotations

import asyncio
import base64
import sys

from worker.client.amqp_caller import AmqpCaller
from worker.client.client import ModelManagerClient
from worker.client.hints import hints


async def main(url: str, name: str) -> None:
    async with hints(url, name) as heard, ModelManagerClient(AmqpCaller(url, name), timeout_s=30) as rack:
        began = await rack.ping()
        data = base64.b64encode(b"the weights").decode()
        stored = await rack.store_model("acme/net", {"type": "custom"}, model_data=data, idempotency_key="deploy-42")
        await rack.set_alias("acme/net", "stable", stored["version"])
        verdict = await rack.outcome(await rack.validate_model("acme/net", "stable", wait_ms=0))
        print("valid" if verdict["isValid"] else "damaged")
        async for hint in heard:  # at once, but one may be lost
            if hint["type"] == "model-manager.alias.changed" and hint["source"] == f"/racks/{name}":
                print("heard", hint["subject"], hint["data"]["alias"])
                break
        async for change in rack.follow(began["epoch"], began["head"]):  # every one, in order
            print("followed", change["type"].rpartition("model-manager.")[2])
            if change["type"] == "model-manager.alias.changed":
                break


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
