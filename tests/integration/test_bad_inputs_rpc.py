"""Bad inputs over RabbitMQ, against a rack that really stores: what the caller sees, and what the dead letters hold."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from schemas.rpc import METHODS
from tests.amqp import Caller, CountingObserver, calling, delete_queues, eventually
from tests.bad_inputs import BAD_INPUTS, b64, seed
from tests.rack import LocalRack
from worker.transport import topology
from worker.transport.amqp import AmqpTransport
from worker.transport.link import Broker

pytestmark = pytest.mark.broker

# One of each row and method, so that every refusal of the table crosses the broker in a few requests.
SAMPLE = list({(bad.row, bad.method): bad for bad in BAD_INPUTS if bad.method in METHODS}.values())
STORE = {"modelId": "new", "metadata": {"type": "custom"}, "modelData": b64(b"bytes")}


@dataclass(frozen=True)
class Served:
    rack: LocalRack
    caller: Caller
    observer: CountingObserver
    upload: str

    def stored(self) -> tuple[int, int]:
        """The number of records in the journal, and of blobs."""
        return self.rack.registry.journal.stats().records, len(list((self.rack.folder / "models" / "blobs").iterdir()))

    async def assert_unharmed(self, before: tuple[int, int]) -> None:
        """Nothing was stored, no connection was lost, and the next request is served."""
        assert self.stored() == before
        assert (await self.caller.call("getModelMetadata", {"modelId": "net"})).body["success"]
        assert self.observer.counts["redelivered"] == self.observer.counts["reconnected"] == 0
        assert await self.caller.depth(topology.request_queue(self.caller.rack)) == 0


@asynccontextmanager
async def serving(url: str, name: str, folder: Path) -> AsyncIterator[Served]:
    rack, observer = LocalRack(folder).open(), CountingObserver()
    upload = await seed(rack)
    transport = AmqpTransport(
        broker=Broker.at(url), rack=name, provision=True, dispatcher=rack.dispatcher, prefetch=64, observer=observer
    )
    await transport.start()
    try:
        await eventually(lambda: transport.status.consuming, "consuming")
        async with calling(url, name) as caller:
            yield Served(rack, caller, observer, upload)
    finally:
        await transport.close()
        await rack.close()
        await delete_queues(url, name)


async def test_every_row_of_the_table_is_answered_with_its_code(amqp_url: str, rack: str, tmp_path: Path) -> None:
    async with serving(amqp_url, rack, tmp_path) as served:
        before = served.stored()
        for bad in SAMPLE:
            reply = await served.caller.call(bad.method, bad.encoded(served.upload), correlation_id=bad.name[:200])
            assert reply.code == bad.code, bad.name
            echoed = reply.message.header.properties.correlation_id
            assert echoed == bad.name[:200]
        assert await served.caller.depth(topology.dead_letter_queue(rack)) == 0
        await served.assert_unharmed(before)


async def test_without_reply_to_every_row_leaves_a_dead_letter(amqp_url: str, rack: str, tmp_path: Path) -> None:
    """B39: nobody waits for the answer, so the reason goes to the operator, with the body as it came."""
    async with serving(amqp_url, rack, tmp_path) as served:
        before = served.stored()
        for number, bad in enumerate(SAMPLE):
            body = bad.encoded(served.upload)
            await served.caller.publish(bad.method, body, reply_to=None, correlation_id=str(number), expiration="60000")
            dead = await served.caller.dead_letter()
            properties = dead.header.properties
            headers = properties.headers or {}
            assert headers["x-error-code"] == bad.code, bad.name
            assert headers["x-error-message"]
            assert (dead.body, properties.correlation_id, properties.expiration) == (body, str(number), None)
        assert served.caller.replies == []
        await served.assert_unharmed(before)


ENVELOPES: dict[str, dict[str, Any]] = {
    "B17 another content type": {"content_type": "text/plain"},
    "B17 a form": {"content_type": "multipart/form-data; boundary=x"},
    "B17 another charset": {"content_type": "application/json; charset=utf-16"},
    "B17 a compressed body": {"content_encoding": "gzip"},
    "B17 an encoding that changes nothing": {"content_encoding": "identity"},
    "B39 a deadline that is text": {"headers": {"x-deadline": "soon"}},
    "B39 a key that is a table": {"headers": {"x-idempotency-key": {"a": "b"}}},
    "B39 a type that is another method": {"message_type": "deleteModel"},
}


@pytest.mark.parametrize("envelope", ENVELOPES.values(), ids=ENVELOPES.keys())
async def test_a_bad_envelope_is_refused_before_its_body_is_read(
    amqp_url: str, rack: str, tmp_path: Path, envelope: dict[str, Any]
) -> None:
    async with serving(amqp_url, rack, tmp_path) as served:
        before = served.stored()
        assert (await served.caller.call("storeModel", STORE, **envelope)).code == "ERR_INVALID_REQUEST"
        await served.caller.publish("storeModel", STORE, reply_to=None, **envelope)
        dead = await served.caller.dead_letter()
        assert (dead.header.properties.headers or {})["x-error-code"] == "ERR_INVALID_REQUEST"
        await served.assert_unharmed(before)


async def test_a_reply_never_goes_to_a_queue_that_is_not_for_replies(amqp_url: str, rack: str, tmp_path: Path) -> None:
    """B40: the worker may publish where its caller may not, so a caller must not choose freely."""
    async with serving(amqp_url, rack, tmp_path) as served:
        before = served.stored()
        hints = f"model-manager-{rack}.hints.x"
        await served.caller.channel.queue_declare(hints, exclusive=True)
        targets = [topology.request_queue(rack), topology.dead_letter_queue(rack), hints, "model-manager.reply.", "a\n"]
        for target in targets:
            await served.caller.publish("storeModel", STORE, reply_to=target)
            dead = await served.caller.dead_letter()
            assert (dead.header.properties.headers or {})["x-error-code"] == "ERR_INVALID_REQUEST"
            assert dead.header.properties.reply_to == target
        assert await served.caller.depth(hints) == 0
        assert await served.caller.depth(topology.dead_letter_queue(rack)) == 0
        await served.assert_unharmed(before)


async def test_without_a_correlation_id_the_answer_comes_all_the_same(amqp_url: str, rack: str, tmp_path: Path) -> None:
    """B39: missing, as long as AMQP allows, and an expiration that is no number (which the broker itself refuses)."""
    async with serving(amqp_url, rack, tmp_path) as served:
        assert (await served.caller.call("storeModel", STORE)).body["created"] is True
        longest = await served.caller.call("getModel", {"modelId": "new"}, correlation_id="c" * 255)
        assert longest.message.header.properties.correlation_id == "c" * 255
        named_twice = await served.caller.call("ping", correlation_id="c" * 255, message_id="m" * 255)
        assert named_twice.body["success"]


HEADERS = 1 << 13


def table(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


def nested(depth: int) -> bytes:
    content = b""
    for _ in range(depth):
        content = b"\x01aF" + table(content)
    return content


TABLES = {
    "B43 tables nested 1,000 deep": (nested(1000), "ERR_INVALID_REQUEST"),
    "B43 100,000 bytes of headers": (b"\x01aS" + table(b"x" * 100_000), "ERR_CONFLICT"),
    "B43 bytes as trace context": (b"\x0btraceparentx" + table(b"\xff\x00\xfe"), "ERR_CONFLICT"),
    "B43 a trace context that is too long": (b"\x0btraceparentS" + table(b"0" * 50_000), "ERR_CONFLICT"),
    "B43 1,000 headers": (b"".join(b"\x04%04dt\x01" % n for n in range(1000)), "ERR_CONFLICT"),
}


@pytest.mark.parametrize(("content", "code"), TABLES.values(), ids=TABLES.keys())
async def test_headers_of_any_size_and_form_cost_nobody_anything(
    amqp_url: str, rack: str, tmp_path: Path, content: bytes, code: str
) -> None:
    """The request itself is good but for its case twin, so that its dead letter tells how far it came."""
    async with serving(amqp_url, rack, tmp_path) as served:
        before = served.stored()
        twin = b'{"modelId":"Net","metadata":{"type":"custom"},"modelData":"QUJD"}'
        await served.caller.publish_raw(f"{rack}.storeModel", struct.pack(">H", HEADERS) + table(content), twin)
        dead = await served.caller.dead_letter()
        assert (dead.header.properties.headers or {})["x-error-code"] == code
        assert dead.body == twin
        await served.assert_unharmed(before)


async def test_a_message_that_comes_again_has_its_effect_once(amqp_url: str, rack: str, tmp_path: Path) -> None:
    """B44: the same message is answered as before, another request under its id is refused."""
    async with serving(amqp_url, rack, tmp_path) as served:
        first = await served.caller.call("storeModel", STORE, message_id="m-1", correlation_id="1")
        assert first.body["created"] is True
        before = served.stored()
        again = await served.caller.call("storeModel", STORE, message_id="m-1", correlation_id="2")
        assert again.body == first.body
        other = await served.caller.call("deleteModel", {"modelId": "new"}, message_id="m-1")
        assert other.code == "ERR_CONFLICT"
        await served.assert_unharmed(before)


async def test_keys_of_any_bytes_are_keys(amqp_url: str, rack: str, tmp_path: Path) -> None:
    """B39: an id that is not UTF-8 still tells a repeat from a new request."""
    async with serving(amqp_url, rack, tmp_path) as served:
        for number, key in enumerate([b"\xff\xfe", b"\xed\xa0\x80", "é".encode(), b"\x00", b"k" * 255]):
            name = key.decode("utf-8", "surrogateescape")
            request = {**STORE, "modelId": f"keyed-{number}"}
            first = await served.caller.call("storeModel", request, message_id=name)
            again = await served.caller.call("storeModel", request, message_id=name)
            assert first.body == again.body
            assert first.body["created"] is True
