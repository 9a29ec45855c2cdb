"""Pulling: bytes come verified, from whoever holds them, and none that has come is brought again."""

from __future__ import annotations

import asyncio
import base64
import pickle
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
    pair,
    replication,
    rot,
    until,
)
from tests.registry_view import compact_here
from worker.replication import puller
from worker.upkeep.clean_up import CleanUp


async def test_a_transfer_that_breaks_goes_on_where_it_was(start: Start, network: Network) -> None:
    one, two = await pair(start)
    network.cut_after += [1000, 2000, 1]
    data = bytes(range(256)) * 100
    await one.store_bytes("m", "1", data)
    await until(here(two))
    assert network.fetched == [("rack-1", 0), ("rack-1", 1000), ("rack-1", 3000), ("rack-1", 3001)]
    assert await content(two) == data


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
    refused["m"] = refused["large"]
    await one.store_bytes("large", "1", bytes(1001))
    await store_parts(one, bytes(600), bytes(500))  # as "m"
    await one.store_bytes("foreign", "1", b"x", type="tensorflow")
    await until(lambda: replication(two).puller.failing == 3)
    assert network.fetched == [], "what it does not take is not brought"
    await one.store_bytes("unsafe", "1", pickle.dumps(object), type="pytorch")
    await one.store_bytes("fine", "1", b"x")
    await until(here(two, "fine", "1"))
    await until(lambda: replication(two).puller.failing == 4)
    assert {model: replication(two).puller.state_of(model, "1")["error"]["code"] for model in refused} == refused
    await two.clean_up.round()
    assert len(two.store.blobs) == 1, "nor kept"  # type: ignore[attr-defined]


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
    clean_up = CleanUp(two.registry, two.store, two.service.uploads, period_s=3600)
    cleaning = asyncio.create_task(clean_up.run())
    await asyncio.sleep(0.1)  # from here on it waits to be woken
    assert two.registry.wanted(key)
    await one.call("deleteModel", {"modelId": "m", "purge": True})
    await until(lambda: not two.store.blobs)  # type: ignore[attr-defined]
    cleaning.cancel()
    assert len(two.registry.catalog.blobs) == 0
