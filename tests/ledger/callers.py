"""The callers: ours, which try again with the same key until they know, and plain ones, which know nothing of keys."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
from collections.abc import Callable
from typing import Any

import aiormq
import pamqp.frame
from aiormq.abc import AbstractChannel, AbstractConnection, ChannelFrame, DeliveredMessage
from aiormq.exceptions import AMQPError
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from schemas.errors import ModelManagerError
from schemas.wire import dump, parse_object
from tests.ledger.book import Asked, Ledger, key_trace
from worker.broker_url import login_of
from worker.client.amqp_caller import RPC_EXCHANGE, AmqpCaller
from worker.client.client import ModelManagerClient

SHARED = "shared"
SHARED_VERSIONS = 40
PATIENT_S = 90.0
HURRIED_S = 1.5
PLAIN_S = 30.0
_CONNECT_S = 10.0


class OwnClient:
    """Uses the project's client, on a model of its own and on one that all of them fight for."""

    def __init__(self, name: str, url: str, rack: str, ledger: Ledger, seed: int) -> None:
        self.name = name
        self._user = login_of(url) or ""
        self._caller = AmqpCaller(url, rack)
        self._patient = ModelManagerClient(self._caller, timeout_s=PATIENT_S)
        self._hurried = ModelManagerClient(self._caller, timeout_s=HURRIED_S)
        self._ledger = ledger
        self._choose = random.Random(seed)
        self._number = 0
        self._versions: list[str] = []
        self._revisions: dict[str, int] = {}
        self._doubtful: set[str] = set()

    async def run(self, going: Callable[[], bool]) -> None:
        """One request after the other, for as long as `going`."""
        steps = [self._store, self._update, self._fight, self._alias, self._swap, self._delete, self._look, self._read]
        weights = [20, 15, 10, 5, 10, 8, 27, 5]
        try:
            await self._store()
            while going():
                [step] = self._choose.choices(steps, weights)
                await step()
        finally:
            await self._caller.close()

    async def prepare(self, versions: int) -> None:
        """Store the first versions, and name one of them `current`."""
        try:
            for _ in range(versions):
                await self._store()
            await self._effect("setAlias", modelId=self.name, alias="current", version="1.0.0")
        finally:
            await self._caller.close()

    # --- one request each ---

    async def _store(self) -> None:
        version = f"1.0.{self._number}"
        data = base64.b64encode(f"{self.name} {version}".encode()).decode()
        if await self._effect(
            "storeModel",
            modelId=self.name,
            metadata={"type": "custom", "version": version, "mark": "stored"},
            modelData=data,
        ):
            self._versions.append(version)

    async def _update(self) -> None:
        """Ours alone, so the revision we know is the revision there is, unless an answer is missing."""
        version = self._choose.choice(self._versions or ["1.0.0"])
        expected = None if version in self._doubtful else self._revisions.get(version)
        reply = await self._change(self.name, version, expected)
        if reply is None:
            self._doubtful.add(version)
        else:
            self._revisions[version] = reply["revision"]
            self._doubtful.discard(version)

    async def _fight(self) -> None:
        """A change of what others change too: read, then write if nobody was faster."""
        found = await self._lookup(SHARED, "1.0.0")
        if found is not None:
            await self._change(SHARED, "1.0.0", found["revision"])

    async def _change(self, model: str, version: str, expected: int | None) -> dict[str, Any] | None:
        given: dict[str, Any] = {} if expected is None else {"expectedRevision": expected}
        mark = f"{self.name}-{self._number}"
        return await self._effect(
            "updateModelMetadata", modelId=model, version=version, metadata={"mark": mark}, **given
        )

    async def _alias(self) -> None:
        version = self._choose.choice(self._versions or ["1.0.0"])
        await self._effect("setAlias", modelId=self.name, alias=f"a-{self._number}", version=version)

    async def _swap(self) -> None:
        """Compare-and-set of an alias that the others move, too."""
        found = await self._ask("getModelMetadata", modelId=SHARED, version="current")
        other = f"1.0.{self._choose.randrange(SHARED_VERSIONS)}"
        if found is not None and other != found["version"]:
            await self._effect(
                "setAlias", modelId=SHARED, alias="current", version=other, expectedVersion=found["version"]
            )

    async def _delete(self) -> None:
        """And the undo, more often than not."""
        if len(self._versions) < 2:
            return
        version = self._versions.pop(self._choose.randrange(len(self._versions)))
        if await self._effect("deleteModel", modelId=self.name, version=version) is None:
            return
        if self._choose.random() < 0.7 and await self._effect("restoreModel", modelId=self.name, version=version):
            self._versions.append(version)

    async def _look(self) -> None:
        version = self._choose.choice(self._versions or ["1.0.0"])
        found = await self._lookup(self.name, version)
        if found is not None and found["revision"] < self._revisions.get(version, 1):
            self._ledger.broken.append(f"{self.name} {version} has lost a revision that was acknowledged")

    async def _read(self) -> None:
        version = self._choose.choice(self._versions or ["1.0.0"])
        found = await self._ask("getModel", modelId=self.name, version=version)
        if found is not None and base64.b64decode(found["modelData"]) != f"{self.name} {version}".encode():
            self._ledger.broken.append(f"{self.name} {version} has other bytes")

    # --- the way there ---

    async def _lookup(self, model: str, version: str) -> dict[str, Any] | None:
        found = await self._ask("getModelMetadata", modelId=model, version=version)
        if found is not None and (found["modelId"], found["version"]) != (model, version):
            self._ledger.broken.append(f"{self.name} asked for {model} {version} and got {found['modelId']}")
        return found

    async def _effect(self, method: str, **params: Any) -> dict[str, Any] | None:
        key = f"{self.name}-{self._number}"
        asked = self._ledger.ask(self.name, method, key_trace(self._user, key), effect=True)
        return await self._call(asked, params, key)

    async def _ask(self, method: str, **params: Any) -> dict[str, Any] | None:
        asked = self._ledger.ask(self.name, method, f"{self.name} {self._number}", effect=False)
        return await self._call(asked, params, None)

    async def _call(self, asked: Asked, params: dict[str, Any], key: str | None) -> dict[str, Any] | None:
        self._number += 1
        client = self._hurried if self._choose.random() < 0.1 else self._patient
        try:
            reply = await client.call(asked.method, idempotency_key=key, **params)
        except ModelManagerError as error:
            self._ledger.settle(asked, error.code, open_=error.retryable)
            return None
        self._ledger.settle(asked, "ok", reply=reply)
        return reply


class PlainClient:
    """A caller that sets `reply_to` and `correlation_id` and nothing else, and asks once.

    `direct`: it is answered on RabbitMQ's direct reply-to, else on an exclusive queue that the broker names.
    """

    def __init__(self, name: str, url: str, rack: str, ledger: Ledger, seed: int, *, direct: bool) -> None:
        self.name = name
        self._url, self._rack, self._direct = url, rack, direct
        self._ledger = ledger
        self._choose = random.Random(seed)
        self._number = 0
        self._stored = 0
        self._connection: AbstractConnection | None = None
        self._channel: AbstractChannel
        self._reply_to = ""
        self._answers: dict[str, asyncio.Future[dict[str, Any]]] = {}

    async def run(self, going: Callable[[], bool]) -> None:
        """One request after the other, for as long as `going`."""
        try:
            while going():
                if self._connection is None or self._connection.is_closed:
                    await self._connect()
                    continue
                await self._one()
        finally:
            await self._leave()

    async def _connect(self) -> None:
        await self._leave()
        try:
            async with asyncio.timeout(_CONNECT_S):
                self._connection = await aiormq.connect(self._url)
                self._channel = await self._connection.channel(publisher_confirms=False)
                self._reply_to = "amq.rabbitmq.reply-to"
                if not self._direct:
                    self._reply_to = (await self._channel.queue_declare("", exclusive=True)).queue or ""
                await self._channel.basic_consume(self._reply_to, self._answered, no_ack=True)
        except (AMQPError, OSError, TimeoutError, RuntimeError):
            await self._leave()
            await asyncio.sleep(0.2)

    async def _leave(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(AMQPError, OSError, TimeoutError, RuntimeError, asyncio.CancelledError):
                await asyncio.wait_for(self._connection.close(), 1)
            self._connection = None

    async def _one(self) -> None:
        self._number += 1
        version, mark = f"1.0.{self._number}", f"{self.name}-{self._number}"
        stored = f"1.0.{self._stored}"
        kind = self._choose.random() if self._stored else 0.0
        if kind < 0.3:
            data = base64.b64encode(f"{self.name} {version}".encode()).decode()
            params = {"metadata": {"type": "custom", "version": version, "mark": "stored"}, "modelData": data}
            if await self._ask("storeModel", f"store {self.name} {version}", params):
                self._stored = self._number
        elif kind < 0.5:
            await self._ask("updateModelMetadata", f"update {mark}", {"version": stored, "metadata": {"mark": mark}})
        elif kind < 0.6:
            alias = f"a-{self._number}"
            await self._ask("setAlias", f"alias {self.name} {alias}", {"alias": alias, "version": stored})
        else:
            reply = await self._ask("getModelMetadata", "", {"version": stored})
            if reply and (reply["modelId"], reply["version"]) != (self.name, stored):
                self._ledger.broken.append(f"{self.name} was given the answer of another")

    async def _ask(self, method: str, trace: str, params: dict[str, Any]) -> dict[str, Any] | None:
        asked = self._ledger.ask(self.name, method, trace or f"{self.name} {self._number}", effect=bool(trace))
        correlation_id = str(self._number)
        answer = self._answers[correlation_id] = asyncio.get_running_loop().create_future()
        connection = self._connection
        assert connection is not None
        try:
            await self._publish(method, dump({"modelId": self.name, **params}), correlation_id)
            await asyncio.wait([answer, connection.closing], timeout=PLAIN_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._answers[correlation_id]
        if not answer.done():
            lost = connection.closing.done()
            self._ledger.settle(asked, "lost" if lost else "ERR_DEADLINE_EXCEEDED", open_=True)
            if not lost:  # a caller that hears nothing asks on a new connection
                await self._leave()
            return None
        reply = answer.result()
        if reply["success"]:
            self._ledger.settle(asked, "ok", reply=reply)
            return reply
        self._ledger.settle(asked, reply["error"]["code"], open_=False)
        return None

    async def _publish(self, method: str, body: bytes, correlation_id: str) -> None:
        """Frames of our own making: aiormq would add a `message_id`."""
        publish = Basic.Publish(exchange=RPC_EXCHANGE, routing_key=f"{self._rack}.{method}")
        properties = Basic.Properties(reply_to=self._reply_to, correlation_id=correlation_id)
        frames = [publish, ContentHeader(body_size=len(body), properties=properties), ContentBody(body)]
        payload = b"".join(pamqp.frame.marshal(frame, self._channel.number) for frame in frames)
        await self._channel.write_queue.put(ChannelFrame(payload=payload, should_close=False))

    async def _answered(self, message: DeliveredMessage) -> None:
        answer = self._answers.get(message.header.properties.correlation_id or "")
        if answer is not None and not answer.done():
            answer.set_result(parse_object(message.body, limit=5_000_000))
