"""Every bad input gets its code, changes nothing, and the next request is served."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from schemas.errors import ERRORS
from schemas.method_errors import errors_of
from schemas.rpc import METHODS
from tests.bad_inputs import BAD_INPUTS, ZEROS, BadInput, b64, seed
from tests.rack import LocalRack
from worker.context import Context

MOST_REPLY_BYTES = 16_000


on_the_shared_rack = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Prepared:
    """A rack that serves all the inputs, one after the other: none may cost a later one anything."""

    rack: LocalRack
    upload: str
    good: int = 0


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="prepared")
async def prepare(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Prepared]:
    rack = LocalRack(tmp_path_factory.mktemp("rack")).open()
    yield Prepared(rack, await seed(rack))
    await rack.close()


def stored(rack: LocalRack) -> tuple[int, set[str]]:
    """The number of records in the journal, and all that lies in the store."""
    return rack.registry.journal.stats().records, {
        str(path) for path in (rack.folder / "models").rglob("*") if path.is_file()
    }


async def answer(rack: LocalRack, method: str, body: bytes | dict[str, Any], *, key: str | None = None) -> Any:
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await rack.dispatcher.answer(method, encoded, Context(idempotency_key=key))


@on_the_shared_rack
@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name[:100].encode("unicode_escape").decode())
async def test_a_bad_input_gets_its_code_and_changes_nothing(prepared: Prepared, bad: BadInput) -> None:
    rack = prepared.rack
    before = stored(rack)
    reply = await answer(rack, bad.method, bad.encoded(prepared.upload))
    assert reply["success"] is False
    error = reply["error"]
    assert error["code"] == bad.code, error["message"]
    assert bad.method not in METHODS or bad.code in errors_of(bad.method), "the documents tell of it"
    assert set(error) == {"code", "message", "retryable", "details"}
    assert error["retryable"] is ERRORS[bad.code].retryable is False
    assert len(json.dumps(reply)) < MOST_REPLY_BYTES
    assert str(rack.folder) not in json.dumps(reply)
    assert stored(rack) == before
    prepared.good += 1
    assert (await rack.store_bytes("good", f"1.0.{prepared.good}", b"weights"))["created"] is True


@on_the_shared_rack
async def test_a_key_of_another_request_is_refused_by_its_effect_and_while_it_runs(prepared: Prepared) -> None:
    """B44: the same request again is answered as before; see test_repeats for all of it."""
    rack = prepared.rack
    params = {"modelId": "keyed", "metadata": {"type": "custom"}, "modelData": b64(b"one")}
    other = {**params, "modelData": b64(b"two")}
    first, running = await asyncio.gather(
        answer(rack, "storeModel", params, key="k"), answer(rack, "storeModel", other, key="k")
    )
    assert (first["success"], running["error"]["code"]) == (True, "ERR_CONFLICT")
    before = stored(rack)
    assert (await answer(rack, "storeModel", other, key="k"))["error"]["code"] == "ERR_CONFLICT"
    assert (await answer(rack, "deleteModel", {"modelId": "net"}, key="k"))["error"]["code"] == "ERR_CONFLICT"
    assert await answer(rack, "storeModel", params, key="k") == first
    assert stored(rack) == before


@on_the_shared_rack
async def test_a_manifest_that_is_too_large_for_a_record_is_refused_and_its_bytes_are_freed(prepared: Prepared) -> None:
    """B35: 2,000 files are allowed and so are paths of 505 bytes, but a record has at most 1 MiB."""
    rack = prepared.rack
    before = stored(rack)
    paths = [f"{n:04}/{'x' * 500}" for n in range(2000)]
    planned = [{"path": path, "size": 1, "sha256": ZEROS} for path in paths]
    reply = await answer(rack, "createUpload", {"modelId": "new", "version": "2.0.0", "files": planned})
    assert reply["error"]["code"] == "ERR_INVALID_REQUEST"
    assert stored(rack) == before
    inline = [{"path": path, "data": b64(b"unseen")} for path in paths[:1600]]
    params = {"modelId": "new", "metadata": {"type": "custom"}, "files": inline}
    reply = await answer(rack, "storeModel", params)
    assert reply["error"]["code"] == "ERR_INVALID_REQUEST"
    await rack.clean_up.round()
    assert stored(rack) == before


def test_the_table_has_each_input_once() -> None:
    names = [bad.name for bad in BAD_INPUTS]
    assert sorted(names) == sorted(set(names))
