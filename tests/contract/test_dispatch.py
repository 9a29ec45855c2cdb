"""The dispatcher: lanes, deadlines, draining, and errors that tell nothing they should not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from schemas.deadline import deadline
from schemas.errors import ModelManagerError
from tests.rack import LocalRack
from worker.context import Context
from worker.dispatch import Dispatcher


@pytest.fixture
async def rack(tmp_path: Path) -> AsyncIterator[LocalRack]:
    rack = LocalRack(tmp_path).open()
    yield rack
    await rack.close()


class Gate:
    """A handler that stays inside until it is let go."""

    def __init__(self) -> None:
        self.let_go = asyncio.Event()
        self.inside = 0

    async def __call__(self, params: Any, context: Context) -> dict[str, Any]:
        self.inside += 1
        await self.let_go.wait()
        return {"success": True}


def gated(rack: LocalRack, method: str, **lanes: int) -> tuple[Dispatcher, Gate]:
    gate = Gate()
    rack.service.handlers[method] = gate
    places = {"lookups": 4, "writes": 2, "transfers": 2, **lanes}
    return Dispatcher(rack.service, rack.registry, rack.metrics, **places), gate


async def test_lookups_do_not_wait_behind_writes(rack: LocalRack) -> None:
    dispatcher, gate = gated(rack, "restoreModel")
    writes = [asyncio.create_task(dispatcher.call("restoreModel", {"modelId": "a"}, Context())) for _ in range(8)]
    while gate.inside < 2:
        await asyncio.sleep(0)
    assert (await dispatcher.call("listModels", {}, Context()))["count"] == 0
    assert gate.inside == 2
    gate.let_go.set()
    await asyncio.gather(*writes)


async def test_who_waits_for_a_job_takes_no_place_from_lookups_and_writes(rack: LocalRack) -> None:
    dispatcher, _ = gated(rack, "restoreModel")
    await rack.store_bytes("net", "1.0.0", b"x")
    let_go = asyncio.Event()
    reads = rack.store.hash

    async def stuck(*args: Any) -> Any:
        await let_go.wait()
        return await reads(*args)

    rack.store.hash = stuck  # type: ignore[method-assign]
    validate = {"modelId": "net", "waitMs": 5000}
    waiting = [asyncio.create_task(dispatcher.call("validateModel", validate, Context())) for _ in range(10)]
    while len(rack.registry.catalog.jobs) < 10:
        await asyncio.sleep(0.01)
    status = {"jobId": next(iter(rack.registry.catalog.jobs)), "waitMs": 5000}
    waiting += [asyncio.create_task(dispatcher.call("getJob", status, Context())) for _ in range(20)]
    await asyncio.sleep(0)
    alias = {"modelId": "net", "alias": "prod", "version": "1.0.0"}
    assert (await dispatcher.call("setAlias", alias, Context()))["success"] is True
    assert (await dispatcher.call("getModelMetadata", {"modelId": "net"}, Context()))["aliases"] == ["prod"]
    assert not any(task.done() for task in waiting)
    let_go.set()
    assert all(reply["success"] for reply in await asyncio.gather(*waiting))


async def test_who_does_not_wait_for_a_job_is_not_refused_for_those_who_do(
    rack: LocalRack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.dispatch._WAITING_REQUESTS", 1)
    dispatcher, _ = gated(rack, "restoreModel")
    await rack.store_bytes("net", "1.0.0", b"x")
    head = {"epoch": rack.registry.journal.epoch, "after": rack.registry.journal.head, "waitMs": 5000}
    waiting = [asyncio.create_task(dispatcher.call("getChanges", head, Context())) for _ in range(5)]
    await asyncio.sleep(0)
    begun = await dispatcher.call("validateModel", {"modelId": "net", "waitMs": 0}, Context())
    assert begun["jobId"]
    assert (await dispatcher.call("getJob", {"jobId": begun["jobId"]}, Context()))["jobId"] == begun["jobId"]
    now = {"epoch": head["epoch"], "after": 0}
    assert (await dispatcher.call("getChanges", now, Context()))["changes"]
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)


async def test_beyond_the_waiting_room_a_lane_says_when_to_come_back(rack: LocalRack) -> None:
    dispatcher, gate = gated(rack, "restoreModel")
    inside = [asyncio.create_task(dispatcher.call("restoreModel", {"modelId": "a"}, Context())) for _ in range(10)]
    while gate.inside < 2:
        await asyncio.sleep(0)
    with pytest.raises(ModelManagerError) as error:
        await dispatcher.call("restoreModel", {"modelId": "a"}, Context())
    assert (error.value.code, error.value.retryable) == ("ERR_OVERLOADED", True)
    assert error.value.details["retryAfterMs"] >= 50
    gate.let_go.set()
    assert all(reply["success"] for reply in await asyncio.gather(*inside))
    assert (await dispatcher.call("restoreModel", {"modelId": "a"}, Context()))["success"]


async def test_a_deadline_that_is_over_is_not_worked_on(rack: LocalRack) -> None:
    dispatcher, gate = gated(rack, "restoreModel")
    with pytest.raises(ModelManagerError, match="ERR_DEADLINE_EXCEEDED"):
        await dispatcher.call("restoreModel", {"modelId": "a"}, Context(deadline=time.monotonic() - 1))
    assert gate.inside == 0


async def test_a_deadline_ends_work_that_takes_too_long(rack: LocalRack) -> None:
    dispatcher, gate = gated(rack, "restoreModel")
    with pytest.raises(ModelManagerError, match="ERR_DEADLINE_EXCEEDED"):
        await dispatcher.call("restoreModel", {"modelId": "a"}, Context(deadline=time.monotonic() + 0.05))
    assert gate.inside == 1


async def test_a_place_is_given_back_whatever_becomes_of_the_request(rack: LocalRack) -> None:
    dispatcher, gate = gated(rack, "restoreModel")

    def begun(at: float | None = None) -> list[asyncio.Task[dict[str, Any]]]:
        """As many as there are places and seats in the waiting room."""
        context = Context(deadline=at)
        return [asyncio.create_task(dispatcher.answer("restoreModel", b'{"modelId": "a"}', context)) for _ in range(10)]

    async def filled() -> list[asyncio.Task[dict[str, Any]]]:
        gate.inside = 0
        tasks = begun()
        while gate.inside < 2:
            await asyncio.sleep(0)
        return tasks

    late = await asyncio.gather(*begun(time.monotonic() + 0.05))
    assert {reply["error"]["code"] for reply in late} == {"ERR_DEADLINE_EXCEEDED"}
    cancelled = await filled()
    for task in cancelled:
        task.cancel()
    await asyncio.wait(cancelled)
    taken = await filled()
    gate.let_go.set()
    assert all(reply["success"] for reply in await asyncio.gather(*taken))


async def test_the_work_knows_the_deadline_of_its_request_and_of_no_other(rack: LocalRack) -> None:
    known: list[float | None] = []

    async def look(params: Any, context: Context) -> Any:
        known.append(deadline.get())
        return {"success": True}

    rack.service.handlers["ping"] = look
    at = time.monotonic() + 60
    for context in (Context(deadline=at), Context()):
        await rack.dispatcher.call("ping", {}, context)
        assert deadline.get() is None
    assert known == [at, None]


async def test_work_that_gave_up_waiting_is_late(rack: LocalRack) -> None:
    async def slow(params: Any, context: Context) -> Any:
        raise TimeoutError

    rack.service.handlers["ping"] = slow
    answer = await rack.dispatcher.answer("ping", b"{}", Context())
    assert answer["error"]["code"] == "ERR_DEADLINE_EXCEEDED"


async def test_while_draining_lookups_are_answered_and_writes_refused(rack: LocalRack) -> None:
    rack.dispatcher.draining = True
    assert (await rack.call("listModels", {}))["success"] is True
    with pytest.raises(ModelManagerError, match="ERR_SHUTTING_DOWN"):
        await rack.store_bytes("net", "1.0.0", b"x")


async def test_before_the_registry_is_open_everything_may_be_tried_again(tmp_path: Path) -> None:
    rack = LocalRack(tmp_path)
    with pytest.raises(ModelManagerError) as error:
        await rack.call("listModels", {})
    assert (error.value.code, error.value.retryable) == ("ERR_STORAGE_UNAVAILABLE", True)
    await rack.close()


async def test_an_unknown_failure_tells_the_caller_nothing_of_ours(rack: LocalRack) -> None:
    async def broken(params: Any, context: Context) -> Any:
        raise RuntimeError("/srv/secret/path went wrong")

    rack.service.handlers["ping"] = broken
    answer = await rack.dispatcher.answer("ping", b"{}", Context())
    assert answer["error"]["code"] == "ERR_INTERNAL"
    assert "secret" not in str(answer)


async def test_an_unknown_method_is_told_so(rack: LocalRack) -> None:
    answer = await rack.dispatcher.answer("destroyEverything", b"{}", Context())
    assert answer["error"]["code"] == "ERR_UNKNOWN_METHOD"


async def test_every_request_is_counted_by_method_and_code(rack: LocalRack) -> None:
    await rack.dispatcher.answer("ping", b"{}", Context())
    await rack.dispatcher.answer("getModel", b'{"modelId": "none"}', Context())
    await rack.dispatcher.answer("getModel", b"not json", Context())
    text = rack.metrics.render()[1].decode()
    assert 'model_manager_rpc_requests_total{code="ok",op="ping"} 1.0' in text
    assert 'model_manager_rpc_requests_total{code="ERR_MODEL_NOT_FOUND",op="getModel"} 1.0' in text
    assert 'model_manager_rpc_requests_total{code="ERR_INVALID_REQUEST",op="getModel"} 1.0' in text


async def test_slow_uploads_do_not_hold_up_other_writes(rack: LocalRack) -> None:
    dispatcher, _ = gated(rack, "restoreModel", writes=1, transfers=2)
    async with dispatcher.admit("storeModel", Context()), dispatcher.admit("storeModel", Context()):
        params = {"modelId": "net", "metadata": {"type": "custom"}, "modelData": ""}
        assert (await dispatcher.call("storeModel", params, Context()))["created"] is True


async def test_nothing_is_acknowledged_by_a_process_that_lost_the_storage_and_lookups_go_on(rack: LocalRack) -> None:
    await rack.store_bytes("net", "1.0.0", b"x")
    job = (await rack.call("validateModel", {"modelId": "net", "waitMs": 0}))["jobId"]

    async def not_ours() -> None:
        raise ModelManagerError("ERR_SHUTTING_DOWN")

    rack.dispatcher.vouch = not_ours
    for method, params in (
        ("storeModel", {"modelId": "other", "metadata": {"type": "custom"}, "modelData": "QUJD"}),
        ("getJob", {"jobId": job, "waitMs": 5000}),
        ("cancelJob", {"jobId": job}),
    ):
        with pytest.raises(ModelManagerError, match="ERR_SHUTTING_DOWN"):
            await rack.call(method, params)
    with pytest.raises(ModelManagerError, match="ERR_SHUTTING_DOWN"):
        async with rack.dispatcher.admit("storeModel", Context()):
            pass
    async with rack.dispatcher.admit("getModel", Context()):
        pass
    assert (await rack.call("getModelMetadata", {"modelId": "net"}))["size"] == 1
    rack.dispatcher.vouch = lambda: None
    assert (await rack.call("getJob", {"jobId": job}))["state"] == "succeeded"
