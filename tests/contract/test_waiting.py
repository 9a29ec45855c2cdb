"""A request that may not wait is answered as if its `waitMs` were 0, and is the same request all the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.rack import LocalRack
from worker.context import Context
from worker.storage.blobstore import StoredBlob
from worker.storage.disk import DiskStore

SOON_S = 2.0


class StuckDiskStore(DiskStore):
    """A disk whose verification reads never end."""

    async def hash(self, key: str, progress: Any = None) -> StoredBlob:
        return await asyncio.get_running_loop().create_future()


@pytest.fixture
async def rack(tmp_path: Path) -> AsyncIterator[LocalRack]:
    rack = LocalRack(tmp_path, store=StuckDiskStore(tmp_path / "models")).open()
    yield rack
    await rack.close()


async def at_once(rack: LocalRack, method: str, params: dict[str, Any], key: str | None = None) -> Any:
    started = time.monotonic()
    reply = await rack.dispatcher.call(method, params, Context(idempotency_key=key, may_wait=False))
    assert time.monotonic() - started < SOON_S
    return reply


async def test_the_change_feed_is_answered_without_a_change(rack: LocalRack) -> None:
    journal = rack.registry.journal
    reply = await at_once(rack, "getChanges", {"epoch": journal.epoch, "after": journal.head, "waitMs": 5000})
    assert (reply["changes"], reply["next"]) == ([], journal.head)


async def test_a_job_is_answered_with_its_id_and_so_is_its_repeat(rack: LocalRack) -> None:
    await rack.store_bytes("net", "1.0.0", b"x")
    params = {"modelId": "net", "waitMs": 5000}
    begun = await at_once(rack, "validateModel", params, "K")
    assert begun["state"] in ("queued", "running")
    assert (await at_once(rack, "validateModel", params, "K"))["jobId"] == begun["jobId"]
    status = await at_once(rack, "getJob", {"jobId": begun["jobId"], "waitMs": 5000})
    assert status["state"] == "running"


async def test_a_repeat_that_may_not_wait_is_no_other_request(rack: LocalRack) -> None:
    await rack.store_bytes("net", "1.0.0", b"x")
    params = {"modelId": "net", "waitMs": 10}
    begun = await rack.call("validateModel", params, key="K")
    assert (await at_once(rack, "validateModel", params, "K"))["jobId"] == begun["jobId"]
