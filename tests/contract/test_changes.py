"""getChanges: every change once, in order, as the hint that announces it."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import tracemalloc
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import ModelManagerError
from schemas.hints import hint_of
from tests.rack import LocalRack
from worker.journal import Entry, base_name
from worker.registry import Change
from worker.upkeep.compaction_child import compact


@pytest.fixture
async def rack(tmp_path: Path) -> AsyncIterator[LocalRack]:
    rack = LocalRack(tmp_path).open()
    yield rack
    await rack.close()


async def changes(rack: LocalRack, after: int = 0, **params: Any) -> Any:
    return await rack.call("getChanges", {"epoch": rack.registry.journal.epoch, "after": after, **params})


async def do_one_of_each(rack: LocalRack) -> list[str]:
    await rack.store_bytes("net", "1.0.0", b"x")
    await rack.store_bytes("net", "2.0.0", b"y")
    await rack.call("updateModelMetadata", {"modelId": "net", "metadata": {"note": 1}})
    await rack.call("setAlias", {"modelId": "net", "alias": "prod", "version": "1.0.0"})
    await rack.call("deleteModel", {"modelId": "net", "version": "2.0.0"})
    await rack.call("restoreModel", {"modelId": "net", "version": "2.0.0"})
    await rack.call("deleteModel", {"modelId": "net"})
    return [
        "model-manager.version.stored",
        "model-manager.version.stored",
        "model-manager.version.updated",
        "model-manager.alias.changed",
        "model-manager.version.deleted",
        "model-manager.version.restored",
        "model-manager.version.deleted",
    ]


async def test_each_change_is_there_in_order_and_equals_its_hint(rack: LocalRack) -> None:
    announced: list[Any] = []

    def announce(entry: Entry) -> None:
        announced.append(
            hint_of(entry.op, entry.record, rack="rack-1", epoch=1, sequence=entry.sequence, time_ms=entry.time_ms)
        )

    rack.registry.listen(announce)
    kinds = await do_one_of_each(rack)
    page = await changes(rack)
    assert [change["type"] for change in page["changes"]] == kinds
    assert page["changes"] == announced
    assert page["changes"][-1]["data"]["versions"] == ["1.0.0", "2.0.0"]
    assert page["changes"][4]["data"]["version"] == "2.0.0"
    assert page["next"] == page["head"] == rack.registry.journal.head


async def test_pages_of_one_give_the_same_as_one_page(rack: LocalRack) -> None:
    await do_one_of_each(rack)
    whole = (await changes(rack))["changes"]
    after, single = 0, []
    while after < rack.registry.journal.head:
        page = await changes(rack, after, limit=1)
        single += page["changes"]
        after = page["next"]
    assert single == whole


async def test_the_feed_goes_on_after_a_restart(tmp_path: Path) -> None:
    rack = LocalRack(tmp_path).open()
    await do_one_of_each(rack)
    before = (await changes(rack))["changes"]
    await rack.close()
    again = LocalRack(tmp_path).open()
    assert (await changes(again))["changes"] == before
    await again.close()


async def test_another_epoch_or_a_cursor_beyond_the_head_is_gone(rack: LocalRack) -> None:
    for params in ({"epoch": 2, "after": 0}, {"epoch": 1, "after": 10_000}):
        with pytest.raises(ModelManagerError) as error:
            await rack.call("getChanges", params)
        assert error.value.code == "ERR_CHANGES_GONE"
        assert error.value.details["epoch"] == 1


async def test_a_reader_from_whom_compaction_took_changes_away_meanwhile_is_told(
    rack: LocalRack, monkeypatch: pytest.MonkeyPatch
) -> None:
    await do_one_of_each(rack)
    journal, loop = rack.registry.journal, asyncio.get_running_loop()
    manifest = await journal.rotate()
    written = await asyncio.to_thread(compact, journal.folder, base_name(manifest.generation + 1))
    base = dataclasses.replace(written, changes_from=written.stands_for)
    read = journal.read

    def read_behind_it(after: int, limit: int) -> list[Entry]:
        asyncio.run_coroutine_threadsafe(journal.adopt(base), loop).result(10)
        return read(after, limit)

    monkeypatch.setattr(journal, "read", read_behind_it)
    with pytest.raises(ModelManagerError) as error:
        await changes(rack, 1)
    assert error.value.code == "ERR_CHANGES_GONE"
    monkeypatch.undo()
    assert (await changes(rack, base.changes_from))["changes"] == []


async def test_a_waiting_reader_is_answered_as_soon_as_something_changes(rack: LocalRack) -> None:
    head = rack.registry.journal.head
    waiting = asyncio.create_task(changes(rack, head, waitMs=5000))
    await asyncio.sleep(0.05)
    started = time.monotonic()
    await rack.store_bytes("net", "1.0.0", b"x")
    page = await waiting
    assert time.monotonic() - started < 2
    assert [change["subject"] for change in page["changes"]] == ["net"]


async def test_a_waiting_reader_gives_up_in_time(rack: LocalRack) -> None:
    page = await changes(rack, rack.registry.journal.head, waitMs=50)
    assert page["changes"] == []
    assert page["next"] == page["head"]


async def test_a_page_of_versions_with_many_files_takes_the_memory_of_its_hints(rack: LocalRack) -> None:
    digests = [f"{number:064x}" for number in range(2000)]
    files = [{"path": d, "size": 1, "sha256": d, "mediaType": "text/plain", "key": f"blobs/{d[:26]}"} for d in digests]
    record = {"type": "custom", "metadata": {}, "checksum": digests[0], "size": 2000, "created": 1, "origin": "rack-1"}
    for number in range(30):
        version = {**record, "model": "net", "version": str(number), "files": files, "replicas": []}
        await rack.registry.transact("net", partial(Change, "store", version))
    tracemalloc.start()
    page = await changes(rack, limit=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [change["data"]["version"] for change in page["changes"]] == [str(number) for number in range(30)]
    assert peak < 20_000_000
