"""Racks hold copies of what names them, and keep them what they are at their origin."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import ModelManagerError
from tests.racks import Network, ReplicatingRack, until
from worker.storage.memory import MemoryStore

Start = Callable[..., Awaitable[ReplicatingRack]]


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
async def start(network: Network, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts a rack by its name, again on what it left."""
    stores: dict[str, MemoryStore] = {}
    started: list[ReplicatingRack] = []

    async def start(name: str, **changed: Any) -> ReplicatingRack:
        rack = ReplicatingRack(network, name, tmp_path / name, stores.setdefault(name, MemoryStore()), **changed)
        rack.open().start()
        started.append(rack)
        return rack

    yield start
    for rack in started:
        if network.racks.get(rack.name) is rack:
            await rack.close()


def copy_of(rack: ReplicatingRack, model: str = "m", version: str = "1") -> Any:
    """The version here, with its bytes, as soon as it is complete."""
    entry = rack.registry.catalog.find(model, version)
    if entry is None or rack.registry.catalog.replicas.pull_of(model, version) is not None:
        return None
    return entry


def here(rack: ReplicatingRack, model: str = "m", version: str = "1") -> Callable[[], bool]:
    return lambda: copy_of(rack, model, version) is not None


def is_level(rack: ReplicatingRack, origin: ReplicatingRack) -> Callable[[], bool]:
    """Whether all that the origin has recorded until now is taken in, and all bytes are here."""
    head = origin.registry.journal.head

    def level() -> bool:
        assert rack.replication is not None
        follower = rack.replication.followers.get(origin.name)
        return follower is not None and follower.after >= head and not rack.registry.catalog.replicas.awaited

    return level


async def pair(start: Start) -> tuple[ReplicatingRack, ReplicatingRack]:
    return (
        await start("rack-1", peers=("rack-2",), replication_factor=2),
        await start("rack-2", peers=("rack-1",), replication_factor=1),
    )


async def test_a_version_that_names_a_rack_is_copied_there(start: Start) -> None:
    one, two = await pair(start)
    stored = await one.store_bytes("org/m", "1.0", b"weights", tags=["x"], note=7)
    await until(here(two, "org/m", "1.0"))
    there = await one.call("getModelMetadata", {"modelId": "org/m"})
    copy = await two.call("getModelMetadata", {"modelId": "org/m"})
    keys = [file.pop("storageKey") for reply in (there, copy) for file in reply["files"]]
    assert copy == there and copy["origin"] == "rack-1" and copy["replicas"] == ["rack-2"]
    assert keys[0] == stored["storageKey"] != keys[1]
    reply = await two.call("getModel", {"modelId": "org/m"})
    assert reply["modelData"] == (await one.call("getModel", {"modelId": "org/m"}))["modelData"]


async def test_what_names_another_rack_is_not_copied(start: Start) -> None:
    one, two = await pair(start)
    three = await start("rack-3", peers=("rack-1", "rack-2"))
    await one.store_bytes("m", "1", b"weights")
    await until(here(two))
    await until(is_level(three, one))
    assert three.registry.catalog.find("m", "1") is None


async def test_a_copy_follows_its_original(start: Start) -> None:
    one, two = await pair(start)
    version = {"modelId": "m", "version": "1"}
    await one.store_bytes("m", "1", b"a")
    await one.store_bytes("m", "2", b"b")
    await until(here(two, "m", "1"))
    await until(here(two, "m", "2"))
    await one.call("updateModelMetadata", {**version, "metadata": {"stage": "prod"}})
    await one.call("setAlias", {"modelId": "m", "alias": "best", "version": "1"})
    await until(is_level(two, one))
    reply = await two.call("getModelMetadata", {"modelId": "m", "version": "best"})
    assert (reply["version"], reply["revision"], reply["metadata"]["stage"]) == ("1", 2, "prod")
    await one.call("setAlias", {"modelId": "m", "alias": "best", "version": "2"})
    await until(is_level(two, one))
    assert (await two.call("getModelMetadata", {"modelId": "m", "version": "best"}))["version"] == "2"
    await one.call("deleteAlias", {"modelId": "m", "alias": "best"})
    deleted = await one.call("deleteModel", version)
    await until(is_level(two, one))
    for gone in ("best", "1"):
        with pytest.raises(ModelManagerError, match=r"is deleted|has no version or alias"):
            await two.call("getModelMetadata", {"modelId": "m", "version": gone})
    entry = two.registry.catalog.find("m", "1")
    assert entry is not None and entry.restorable_until is not None
    with pytest.raises(ModelManagerError) as refused:
        await two.call("getModelMetadata", version)
    assert refused.value.details["restorableUntil"] == deleted["restorableUntil"]
    await one.call("restoreModel", version)
    await until(is_level(two, one))
    assert (await two.call("getModelMetadata", version))["metadata"]["stage"] == "prod"


async def test_what_is_purged_is_purged_everywhere(start: Start) -> None:
    one, two = await pair(start)
    await one.store_bytes("m", "1", b"a")
    await until(here(two))
    await one.call("deleteModel", {"modelId": "m", "version": "1", "purge": True})
    await until(is_level(two, one))
    assert two.registry.catalog.find("m", "1") is None
    await one.store_bytes("m", "1", b"other")
    await until(here(two))
    assert two.registry.catalog.find("m", "1").checksum == one.registry.catalog.find("m", "1").checksum
