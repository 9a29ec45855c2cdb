"""Racks hold copies of what names them, and keep them what they are at their origin."""

from __future__ import annotations

import asyncio
import base64
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import ModelManagerError
from schemas.hints import head_hint
from tests.racks import Network, NetworkPeers, ReplicatingRack, until
from tests.registry_view import compact_here
from worker.replication import follower, puller
from worker.replication.replication import Replication
from worker.service import replicating
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

    async def start(name: str, *, folder: Path | None = None, **changed: Any) -> ReplicatingRack:
        kept = stores.setdefault(name, MemoryStore()) if folder is None else MemoryStore()
        rack = ReplicatingRack(network, name, folder or tmp_path / name, kept, **changed)
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
        return follower is not None and follower.after >= head and not +rack.registry.catalog.replicas.awaited

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


# --- bytes ---


async def test_a_transfer_that_breaks_goes_on_where_it_was(start: Start, network: Network) -> None:
    one, two = await pair(start)
    network.cut_after += [1000, 2000, 1]
    data = bytes(range(256)) * 100
    await one.store_bytes("m", "1", data)
    await until(here(two))
    assert network.fetched == [("rack-1", 0), ("rack-1", 1000), ("rack-1", 3000), ("rack-1", 3001)]
    assert await content(two) == data


async def content(rack: ReplicatingRack, model: str = "m", version: str = "1") -> bytes:
    reply = await rack.call("getModel", {"modelId": model, "version": version})
    return base64.b64decode(reply["modelData"])


async def test_what_the_origin_cannot_give_comes_from_another_rack_that_holds_it(
    start: Start, network: Network
) -> None:
    one = await start("rack-1", peers=("rack-2", "rack-3"), replication_factor=3)
    two = await start("rack-2", peers=("rack-1",))
    await one.store_bytes("m", "1", b"weights")
    await until(here(two))
    await rot(one, b"wrong!!")
    three = await start("rack-3", peers=("rack-1", "rack-2"))
    await until(here(three))
    assert await content(three) == b"weights"
    assert ("rack-2", 0) in network.fetched


async def rot(rack: ReplicatingRack, data: bytes, model: str = "m", version: str = "1", *, found: bool = False) -> None:
    """Spoil the bytes behind the rack's back; `found`: and have it look."""
    entry = rack.registry.catalog.find(model, version)
    assert entry is not None and isinstance(rack.store, MemoryStore)
    for file in entry.files:
        rack.store.blobs[file["key"]] = data
    if found:
        report = await rack.call("validateModel", {"modelId": model, "version": version, "waitMs": 5000})
        assert report["isValid"] is False


async def test_wrong_bytes_are_never_taken_for_a_copy(start: Start) -> None:
    one, two = await pair(start)
    await two.close()
    await one.store_bytes("m", "1", b"weights")
    await rot(one, b"wrong!!")
    two = await start("rack-2", peers=("rack-1",))
    await until(lambda: replication(two).puller.failing == 1)
    with pytest.raises(ModelManagerError) as refused:
        await two.call("getModel", {"modelId": "m", "version": "1"})
    assert refused.value.code == "ERR_MODEL_NOT_FOUND"
    details = refused.value.details
    assert (details["state"], details["origin"], details["size"]) == ("pending", "rack-1", 7)
    assert details["error"]["code"] == "ERR_CHECKSUM_MISMATCH"
    blobs = two.store.blobs  # type: ignore[attr-defined]
    assert not blobs
    await rot(one, b"wrong!!", found=True)
    await one.store_bytes("m", "1", b"weights")  # which mends it, and is a change of the version
    await until(here(two))
    assert await content(two) == b"weights"


def replication(rack: ReplicatingRack) -> Replication:
    assert rack.replication is not None
    return rack.replication


async def test_a_copy_that_goes_bad_is_brought_anew(start: Start) -> None:
    one, two = await pair(start)
    await one.store_bytes("m", "1", b"weights")
    await until(here(two))
    await rot(two, b"rotten!", found=True)
    await until(lambda: not copy_of(two).quarantined if copy_of(two) else False)
    assert two.registry.catalog.totals.versions == 1
    assert await content(two) == b"weights"


async def test_a_copy_that_was_found_bad_just_before_a_crash_is_brought_anew_after_it(start: Start) -> None:
    one, two = await pair(start)
    await one.store_bytes("m", "1", b"weights")
    await until(here(two))
    await two.stop_replicating()
    await rot(two, b"rotten!", found=True)
    await two.close()
    two = await start("rack-2", peers=("rack-1",))
    await until(lambda: copy_of(two) is not None and not copy_of(two).quarantined)
    assert await content(two) == b"weights"


async def test_files_that_versions_share_are_brought_once(start: Start, network: Network) -> None:
    one, two = await pair(start)
    await one.store_bytes("m", "1", b"weights")
    await until(here(two))
    await one.store_bytes("m", "2", b"weights")
    await until(here(two, "m", "2"))
    assert len(network.fetched) == 1
    assert len(two.store.blobs) == 1  # type: ignore[attr-defined]


async def test_bytes_that_were_here_and_have_gone_bad_are_brought(start: Start) -> None:
    header = b'{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    data = len(header).to_bytes(8, "little") + header + b"x"
    one, two = await pair(start)
    await two.store_bytes("mine", "1", data, type="safetensors")
    await rot(two, bytes(len(data)), "mine")  # nobody has noticed
    await one.store_bytes("m", "1", data, type="safetensors")
    await until(here(two))
    assert await content(two) == data


async def test_a_rack_refuses_what_it_would_refuse_to_store(
    start: Start, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(puller, "_RECORDED_BYTES", 1)
    one = await start("rack-1", peers=("rack-2",), replication_factor=2, allow_pickle=True)
    two = await start("rack-2", peers=("rack-1",), max_model_size=1000, formats=frozenset({"custom", "pytorch"}))
    refused = {"large": "ERR_MODEL_TOO_LARGE", "foreign": "ERR_UNSUPPORTED_FORMAT", "unsafe": "ERR_UNSAFE_MODEL"}
    await one.store_bytes("large", "1", bytes(1001))
    await one.store_bytes("foreign", "1", b"x", type="tensorflow")
    await until(lambda: replication(two).puller.failing == 2)
    assert network.fetched == [], "what it does not take is not brought"
    await one.store_bytes("unsafe", "1", pickle.dumps(object), type="pytorch")
    await one.store_bytes("fine", "1", b"x")
    await until(here(two, "fine", "1"))
    await until(lambda: replication(two).puller.failing == 3)
    assert {model: replication(two).puller.state_of(model, "1")["error"]["code"] for model in refused} == refused
    await two.clean_up.round()
    assert len(two.store.blobs) == 1, "nor kept"  # type: ignore[attr-defined]


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


async def test_a_pull_goes_on_after_a_restart(start: Start, network: Network) -> None:
    one, two = await pair(start)
    await two.close()
    await one.store_bytes("m", "1", b"weights")
    await rot(one, b"wrong!!")
    two = await start("rack-2", peers=("rack-1",))
    await until(lambda: replication(two).puller.failing == 1)
    await two.close()
    await rot(one, b"weights")
    two = await start("rack-2")
    await until(here(two))


async def store_parts(rack: ReplicatingRack, *contents: bytes) -> None:
    files = [{"path": f"part-{n}", "data": base64.b64encode(data).decode()} for n, data in enumerate(contents)]
    await rack.call("storeModel", {"modelId": "m", "metadata": {"type": "custom", "version": "1"}, "files": files})


async def test_of_a_version_that_breaks_off_no_file_is_brought_again(
    start: Start, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(puller, "_RECORDED_BYTES", 1)
    one, two = await pair(start)
    await two.close()
    contents = [bytes([number]) * 1000 for number in range(4)]
    await store_parts(one, *contents)
    third = one.registry.catalog.find("m", "1").files[2]["key"]  # type: ignore[union-attr]
    one.store.blobs[third] = b"wrong"  # type: ignore[attr-defined]
    two = await start("rack-2", peers=("rack-1",))
    await until(lambda: replication(two).puller.failing == 1)
    held = set(two.store.blobs)  # type: ignore[attr-defined]
    assert len(held) == 2
    assert replication(two).puller.state_of("m", "1")["received"] >= 2000
    # Neither a compaction nor the sweep of a restart takes what has come.
    await compact_here(two.registry)
    await two.close()
    two = await start("rack-2")
    await two.clean_up.sweep()
    assert held == set(two.store.blobs)  # type: ignore[attr-defined]
    await until(lambda: replication(two).puller.failing == 1)
    state = replication(two).puller.state_of("m", "1")
    assert 2000 <= state["received"] <= state["size"]
    one.store.blobs[third] = contents[2]  # type: ignore[attr-defined]
    network.fetched.clear()
    replication(two).puller.hurry("m", "1")
    await until(here(two))
    assert network.fetched == [("rack-1", 0)] * 2
    assert [two.store.blobs[file["key"]] for file in copy_of(two).files] == contents  # type: ignore[attr-defined]
    assert two.registry.catalog.blobs.bytes == 4000
    assert not two.registry.take_unwanted() & set(two.store.blobs)  # type: ignore[attr-defined]


async def test_without_room_for_all_of_a_version_nothing_of_it_is_kept(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(puller, "_RECORDED_BYTES", 1)
    one, two = await pair(start)
    put, left = two.store.put, [2]

    async def put_two(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise ModelManagerError("ERR_STORAGE_FULL")
        return await put(*args, **options)

    monkeypatch.setattr(two.store, "put", put_two)
    await store_parts(one, b"a", b"b", b"c")
    await until(lambda: replication(two).puller.failing == 1)
    await two.clean_up.round()
    assert not two.store.blobs  # type: ignore[attr-defined]
    assert replication(two).puller.state_of("m", "1")["error"]["code"] == "ERR_STORAGE_FULL"
    left[0] = 10
    replication(two).puller.hurry("m", "1")
    await until(here(two))


async def test_what_came_of_a_version_goes_with_it(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(puller, "_RECORDED_BYTES", 1)
    one, two = await pair(start)
    await two.close()
    await store_parts(one, b"first", b"second")
    second = one.registry.catalog.find("m", "1").files[1]["key"]  # type: ignore[union-attr]
    one.store.blobs[second] = b"wrong"  # type: ignore[attr-defined]
    two = await start("rack-2", peers=("rack-1",))
    await until(lambda: replication(two).puller.failing == 1)
    (key,) = two.store.blobs  # type: ignore[attr-defined]
    assert two.registry.wanted(key)
    await one.call("deleteModel", {"modelId": "m", "purge": True})
    await until(lambda: not two.registry.wanted(key))
    assert two.registry.take_unwanted() >= {key}
    assert len(two.registry.catalog.blobs) == 0


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


def tell_heads(network: Network, *racks: ReplicatingRack) -> None:
    for rack in racks:
        journal = rack.registry.journal
        network.tell(head_hint(rack=rack.name, epoch=journal.epoch, head=journal.head, time_ms=0))


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
