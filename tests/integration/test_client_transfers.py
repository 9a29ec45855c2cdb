"""Push and pull against a peer that misbehaves: what arrives is right, or nothing arrives and the error says why."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from schemas.errors import ModelManagerError
from tests.transfer_peer import TOKEN, TransferPeer, transfer_peer
from worker.client.client import ModelManagerClient
from worker.client.http_caller import HttpCaller
from worker.client.transfer import LANES, sha256_of


def a_model(folder: Path, *sizes: int) -> dict[str, bytes]:
    """A folder of files of random bytes, the second one in a subfolder."""
    contents = {("sub/" if number == 1 else "") + f"file-{number}.bin": os.urandom(n) for number, n in enumerate(sizes)}
    for path, data in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return contents


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def client_of(peer: TransferPeer, token: str | None = TOKEN) -> ModelManagerClient:
    return ModelManagerClient(HttpCaller(peer.url, token), timeout_s=10)


# --- push ---


@pytest.mark.parametrize("part_size", [None, 65_536], ids=["whole", "in parts"])
async def test_a_folder_is_pushed_byte_for_byte(tmp_path: Path, part_size: int | None) -> None:
    contents = a_model(tmp_path / "model", 3_000_000, 65_536, 1, 0)
    if part_size is not None:
        del contents["file-3.bin"]  # an empty file has no parts: an object store's rack takes it whole
        (tmp_path / "model/file-3.bin").unlink()
    async with transfer_peer(tmp_path / "rack", part_size=part_size) as peer, client_of(peer) as client:
        reply = await client.push(tmp_path / "model", "m", "1.0.0", metadata={"type": "custom"})
        assert reply["created"]
        assert read(tmp_path / "rack") == contents
        assert peer.seen["getJob"] == 2, "the job is waited for"


async def test_four_pieces_are_sent_at_once(tmp_path: Path) -> None:
    contents = a_model(tmp_path / "model", *[1000] * LANES * 2)
    async with transfer_peer(tmp_path / "rack") as peer, client_of(peer) as client:
        peer.together = asyncio.Barrier(LANES)
        await client.push(tmp_path / "model", "m", "1.0.0", metadata={"type": "custom"})
        assert read(tmp_path / "rack") == contents


async def test_bytes_that_the_rack_has_are_not_sent(tmp_path: Path) -> None:
    a_model(tmp_path / "model", 1000, 2000)
    async with transfer_peer(tmp_path / "rack") as peer, client_of(peer) as client:
        peer.present = {"file-0.bin"}
        a_model(tmp_path / "rack", 1)
        await client.push(tmp_path / "model", "m", "1.0.0", metadata={"type": "custom"})
        assert peer.seen["put"] == 1


@pytest.mark.parametrize("part_size", [None, 65_536], ids=["whole", "in parts"])
@pytest.mark.parametrize("faults", [["expired"], ["cut", "cut", "expired"]], ids=lambda faults: "+".join(faults))
async def test_a_piece_that_fails_is_sent_again_to_a_new_address(
    tmp_path: Path, part_size: int | None, faults: list[str]
) -> None:
    contents = a_model(tmp_path / "model", 300_000)
    async with transfer_peer(tmp_path / "rack", part_size=part_size) as peer, client_of(peer) as client:
        peer.faults = list(faults)
        done: list[tuple[int, int]] = []
        await client.push(
            tmp_path / "model",
            "m",
            "1.0.0",
            metadata={"type": "custom"},
            progress=lambda step, count, total: done.append((count, total)) if step == "Sending" else None,
        )
        assert read(tmp_path / "rack") == contents
        assert peer.faults == []
        assert peer.seen["getUpload"] or peer.seen["signed"] > 5
        assert done[-1] == (300_000, 300_000), "what was sent twice counts once"


async def test_what_the_rack_lost_before_it_was_verified_is_sent_again(tmp_path: Path) -> None:
    contents = a_model(tmp_path / "model", 1000)
    async with transfer_peer(tmp_path / "rack") as peer, client_of(peer) as client:
        peer.forget_once = True
        await client.push(tmp_path / "model", "m", "1.0.0", metadata={"type": "custom"})
        assert read(tmp_path / "rack") == contents


async def test_a_push_that_cannot_succeed_aborts_its_upload(tmp_path: Path) -> None:
    a_model(tmp_path / "model", 1000)
    async with transfer_peer(tmp_path / "rack") as peer, client_of(peer) as client:
        peer.faults = ["expired"] * 5
        with pytest.raises(ModelManagerError):
            await client.push(tmp_path / "model", "m", "1.0.0", metadata={"type": "custom"})
        assert peer.aborted
        assert not peer.seen["storeModel"]


async def test_a_file_that_shrinks_while_it_is_sent_is_told(tmp_path: Path) -> None:
    a_model(tmp_path / "model", 1_000_000)

    def shrink(step: str, done: int, total: int, /) -> None:
        if step == "Sending":
            os.truncate(tmp_path / "model/file-0.bin", 10)

    async with transfer_peer(tmp_path / "rack") as peer, client_of(peer) as client:
        with pytest.raises(ModelManagerError, match="became shorter") as caught:
            await client.push(tmp_path / "model", "m", "1.0.0", metadata={"type": "custom"}, progress=shrink)
        assert caught.value.code == "ERR_CHECKSUM_MISMATCH"


async def test_a_retried_effect_keeps_its_idempotency_key(tmp_path: Path) -> None:
    a_model(tmp_path / "model", 10)
    async with transfer_peer(tmp_path / "rack") as peer, client_of(peer) as client:
        peer.faults = ["busy", "busy"]
        await client.push(tmp_path / "model", "m", "1.0.0", metadata={"type": "custom"})
        assert len(peer.keys) == 3
        assert len(set(peer.keys)) == 1


# --- pull ---


async def test_a_folder_is_pulled_byte_for_byte_and_only_once(tmp_path: Path) -> None:
    contents = a_model(tmp_path / "rack", 3_000_000, 5, 0)
    async with transfer_peer(tmp_path / "rack") as peer, client_of(peer) as client:
        pulled = await client.pull("m", None, tmp_path / "here")
        assert read(tmp_path / "here") == contents
        assert all(file.fetched for file in pulled.files)
        assert peer.seen["get"] == 2, "an empty file needs no transfer"
        again = await client.pull("m", None, tmp_path / "here")
        assert not any(file.fetched for file in again.files)
        assert peer.seen["get"] == 2


@pytest.mark.parametrize("faults", [["cut"], ["cut", "expired"], ["cut", "whole"]], ids=lambda faults: "+".join(faults))
async def test_an_interrupted_transfer_goes_on(tmp_path: Path, faults: list[str]) -> None:
    contents = a_model(tmp_path / "rack", 3_000_000)
    async with transfer_peer(tmp_path / "rack") as peer, client_of(peer) as client:
        peer.faults = list(faults)
        done: list[int] = []
        await client.pull("m", None, tmp_path / "here.bin", progress=lambda step, count, total: done.append(count))
        assert (tmp_path / "here.bin").read_bytes() == contents["file-0.bin"]
        assert peer.faults == []
        assert peer.seen["ranges"] == (0 if "whole" in faults else 1)
        assert done[-1] == 3_000_000


async def test_what_an_earlier_pull_left_is_gone_on_with(tmp_path: Path) -> None:
    contents = a_model(tmp_path / "rack", 3_000_000)
    (tmp_path / "here.bin.partial").write_bytes(contents["file-0.bin"][:1_000_000])
    async with transfer_peer(tmp_path / "rack") as peer, client_of(peer) as client:
        await client.pull("m", None, tmp_path / "here.bin")
        assert (tmp_path / "here.bin").read_bytes() == contents["file-0.bin"]
        assert peer.seen["ranges"] == 1


async def test_wrong_bytes_of_an_earlier_pull_are_fetched_again(tmp_path: Path) -> None:
    contents = a_model(tmp_path / "rack", 3_000_000)
    (tmp_path / "here.bin.partial").write_bytes(b"stale" * 100)
    async with transfer_peer(tmp_path / "rack") as peer, client_of(peer) as client:
        await client.pull("m", None, tmp_path / "here.bin")
        assert (tmp_path / "here.bin").read_bytes() == contents["file-0.bin"]


async def test_wrong_bytes_leave_nothing_and_are_told(tmp_path: Path) -> None:
    a_model(tmp_path / "rack", 3_000_000)
    async with transfer_peer(tmp_path / "rack") as peer, client_of(peer) as client:
        peer.faults = ["wrong"]
        with pytest.raises(ModelManagerError) as caught:
            await client.pull("m", None, tmp_path / "here/model.bin")
        assert caught.value.code == "ERR_CHECKSUM_MISMATCH"
        assert read(tmp_path / "here") == {}


async def test_another_file_in_the_place_is_replaced_only_by_force(tmp_path: Path) -> None:
    contents = a_model(tmp_path / "rack", 100, 100)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/file-0.bin").write_bytes(b"mine")
    async with transfer_peer(tmp_path / "rack") as peer, client_of(peer) as client:
        with pytest.raises(ModelManagerError) as caught:
            await client.pull("m", None, tmp_path / "here")
        assert caught.value.code == "ERR_CONFLICT"
        assert peer.seen["get"] == 0, "nothing is fetched before the conflict is told"
        assert read(tmp_path / "here") == {"file-0.bin": b"mine"}
        await client.pull("m", None, tmp_path / "here", force=True)
        assert read(tmp_path / "here") == contents


async def test_a_link_does_not_lead_a_pull_out_of_its_folder(tmp_path: Path) -> None:
    a_model(tmp_path / "rack", 100, 100)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here/sub").symlink_to(tmp_path / "elsewhere")
    async with transfer_peer(tmp_path / "rack") as peer, client_of(peer) as client:
        with pytest.raises(ModelManagerError, match="through a link"):
            await client.pull("m", None, tmp_path / "here", force=True)
        assert read(tmp_path / "elsewhere") == {}


async def test_a_file_called_partial_is_not_taken_for_anothers_beginning(tmp_path: Path) -> None:
    (tmp_path / "rack").mkdir()
    (tmp_path / "rack/model").write_bytes(os.urandom(1000))
    (tmp_path / "rack/model.partial").write_bytes(os.urandom(2000))
    async with transfer_peer(tmp_path / "rack") as peer, client_of(peer) as client:
        await client.pull("m", None, tmp_path / "here")
        assert read(tmp_path / "here") == read(tmp_path / "rack")


@contextlib.contextmanager
def another_pull(partial: Path) -> Iterator[None]:
    """Another process that is writing there."""
    with partial.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


async def test_a_pull_does_not_write_where_another_one_is_writing(tmp_path: Path) -> None:
    contents = a_model(tmp_path / "rack", 3_000_000)
    partial = tmp_path / "here.bin.partial"
    async with transfer_peer(tmp_path / "rack") as peer, client_of(peer) as client:
        with another_pull(partial):
            partial.write_bytes(contents["file-0.bin"][:1_000_000])
            with pytest.raises(ModelManagerError, match="Another pull is writing") as caught:
                await client.pull("m", None, tmp_path / "here.bin", force=True)
            assert caught.value.code == "ERR_CONFLICT"
            assert partial.stat().st_size == 1_000_000
        assert peer.seen["get"] == 0
        await client.pull("m", None, tmp_path / "here.bin")
        assert (tmp_path / "here.bin").read_bytes() == contents["file-0.bin"]


async def test_a_file_that_another_pull_has_just_published_is_not_written_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = a_model(tmp_path / "rack", 3_000_000)
    here, partial, others = tmp_path / "here.bin", tmp_path / "here.bin.partial", b"another version"
    partial.write_bytes(others)
    lock = fcntl.flock

    def once_published(descriptor: int, operation: int) -> None:
        if partial.stat().st_size:
            partial.rename(tmp_path / "published")
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", once_published)
    async with transfer_peer(tmp_path / "rack") as peer, client_of(peer) as client:
        await client.pull("m", None, here)
    assert here.read_bytes() == contents["file-0.bin"]
    assert (tmp_path / "published").read_bytes() == others


async def test_a_pull_that_is_cancelled_does_not_stand_in_the_way_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = a_model(tmp_path / "rack", 3_000_000)
    locking, lock = asyncio.Event(), fcntl.flock
    loop = asyncio.get_running_loop()

    def slowly(descriptor: int, operation: int) -> None:
        loop.call_soon_threadsafe(locking.set)
        time.sleep(0.1)
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", slowly)
    async with transfer_peer(tmp_path / "rack") as peer, client_of(peer) as client:
        first = asyncio.create_task(client.pull("m", None, tmp_path / "here.bin"))
        await locking.wait()
        first.cancel()
        await asyncio.wait([first])
        await client.pull("m", None, tmp_path / "here.bin")
    assert (tmp_path / "here.bin").read_bytes() == contents["file-0.bin"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
async def test_pulls_on_a_file_system_without_locks_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    contents = a_model(tmp_path / "rack", 3_000_000)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    here = tmp_path / "here/model.bin"
    async with transfer_peer(tmp_path / "rack") as peer, client_of(peer) as client:
        await asyncio.gather(*(client.pull("m", None, here) for _ in range(3)))
        assert read(tmp_path / "here") == {"model.bin": contents["file-0.bin"]}
        here.unlink()
        peer.faults = ["wrong"]
        with pytest.raises(ModelManagerError, match="checksum"):
            await client.pull("m", None, here)
        assert read(tmp_path / "here") == {}


async def test_one_file_goes_to_the_named_file_or_into_the_named_folder(tmp_path: Path) -> None:
    contents = a_model(tmp_path / "rack", 100)
    (tmp_path / "folder").mkdir()
    async with transfer_peer(tmp_path / "rack") as peer, client_of(peer) as client:
        await client.pull("m", None, tmp_path / "folder")
        await client.pull("m", None, tmp_path / "renamed")
    assert (tmp_path / "folder/file-0.bin").read_bytes() == contents["file-0.bin"]
    assert (tmp_path / "renamed").read_bytes() == contents["file-0.bin"]


async def test_the_token_goes_to_the_worker_and_to_nobody_else(tmp_path: Path) -> None:
    a_model(tmp_path / "rack", 100)
    async with transfer_peer(tmp_path / "rack") as peer:
        async with client_of(peer, token=None) as client:
            with pytest.raises(ModelManagerError) as caught:
                await client.pull("m", None, tmp_path / "here")
            assert caught.value.code == "ERR_UNAUTHORIZED"
        caller = HttpCaller(peer.url, TOKEN)
        assert caller.headers_for(peer.url + "/api/x") == {"Authorization": f"Bearer {TOKEN}"}
        assert caller.headers_for("https://store.example/x") == {}
        assert caller.headers_for(peer.url.replace("http:", "https:") + "/api/x") == {}


async def test_memory_stays_small_whatever_the_size(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"")
    os.truncate(tmp_path / "big", 200_000_000)
    tracemalloc.start()
    digest = await sha256_of(tmp_path / "big")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000
    assert digest == hashlib.sha256(bytes(200_000_000)).hexdigest()
