"""Every bad input gets its code, changes nothing, and the next request is served."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import ERRORS
from tests.bad_inputs import BAD_INPUTS, BadInput, seed, storing
from tests.rack import LocalRack
from worker.context import Context

MOST_REPLY_BYTES = 16_000


@pytest.fixture
async def rack(tmp_path: Path) -> AsyncIterator[LocalRack]:
    rack = LocalRack(tmp_path).open()
    yield rack
    await rack.close()


def stored(rack: LocalRack) -> tuple[int, set[str]]:
    """The head of the journal, and all that lies in the store."""
    return rack.registry.journal.head, {str(path) for path in (rack.folder / "models").rglob("*") if path.is_file()}


async def answer(rack: LocalRack, method: str, body: bytes | dict[str, Any], *, key: str | None = None) -> Any:
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await rack.dispatcher.answer(method, encoded, Context(idempotency_key=key))


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name[:100].encode("unicode_escape").decode())
async def test_a_bad_input_gets_its_code_and_changes_nothing(rack: LocalRack, bad: BadInput) -> None:
    upload = await seed(rack)
    before = stored(rack)
    reply = await answer(rack, bad.method, bad.encoded(upload))
    assert reply["success"] is False
    error = reply["error"]
    assert error["code"] == bad.code, error["message"]
    assert set(error) == {"code", "message", "retryable", "details"}
    assert error["retryable"] is ERRORS[bad.code].retryable is False
    assert len(json.dumps(reply)) < MOST_REPLY_BYTES
    assert str(rack.folder) not in json.dumps(reply)
    assert stored(rack) == before
    assert (await answer(rack, "storeModel", storing()))["created"] is True


def test_the_table_has_each_input_once() -> None:
    names = [bad.name for bad in BAD_INPUTS]
    assert sorted(names) == sorted(set(names))
