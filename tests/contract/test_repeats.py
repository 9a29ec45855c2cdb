"""A repeated request has one effect and one answer, also after a restart or at the same time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from schemas.errors import ModelManagerError
from schemas.journal import Idempotency
from tests.rack import LocalRack
from worker.context import Context
from worker.journal import Files
from worker.storage.blobstore import StoredBlob
from worker.storage.disk import DiskStore
from worker.unrecorded import UnrecordedAnswers


@pytest.fixture
async def rack(tmp_path: Path) -> AsyncIterator[LocalRack]:
    rack = LocalRack(tmp_path).open()
    yield rack
    await rack.close()


async def test_a_repeat_is_answered_from_the_record_also_after_a_restart(tmp_path: Path) -> None:
    rack = LocalRack(tmp_path).open()
    first = await rack.store_bytes("net", "1.0.0", b"x", key="k")
    head = rack.registry.journal.head
    assert await rack.store_bytes("net", "1.0.0", b"x", key="k") == first
    assert rack.registry.journal.head == head
    await rack.close()
    again = LocalRack(tmp_path).open()
    assert await again.store_bytes("net", "1.0.0", b"x", key="k") == first
    assert first["created"] is True
    await again.close()


async def test_the_answer_is_the_first_one_though_the_state_moved_on(rack: LocalRack) -> None:
    await rack.store_bytes("net", "1.0.0", b"x")
    change = {"modelId": "net", "metadata": {"note": 1}}
    first = await rack.call("updateModelMetadata", change, key="k")
    await rack.call("updateModelMetadata", {"modelId": "net", "metadata": {"note": 2}})
    assert await rack.call("updateModelMetadata", change, key="k") == first
    assert (await rack.call("getModelMetadata", {"modelId": "net"}))["metadata"]["note"] == 2


async def test_a_delete_repeated_after_a_new_store_deletes_nothing(rack: LocalRack) -> None:
    await rack.store_bytes("net", "1.0.0", b"x")
    first = await rack.call("deleteModel", {"modelId": "net", "purge": True}, key="k")
    await rack.store_bytes("net", "1.0.0", b"y")
    assert await rack.call("deleteModel", {"modelId": "net", "purge": True}, key="k") == first
    assert (await rack.call("getModelMetadata", {"modelId": "net"}))["state"] == "available"


async def test_repeats_at_the_same_time_have_one_effect(rack: LocalRack) -> None:
    await rack.store_bytes("net", "1.0.0", b"x")
    change = {"modelId": "net", "metadata": {"note": 1}}
    answers = await asyncio.gather(*(rack.call("updateModelMetadata", change, key="k") for _ in range(20)))
    assert all(answer == answers[0] for answer in answers)
    assert answers[0]["revision"] == 2


async def test_the_same_key_with_another_request_is_a_conflict(rack: LocalRack) -> None:
    await rack.store_bytes("net", "1.0.0", b"x", key="k")
    with pytest.raises(ModelManagerError, match="ERR_CONFLICT"):
        await rack.store_bytes("net", "1.0.0", b"y", key="k")
    with pytest.raises(ModelManagerError, match="ERR_CONFLICT"):
        await rack.call("deleteModel", {"modelId": "net"}, key="k")


async def test_keys_of_different_callers_do_not_meet(rack: LocalRack) -> None:
    await rack.store_bytes("net", "1.0.0", b"x")
    one = {"modelId": "net", "metadata": {"note": 1}}
    two = {"modelId": "net", "metadata": {"note": 2}}
    await rack.call("updateModelMetadata", one, key="k", caller="alice")
    assert (await rack.call("updateModelMetadata", two, key="k", caller="bob"))["revision"] == 3


async def test_a_refused_request_leaves_its_key_free(rack: LocalRack) -> None:
    with pytest.raises(ModelManagerError, match="ERR_MODEL_NOT_FOUND"):
        await rack.call("deleteModel", {"modelId": "net"}, key="k")
    await rack.store_bytes("net", "1.0.0", b"x")
    assert (await rack.call("deleteModel", {"modelId": "net"}, key="k"))["versions"] == ["1.0.0"]


async def test_a_repeated_job_is_the_same_job(rack: LocalRack) -> None:
    await rack.store_bytes("net", "1.0.0", b"x")
    request = {"modelId": "net", "version": "1.0.0", "waitMs": 5000}
    first = await rack.call("validateModel", request, key="k")
    begun = len(rack.registry.catalog.jobs)
    assert await rack.call("validateModel", request, key="k") == first
    assert len(rack.registry.catalog.jobs) == begun == 1


async def test_a_repeated_upload_is_the_same_upload(rack: LocalRack) -> None:
    request = {
        "modelId": "net",
        "version": "1.0.0",
        "files": [{"path": "a", "size": 1, "sha256": "sha256:" + "0" * 64}],
    }
    first = await rack.call("createUpload", request, key="k")
    assert (await rack.call("createUpload", request, key="k"))["uploadId"] == first["uploadId"]


async def test_a_caller_who_gives_up_does_not_stop_the_effect(rack: LocalRack) -> None:
    task = asyncio.create_task(rack.store_bytes("net", "1.0.0", b"x", key="k"))
    while rack.registry.journal.head < 1 and not task.done():
        await asyncio.sleep(0)
    for _ in range(200):  # cancelled somewhere between the bytes and the commit
        await asyncio.sleep(0)
        if rack.registry._transactions:
            break
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    stored = await rack.store_bytes("net", "1.0.0", b"x", key="k")
    assert stored["checksum"]
    assert (await rack.call("listModels", {}))["count"] == 1


class SlowFiles(Files):
    """A disk that takes its time to make anything durable."""

    def fdatasync(self, fd: int) -> None:
        time.sleep(0.3)
        super().fdatasync(fd)


class StuckStore(DiskStore):
    """A disk that takes no bytes until it is let go."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reached = asyncio.Event()
        self.let_go = asyncio.Event()

    async def put(self, *args: Any, **kwargs: Any) -> StoredBlob:
        self.reached.set()
        await self.let_go.wait()
        return await super().put(*args, **kwargs)


def effects_of(rack: LocalRack) -> list[str]:
    """The records, as they come, that have a request's key."""
    effects: list[str] = []
    rack.registry.listen(lambda entry: effects.append(entry.op) if "idem" in entry.record else None)
    return effects


_FILE = {"path": "a", "size": 1, "sha256": "sha256:" + "0" * 64}


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("updateModelMetadata", {"modelId": "net", "metadata": {"note": 1}, "expectedRevision": 1}),
        ("deleteModel", {"modelId": "net", "version": "1.0.0"}),
        ("validateModel", {"modelId": "net", "waitMs": 5000}),
        ("createUpload", {"modelId": "up", "version": "1.0.0", "files": [_FILE]}),
    ],
)
async def test_a_repeat_while_the_first_effect_is_on_its_way_to_the_disk_waits_for_it(
    rack: LocalRack, method: str, params: dict[str, Any]
) -> None:
    await rack.store_bytes("net", "1.0.0", b"x")
    rack.registry.journal._appender._files = SlowFiles()
    effects = effects_of(rack)
    in_a_moment = time.monotonic() + 0.05
    with pytest.raises(ModelManagerError, match="ERR_DEADLINE_EXCEEDED"):
        await rack.dispatcher.call(method, params, Context(idempotency_key="k", deadline=in_a_moment))
    with pytest.raises(ModelManagerError, match="ERR_DEADLINE_EXCEEDED"):
        await rack.dispatcher.call(method, params, Context(idempotency_key="k", deadline=in_a_moment + 0.05))
    first = await rack.call(method, params, key="k")
    assert first["success"] is True
    assert await rack.call(method, params, key="k") == first
    assert len(effects) == 1


async def test_a_request_whose_time_is_over_before_its_turn_has_no_effect_later(rack: LocalRack) -> None:
    await rack.store_bytes("net", "1.0.0", b"x")
    rack.registry.journal._appender._files = SlowFiles()
    change = {"modelId": "net", "metadata": {"note": 1}}
    before = asyncio.create_task(rack.call("updateModelMetadata", change))
    await asyncio.sleep(0.01)
    effects = effects_of(rack)
    with pytest.raises(ModelManagerError, match="ERR_DEADLINE_EXCEEDED"):
        await rack.dispatcher.call(
            "deleteModel", {"modelId": "net"}, Context(idempotency_key="k", deadline=time.monotonic() + 0.05)
        )
    await before
    assert (await rack.call("getModelMetadata", {"modelId": "net"}))["revision"] == 2
    assert (await rack.call("deleteModel", {"modelId": "net"}, key="k"))["versions"] == ["1.0.0"]
    assert effects == ["delete"]


async def test_a_repeat_that_finds_the_first_at_work_keeps_its_own_deadline(tmp_path: Path) -> None:
    store = StuckStore(tmp_path / "models")
    rack = LocalRack(tmp_path, store=store).open()
    first = asyncio.create_task(rack.store_bytes("net", "1.0.0", b"x", key="k"))
    await store.reached.wait()
    params = {"modelId": "net", "metadata": {"type": "custom", "version": "1.0.0"}, "modelData": "eA=="}
    started = time.monotonic()
    with pytest.raises(ModelManagerError, match="ERR_DEADLINE_EXCEEDED"):
        await rack.dispatcher.call("storeModel", params, Context(idempotency_key="k", deadline=started + 0.05))
    assert not first.done()
    store.let_go.set()
    assert await rack.call("storeModel", params, key="k") == await first
    await rack.close()


async def test_a_repeat_with_more_time_than_the_first_goes_on_where_that_gave_up(tmp_path: Path) -> None:
    store = StuckStore(tmp_path / "models")
    rack = LocalRack(tmp_path, store=store).open()
    params = {"modelId": "net", "metadata": {"type": "custom", "version": "1.0.0"}, "modelData": "eA=="}
    hasty = Context(idempotency_key="k", deadline=time.monotonic() + 0.1)
    first = asyncio.create_task(rack.dispatcher.answer("storeModel", orjson.dumps(params), hasty))
    await store.reached.wait()
    second = asyncio.create_task(rack.call("storeModel", params, key="k"))
    assert (await first)["error"]["code"] == "ERR_DEADLINE_EXCEEDED"
    store.let_go.set()
    assert (await second)["created"] is True
    await rack.close()


async def test_a_job_that_failed_of_what_passes_is_begun_again_by_a_repeat(rack: LocalRack) -> None:
    await rack.store_bytes("net", "1.0.0", b"x")
    request = {"modelId": "net", "version": "1.0.0", "waitMs": 5000}
    reads = rack.store.hash

    async def away(key: str, progress: Any = None) -> StoredBlob:
        raise ModelManagerError("ERR_STORAGE_UNAVAILABLE")

    rack.store.hash = away  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(ModelManagerError, match="ERR_STORAGE_UNAVAILABLE"):
            await rack.call("validateModel", request, key="k")
    rack.store.hash = reads  # type: ignore[method-assign]
    first = await rack.call("validateModel", request, key="k")
    assert first["isValid"] is True
    assert await rack.call("validateModel", request, key="k") == first
    assert [job.state for job in rack.registry.catalog.jobs.values()] == ["failed", "failed", "succeeded"]


async def test_a_repeat_of_what_changed_nothing_changes_nothing_though_there_is_something_to_change_by_then(
    rack: LocalRack,
) -> None:
    await rack.store_bytes("net", "1.0.0", b"one")
    await rack.store_bytes("net", "2.0.0", b"two")
    alias = {"modelId": "net", "alias": "prod", "version": "1.0.0"}
    await rack.call("setAlias", alias, key="first")
    nothing = await rack.call("setAlias", alias, key="k")
    await rack.call("setAlias", {**alias, "version": "2.0.0"})
    assert await rack.call("setAlias", alias, key="k") == nothing
    assert (await rack.call("getModelMetadata", {"modelId": "net", "version": "prod"}))["version"] == "2.0.0"
    there = await rack.store_bytes("net", "1.0.0", b"one", key="s")
    assert there["created"] is False
    await rack.call("deleteModel", {"modelId": "net", "version": "1.0.0"})
    assert await rack.store_bytes("net", "1.0.0", b"one", key="s") == there
    with pytest.raises(ModelManagerError, match="ERR_MODEL_NOT_FOUND"):
        await rack.call("getModelMetadata", {"modelId": "net", "version": "1.0.0"})
    with pytest.raises(ModelManagerError, match="ERR_CONFLICT"):
        await rack.call("setAlias", {**alias, "version": "2.0.0"}, key="k")


def test_answers_without_a_record_are_kept_for_a_day_and_within_their_bytes() -> None:
    now = [0.0]
    answers = UnrecordedAnswers(3000, clock=lambda: now[0])
    requests: list[Idempotency] = [{"key": f"k{number}", "hash": "h"} for number in range(10)]
    for request in requests:
        answers.put(request, {"success": True, "text": "x" * 400})
    assert [answers.get(request) is not None for request in requests] == [False] * 7 + [True] * 3
    now[0] = 24 * 3600 + 1
    assert answers.get(requests[-1]) is None
    answers.put(requests[0], {"success": True, "text": "x" * 400})
    assert answers.get(requests[0]) == {"success": True, "text": "x" * 400}
