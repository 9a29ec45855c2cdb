"""Racks hold copies of what names them, and keep them what they are at their origin."""

from __future__ import annotations

import asyncio

import pytest

from schemas.errors import ModelManagerError
from tests.racks import (
    Network,
    NetworkPeers,
    ReplicatingRack,
    Start,
    content,
    copy_of,
    here,
    is_level,
    pair,
    replication,
    rot,
    tell_heads,
    until,
)
from worker.replication import follower
from worker.service import replicating


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


# --- ownership ---


async def test_only_the_origin_changes_a_model(start: Start) -> None:
    one, two = await pair(start)
    await one.store_bytes("m", "1", b"a")
    await one.call("setAlias", {"modelId": "m", "alias": "best", "version": "1"})
    await until(here(two))
    await until(is_level(two, one))
    file = {"path": "f", "size": 1, "sha256": "sha256:" + "0" * 64}
    version = {"modelId": "m", "version": "1"}
    for method, params in {
        "storeModel": {"modelId": "m", "metadata": {"type": "custom", "version": "2"}, "modelData": "YQ=="},
        "updateModelMetadata": {**version, "metadata": {"x": 1}},
        "deleteModel": {"modelId": "m"},
        "restoreModel": version,
        "setAlias": {"modelId": "m", "alias": "best", "version": "1"},
        "deleteAlias": {"modelId": "m", "alias": "best"},
        "replicateModel": {**version, "peers": ["rack-3"]},
        "createUpload": {"modelId": "m", "version": "2", "files": [file]},
    }.items():
        head = two.registry.journal.head
        with pytest.raises(ModelManagerError) as refused:
            await two.call(method, params)
        assert (refused.value.code, refused.value.details["origin"]) == ("ERR_NOT_ORIGIN", "rack-1"), method
        assert two.registry.journal.head == head
    assert (await two.call("validateModel", {**version, "waitMs": 5000}))["isValid"]


async def test_a_rack_tells_others_of_its_own_models_only(start: Start) -> None:
    one, two = await pair(start)
    await one.store_bytes("m", "1", b"a")
    await until(here(two))
    await two.store_bytes("own", "1", b"b")
    changes = (await two.call("getChanges", {"epoch": 1, "after": 0}))["changes"]
    assert [change["subject"] for change in changes] == ["own"]


async def test_latest_is_the_same_version_everywhere(start: Start, network: Network) -> None:
    one, two = await pair(start)
    await two.close()
    for version in ("1", "2", "3"):
        await one.store_bytes("m", version, version.encode())
    await rot(one, b"?", "m", "2", found=True)  # so that it comes to rack-2 behind the others
    two = await start("rack-2", peers=("rack-1",))
    await until(here(two, "m", "1"))
    await until(here(two, "m", "3"))
    await one.store_bytes("m", "2", b"2")
    await until(here(two, "m", "2"))
    assert (await two.call("getModelMetadata", {"modelId": "m"}))["version"] == "3"
    await one.call("deleteModel", {"modelId": "m", "version": "3"})
    await until(is_level(two, one))
    assert (await two.call("getModelMetadata", {"modelId": "m"}))["version"] == "2"


# --- who was away ---


async def test_a_rack_catches_up_with_what_it_missed(start: Start, network: Network) -> None:
    one, two = await pair(start)
    for model in ("kept", "deleted", "purged"):
        await one.store_bytes(model, "1", model.encode())
    for model in ("kept", "deleted", "purged"):
        await until(here(two, model))
    await two.close()
    await one.call("deleteModel", {"modelId": "deleted"})
    await one.call("deleteModel", {"modelId": "purged", "purge": True})
    await one.store_bytes("new", "1", b"new")
    await one.call("updateModelMetadata", {"modelId": "kept", "metadata": {"x": 1}})
    network.calls.clear()
    two = await start("rack-2", peers=("rack-1",))
    await until(here(two, "new"))
    await until(is_level(two, one))
    assert ("rack-1", "listModels") not in network.calls, "the feed reaches back"
    assert (await two.call("getModelMetadata", {"modelId": "kept"}))["metadata"]["x"] == 1
    assert two.registry.catalog.find("purged", "1") is None
    assert two.registry.catalog.find("deleted", "1").deleted_at is not None  # type: ignore[union-attr]


async def test_a_rack_is_compared_page_by_page(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "_LISTED_AT_ONCE", 2)
    one = await start("rack-1", peers=("rack-2",), replication_factor=2)
    for number in range(7):
        await one.store_bytes(f"m{number}", "1", b"weights")
    two = await start("rack-2", peers=("rack-1",))
    for number in range(7):
        await until(here(two, f"m{number}"))


async def test_a_rack_that_is_named_need_not_know_who_names_it(start: Start) -> None:
    two = await start("rack-2", peers=())
    one = await start("rack-1", peers=())
    await one.store_bytes("m", "1", b"weights")
    await one.call("replicateModel", {"modelId": "m", "peers": ["rack-2"], "waitMs": 0})
    await until(here(two))


async def test_replicate_model_tells_when_the_copies_are_there(
    start: Start, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = await pair(start)
    await start("rack-3", peers=("rack-1",))
    network.away.add("rack-4")
    one.service.replicating.peers = NetworkPeers(network, "rack-1")
    await one.store_bytes("m", "1", b"weights")
    reply = await one.call("replicateModel", {"modelId": "m", "peers": ["rack-2", "rack-3"], "waitMs": 5000})
    assert (reply["totalPeers"], reply["successfulReplications"], reply["failedReplications"]) == (2, 2, 0)
    monkeypatch.setattr(replicating, "_QUIET_S", 0.2)
    reply = await one.call("replicateModel", {"modelId": "m", "peers": ["rack-2", "rack-4"], "waitMs": 5000})
    assert {each["peer"]: each["state"] for each in reply["results"]} == {"rack-2": "succeeded", "rack-4": "failed"}
    assert "rack-4" in (await one.call("getModelMetadata", {"modelId": "m"}))["replicas"]


# --- one id, two racks ---


async def apart(start: Start, network: Network) -> tuple[ReplicatingRack, ReplicatingRack]:
    """Two racks that store the same id while they cannot hear each other; the first rack does first."""
    one, two = await pair(start)
    network.away.add("rack-2")
    await one.store_bytes("m", "1", b"first")
    await asyncio.sleep(0.002)
    await two.store_bytes("m", "1", b"second")
    network.away.clear()
    tell_heads(network, one, two)
    return one, two


async def state_of(rack: ReplicatingRack, model: str = "m", version: str = "1") -> str:
    return str((await rack.call("getModelMetadata", {"modelId": model, "version": version}))["state"])


async def test_of_two_models_with_one_id_the_later_one_is_marked_and_kept(start: Start, network: Network) -> None:
    one, two = await apart(start, network)
    await until(lambda: two.registry.catalog.find("m", "1").state == "conflict")  # type: ignore[union-attr]
    assert (await content(one), await content(two)) == (b"first", b"second")
    assert await state_of(one) == "available"
    assert replication(two).state()["conflicts"] == 1 and replication(one).state()["conflicts"] == 0
    with pytest.raises(ModelManagerError) as refused:
        await two.store_bytes("m", "2", b"more")
    assert (refused.value.code, refused.value.details["origin"]) == ("ERR_CONFLICT", "rack-1")
    assert not (await two.store_bytes("m", "1", b"second"))["created"]
    await one.store_bytes("m", "2", b"more")


async def test_a_third_rack_holds_the_first_one_whichever_it_hears_of_first(start: Start, network: Network) -> None:
    one, two = await apart(start, network)
    network.away.add("rack-1")
    three = await start("rack-3", peers=("rack-1", "rack-2"))
    await two.call("replicateModel", {"modelId": "m", "peers": ["rack-3"], "waitMs": 0})
    await until(here(three))
    assert await content(three) == b"second"
    network.away.clear()
    await one.call("replicateModel", {"modelId": "m", "peers": ["rack-3"], "waitMs": 0})
    await until(lambda: here(three)() and copy_of(three).replica_of == "rack-1")
    assert await content(three) == b"first"
    await two.call("updateModelMetadata", {"modelId": "m", "metadata": {"x": 1}})
    await until(is_level(three, two))
    assert await content(three) == b"first"


async def test_a_marked_model_that_is_purged_makes_room_for_a_copy(start: Start, network: Network) -> None:
    one, two = await apart(start, network)
    await until(lambda: two.registry.catalog.find("m", "1").state == "conflict")  # type: ignore[union-attr]
    await until(is_level(two, one))  # nothing but the purge has it look again
    await two.call("deleteModel", {"modelId": "m", "purge": True})
    await until(here(two))
    assert await content(two) == b"first"


async def test_a_conflict_is_over_when_the_first_one_is_deleted(start: Start, network: Network) -> None:
    one, two = await apart(start, network)
    await until(lambda: two.registry.catalog.find("m", "1").state == "conflict")  # type: ignore[union-attr]
    await one.call("deleteModel", {"modelId": "m"})
    await until(lambda: two.registry.catalog.find("m", "1").state == "available")  # type: ignore[union-attr]
    await two.store_bytes("m", "2", b"more")
    await one.call("restoreModel", {"modelId": "m"})
    await until(lambda: two.registry.catalog.find("m", "2").state == "conflict")  # type: ignore[union-attr]
