"""Replication among racks that fail, lie, or know less: what is wrong stays where it is, and the rest goes on."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from typing import Any

import pytest

from schemas.errors import ModelManagerError
from tests.racks import (
    Network,
    ReplicatingRack,
    Start,
    content,
    copy_of,
    here,
    is_level,
    pair,
    replication,
    tell_heads,
    until,
)
from worker.replication import follower


def changed(**members: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda reply: {**reply, **members}


def with_file(**members: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda reply: {**reply, "files": [{**file, **members} for file in reply["files"]]}


@pytest.mark.parametrize(
    ("method", "lie"),
    [
        ("getModelMetadata", changed(createdAt="1901-01-01T00:00:00.000Z")),
        ("getModelMetadata", changed(modelCreatedAt=None)),
        ("getModelMetadata", changed(size=True)),
        ("getModelMetadata", changed(size=-1)),
        ("getModelMetadata", changed(aliases=["latest"])),
        ("getModelMetadata", changed(metadata={"type": "no type", "version": "1"})),
        ("getModelMetadata", changed(origin="rack-9")),
        ("getModel", with_file(size=True)),
        ("getModel", with_file(size=-1)),
        ("getModel", with_file(size=10**18)),
        ("getModel", with_file(size=2)),
        ("getModel", with_file(path="../escapes")),
        ("getModel", with_file(url=None)),
        ("getModel", changed(files=[])),
        ("getModel", changed(files=None)),
    ],
)
async def test_what_a_rack_tells_that_cannot_be_is_not_taken(
    start: Start,
    network: Network,
    method: str,
    lie: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    one = await start("rack-1", peers=("rack-2",), replication_factor=2, check_formats=False)
    two = await start("rack-2", peers=(), check_formats=False)
    await two.store_bytes("shares", "1", b"x")
    network.lies[method] = lie
    await one.store_bytes("m", "1", b"x")

    def told() -> bool:
        followed = replication(two).followers.get("rack-1")
        two.check()
        noticed = followed is not None and (followed.error is not None or followed._passed_over)
        return noticed or replication(two).puller.failing > 0

    await until(told)
    assert copy_of(two) is None
    await two.close()
    network.lies.clear()
    two = await start("rack-2", peers=("rack-1",), check_formats=False)
    await until(here(two))
    assert await content(two) == b"x"


@pytest.mark.parametrize(
    ("method", "lie"),
    [
        ("getChanges", changed(next="12")),
        ("getChanges", changed(head=None)),
        ("getChanges", changed(next=0)),
        ("getChanges", changed(changes=[17])),
        ("getChanges", changed(registryId=7)),
        ("getChanges", changed(changes=[{"subject": "m", "type": "model-manager.version.stored", "data": {}}])),
    ],
)
async def test_a_feed_that_cannot_be_is_asked_again(
    start: Start,
    network: Network,
    method: str,
    lie: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    one, two = await pair(start)
    await one.store_bytes("before", "1", b"x")
    await until(here(two, "before"))
    await until(is_level(two, one))
    network.lies[method] = lie
    await one.store_bytes("m", "1", b"x")
    await until(lambda: replication(two).followers["rack-1"].error is not None)
    two.check()
    network.lies.clear()
    await until(here(two))


async def test_what_a_later_program_announces_is_passed_over(start: Start, network: Network) -> None:
    one, two = await pair(start)
    await until(is_level(two, one))
    network.lies["getChanges"] = lambda reply: {
        **reply,
        "changes": [{"subject": "m", "type": "model-manager.model.renamed", "data": {"to": "n"}}, *reply["changes"]],
    }
    await one.store_bytes("m", "1", b"x")
    await until(here(two))


async def test_a_change_that_the_origin_could_not_explain_is_looked_at_again(start: Start, network: Network) -> None:
    one, two = await pair(start)
    await one.store_bytes("m", "1", b"x")
    await until(here(two))
    network.broken.add("getModelMetadata")
    await one.call("deleteModel", {"modelId": "m", "purge": True})
    await until(lambda: bool(replication(two).followers["rack-1"]._passed_over))
    assert copy_of(two) is not None
    network.broken.clear()
    tell_heads(network, one)
    await one.store_bytes("other", "1", b"y")  # a change that wakes the follower
    await until(lambda: two.registry.catalog.find("m", "1") is None)


async def test_a_version_that_was_purged_and_stored_anew_with_the_same_bytes_is_the_new_one(
    start: Start,
    network: Network,
) -> None:
    one, two = await pair(start)
    for version in ("1", "2"):
        await one.store_bytes("m", version, version.encode())
        await until(here(two, "m", version))
    await two.close()
    await one.call("deleteModel", {"modelId": "m", "version": "1", "purge": True})
    await one.store_bytes("m", "1", b"1")
    two = await start("rack-2", peers=("rack-1",))
    await until(is_level(two, one))
    told = [await rack.call("getModelMetadata", {"modelId": "m"}) for rack in (one, two)]
    assert [(each["version"], each["createdAt"]) for each in told] == [("1", told[0]["createdAt"])] * 2


async def test_pulls_that_fail_for_good_do_not_hold_up_what_else_changes(
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(follower, "_PULLS_MOST", 2)
    one = await start("rack-1", peers=("rack-2",), replication_factor=2)
    two = await start("rack-2", peers=("rack-1",), max_model_size=10)
    await one.store_bytes("small", "1", b"x")
    await until(here(two, "small"))
    for number in range(4):
        await one.store_bytes(f"large-{number}", "1", bytes(100))
    await one.call("deleteModel", {"modelId": "small", "purge": True})
    await until(lambda: two.registry.catalog.find("small", "1") is None)
    await until(lambda: replication(two).puller.failing == 4)


async def test_a_model_of_another_spelling_takes_the_place_of_one_that_is_gone(start: Start) -> None:
    one, two = await pair(start)
    await one.store_bytes("Model", "1", b"a")
    await until(here(two, "Model"))
    await one.call("deleteModel", {"modelId": "Model"})
    await until(lambda: two.registry.catalog.find("Model", "1").deleted_at is not None)  # type: ignore[union-attr]
    await one.call("deleteModel", {"modelId": "Model", "purge": True})
    await one.store_bytes("model", "1", b"b")
    await until(here(two, "model"))
    assert (await two.call("getModelMetadata", {"modelId": "model"}))["modelId"] == "model"
    assert two.registry.catalog.find("Model", "1") is None


async def test_a_record_that_metadata_has_made_too_large_comes_in_two(start: Start) -> None:
    one, two = await pair(start)
    await two.close()
    data = base64.b64encode(b"x").decode()
    files = [{"path": f"{'p' * 180}/{number:04}", "data": data} for number in range(2000)]
    metadata = {"type": "custom", "version": "1"}
    await one.call("storeModel", {"modelId": "m", "metadata": metadata, "files": files})
    patch = {f"key-{number}": "v" * 1000 for number in range(60)}
    await one.call("updateModelMetadata", {"modelId": "m", "metadata": patch})
    two = await start("rack-2", peers=("rack-1",))
    await until(here(two))
    assert (await two.call("getModelMetadata", {"modelId": "m"}))["metadata"] == {
        **(await one.call("getModelMetadata", {"modelId": "m"}))["metadata"]
    }


async def test_a_cursor_that_cannot_be_recorded_stops_nothing(
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(follower, "_RECORD_S", 0.0)
    one, two = await pair(start)
    await one.store_bytes("m", "1", b"x")
    await until(here(two))
    transact = two.registry.transact

    async def full(scope: str, *given: Any, **named: Any) -> Any:
        if scope.startswith("follow "):
            raise ModelManagerError("ERR_STORAGE_FULL")
        return await transact(scope, *given, **named)

    monkeypatch.setattr(two.registry, "transact", full)
    await one.call("deleteModel", {"modelId": "m"})
    await until(lambda: copy_of(two).deleted_at is not None)
    two.check()


async def level(network: Network, one: ReplicatingRack, two: ReplicatingRack) -> None:
    """Until each has taken in what the other has. A cursor that one records moves its head, of which nobody is told."""
    while True:
        tell_heads(network, one, two)
        await asyncio.sleep(0.02)
        if is_level(two, one)() and is_level(one, two)():
            return


def records(*racks: ReplicatingRack) -> tuple[int, ...]:
    """How many each has written; the marks of its journal, of which one ends each pause, are none."""
    return tuple(rack.registry.journal.stats().records for rack in racks)


async def test_racks_at_rest_write_nothing(start: Start, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "_RECORD_S", 0.0)
    one, two = await pair(start)
    await one.store_bytes("m", "1", b"x")
    await until(here(two))
    written = (0, 0)
    while written != (written := records(one, two)):  # the last cursors are recorded
        await level(network, one, two)
        await asyncio.sleep(0.3)
    for _ in range(20):
        await level(network, one, two)
    assert records(one, two) == written
    network.calls.clear()
    await asyncio.sleep(0.2)
    assert network.calls == [], "they wait for a hint, or a minute"


async def test_a_rack_that_lost_registry_and_storage_is_compared_though_its_epoch_is_the_first_again(
    start: Start,
    network: Network,
    tmp_path: Any,
) -> None:
    one, two = await pair(start)
    for number in range(3):
        await one.store_bytes(f"old-{number}", "1", b"x")
        await until(here(two, f"old-{number}"))
    await one.close()
    one = await start("rack-1", folder=tmp_path / "anew", peers=("rack-2",), replication_factor=2)
    network.lost_hints = 1000
    for number in range(10):
        await one.store_bytes(f"new-{number}", "1", b"x")
    network.lost_hints = 0
    tell_heads(network, one)
    for number in range(10):
        await until(here(two, f"new-{number}"))
    assert copy_of(two, "old-0").deleted_at is not None
