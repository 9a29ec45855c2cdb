"""The journal in the rack's storage: it follows the registry through any trouble, which can be made of it."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import ModelManagerError
from tests.rack import LocalRack
from tests.registry_view import compact_here, view, view_after_boot
from worker.journal import Until
from worker.journal.format import TAIL_BYTES
from worker.storage.blobstore import BlobStore
from worker.storage.disk import DiskStore
from worker.storage.memory import MemoryStore
from worker.upkeep.archive import Archive, ArchiveAhead, ArchiveObserver
from worker.upkeep.archive_layout import Piece, covering
from worker.upkeep.ownership import NotOwner, take_ownership
from worker.upkeep.rebuild import CannotRebuild, Rebuilt, archives, rebuild

RACK = "rack-1"


class Died(BaseException):
    """The process ends here."""


class TroubledStore(MemoryStore):
    """Does something before each call that changes or asks."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Callable[[str], None] = lambda call: None

    async def put(self, key: str, *arguments: Any, **named: Any) -> Any:
        self.before("put")
        try:
            return await super().put(key, *arguments, **named)
        finally:
            self.before("put answered")

    async def delete(self, key: str) -> None:
        self.before("delete")
        await super().delete(key)

    async def get_document(self, name: str) -> Any:
        self.before("get_document")
        return await super().get_document(name)

    async def put_document(self, name: str, data: bytes, *, etag: str | None) -> Any:
        self.before("put_document")
        stored = await super().put_document(name, data, etag=etag)
        self.before("put_document answered")
        return stored

    async def list(self, prefix: str) -> AsyncIterator[Any]:
        self.before("list")
        async for stat in super().list(prefix):
            yield stat


def dying_at(fatal: int) -> Callable[[str], None]:
    calls = itertools.count(1)

    def die(call: str) -> None:
        if next(calls) == fatal:
            raise Died

    return die


class Clock:
    def __init__(self) -> None:
        self.now = 1_790_000_000.0

    def __call__(self) -> float:
        return self.now


def archive_of(rack: LocalRack, **options: Any) -> Archive:
    return Archive(rack.registry.journal, rack.store, rack=RACK, **options)


async def own(rack: LocalRack) -> None:
    journal = rack.registry.journal
    await take_ownership(rack.store, rack=RACK, registry_id=journal.registry_id, epoch=journal.epoch)


async def opened(folder: Path, store: BlobStore | None = None) -> LocalRack:
    rack = LocalRack(folder, store=store).open()
    await own(rack)
    return rack


async def rebuilt(store: BlobStore, folder: Path, until: Until | None = None, epoch: int | None = None) -> Rebuilt:
    return await rebuild(
        store,
        folder,
        rack=RACK,
        until=until or Until(),
        epoch=epoch,
        patience_s=0,
        progress=lambda step, done, total: None,
    )


async def some_history(rack: LocalRack, chance: random.Random, steps: int) -> None:
    """Stores, deletes, aliases; rotations and compactions between them."""
    for _ in range(steps):
        model, version = f"net-{chance.randrange(4)}", f"1.{chance.randrange(40)}.0"
        step = chance.random()
        try:
            if step < 0.55:
                await rack.store_bytes(model, version, chance.randbytes(20))
            elif step < 0.7:
                await rack.call("deleteModel", {"modelId": model, "version": version, "purge": chance.random() < 0.5})
            elif step < 0.85:
                await rack.call("setAlias", {"modelId": model, "alias": "stable", "version": version})
            elif step < 0.93:
                await rack.registry.journal.rotate()
            elif step < 0.96 and not rack.registry.journal.superseded.held:
                await compact_here(rack.registry)
        except ModelManagerError as error:
            assert error.code in ("ERR_MODEL_NOT_FOUND", "ERR_MODEL_ALREADY_EXISTS")


async def test_after_a_round_the_registry_can_be_made_of_the_store_alone(tmp_path: Path) -> None:
    rack = await opened(tmp_path)
    await some_history(rack, random.Random(1), 60)
    await rack.clean_up.round()
    archive = archive_of(rack)
    await archive.begin()
    await archive.round()
    head, before = rack.registry.journal.head, view(rack.registry)
    assert (archive.head, archive.lag_s) == (head, 0.0)
    await rack.registry.close()
    shutil.rmtree(tmp_path / "registry")

    done = await rebuilt(rack.store, tmp_path / "registry")
    assert (done.journal.epoch, done.from_epoch, done.journal.head) == (2, 1, head)
    assert (done.missing_versions, done.unknown_blobs) == (0, 0)
    assert await view_after_boot(tmp_path / "registry") == before
    await rack.store.close()


@pytest.mark.parametrize("seed", range(4))
async def test_every_point_that_was_archived_can_be_reached_again(tmp_path: Path, seed: int) -> None:
    """The registry at a sequence is what it was when that sequence was the last."""
    rack = await opened(tmp_path, MemoryStore())
    archive, chance = archive_of(rack), random.Random(seed)
    await archive.begin()
    states: dict[int, dict[str, Any]] = {}
    for _ in range(25):
        await some_history(rack, chance, 3)
        states[rack.registry.journal.head] = view(rack.registry)
        if chance.random() < 0.6:
            await archive.round()
    await archive.round()
    await rack.registry.close()
    for number, (sequence, state) in enumerate(states.items()):
        await rebuilt(rack.store, tmp_path / str(number), Until(sequence=sequence), epoch=1)
        assert await view_after_boot(tmp_path / str(number)) == state


async def test_a_writer_that_dies_at_any_call_leaves_what_the_next_one_completes(tmp_path: Path) -> None:
    for fatal in itertools.count(1):
        folder = tmp_path / str(fatal)
        store = TroubledStore()
        rack = await opened(folder, store)
        archive, died = archive_of(rack), False
        store.before = dying_at(fatal)
        try:
            await archive.begin()
            for step in range(4):
                await rack.store_bytes("net", f"1.{step}.0", bytes([step]))
                if step == 1:
                    await rack.registry.journal.rotate()
                if step == 2:
                    await compact_here(rack.registry)
                await archive.round()
        except Died:
            died = True
        store.before = lambda call: None
        again = archive_of(rack)
        await again.begin()
        await again.round()
        assert again.head == rack.registry.journal.head
        await rack.registry.close()
        await rebuilt(store, folder / "rebuilt")
        assert await view_after_boot(folder / "rebuilt") == await view_after_boot(folder / "registry")
        if not died:
            assert fatal > 20
            return


async def test_a_store_that_is_away_is_caught_up_with(tmp_path: Path) -> None:
    store = TroubledStore()
    rack = await opened(tmp_path, store)
    clock = Clock()
    archive = archive_of(rack, clock=clock)
    await archive.begin()
    await archive.round()
    assert archive.lag_s == 0.0

    def away(call: str) -> None:
        raise ModelManagerError("ERR_STORAGE_UNAVAILABLE")

    await rack.store_bytes("net", "1.0.0", b"bytes")
    store.before = away
    for _ in range(3):
        clock.now += 60
        with pytest.raises(ModelManagerError, match="ERR_STORAGE_UNAVAILABLE"):
            await archive.round()
    assert archive.lag_s == 180.0

    chance = random.Random(3)

    def flaky(call: str) -> None:
        if chance.random() < 0.2:
            raise ModelManagerError("ERR_STORAGE_UNAVAILABLE")

    store.before = flaky
    for _ in range(60):
        try:
            await archive.round()
        except ModelManagerError:
            continue
        await rack.registry.journal.rotate()
    store.before = lambda call: None
    await archive.round()
    assert (archive.head, archive.lag_s) == (rack.registry.journal.head, 0.0)
    await rack.registry.close()
    await rebuilt(store, tmp_path / "rebuilt")
    assert await view_after_boot(tmp_path / "rebuilt") == await view_after_boot(tmp_path / "registry")


@pytest.mark.parametrize("gone", [0, 1, 2])
async def test_a_segment_that_is_gone_from_the_archive_is_shipped_again(tmp_path: Path, gone: int) -> None:
    store = MemoryStore()
    rack = await opened(tmp_path, store)
    archive = archive_of(rack)
    await archive.begin()
    for step in range(3):
        await rack.store_bytes("net", f"1.{step}.0", bytes([step]))
        await rack.registry.journal.rotate()
        await archive.round()
    before = view(rack.registry)
    del store.blobs[sorted(key for key in store.blobs if key.startswith("journal/"))[gone]]
    with pytest.raises(CannotRebuild, match="gone from the storage"):
        await rebuilt(store, tmp_path / "too-early")
    again = archive_of(rack)
    await again.begin()
    await again.round()
    assert again.head == rack.registry.journal.head
    await rack.registry.close()
    await rebuilt(store, tmp_path / "rebuilt", epoch=1)
    assert await view_after_boot(tmp_path / "rebuilt") == before


async def test_a_base_that_is_gone_from_the_archive_is_shipped_again(tmp_path: Path) -> None:
    store = MemoryStore()
    rack = await opened(tmp_path, store)
    archive = archive_of(rack)
    await archive.begin()
    for step in range(3):
        await rack.store_bytes("net", f"1.{step}.0", bytes([step]))
    await compact_here(rack.registry)
    await archive.round()
    before = view(rack.registry)
    del store.blobs[next(key for key in store.blobs if "base-" in key)]
    again = archive_of(rack)
    await again.begin()
    await again.round()
    await rack.registry.close()
    assert any("base-" in key for key in store.blobs)
    await rebuilt(store, tmp_path / "rebuilt", epoch=1)
    assert await view_after_boot(tmp_path / "rebuilt") == before


async def test_the_last_archived_bytes_alone_are_read_to_see_whose_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    rack = await opened(tmp_path, store)
    await rack.store_bytes("net", "1.0.0", b"bytes")
    await rack.registry.journal.rotate()
    archive = archive_of(rack)
    await archive.begin()
    await archive.round()
    for key in [key for key in store.documents if "/tail/" in key]:
        del store.documents[key]
    lengths = []
    read_at = store.read_at

    async def watched(key: str, offset: int, length: int) -> bytes:
        lengths.append(length)
        return await read_at(key, offset, length)

    monkeypatch.setattr(store, "read_at", watched)
    await archive_of(rack).begin()
    assert lengths == [TAIL_BYTES]
    await rack.registry.close()


async def test_a_folder_that_cannot_be_read_for_a_while_does_not_end_the_archiving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rack = await opened(tmp_path, MemoryStore())
    await rack.store_bytes("net", "1.0.0", b"bytes")
    seen = Rounds()
    archive = archive_of(rack, period_s=0.01, observe=seen)
    await archive.begin()
    open_files = Path.open

    def refused(path: Path, *arguments: Any, **named: Any) -> Any:
        if path.parent == tmp_path / "registry":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return open_files(path, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refused)
        archiving = asyncio.create_task(archive.run())
        await eventually(lambda: archiving.done() or len(seen.errors) > 2)
        assert not archiving.done()
        await archive.finish(1)
    assert seen.errors[:3] == ["ERR_STORAGE_UNAVAILABLE"] * 3
    await eventually(lambda: archive.lag_s == 0.0 and archive.head == rack.registry.journal.head)
    archiving.cancel()
    await asyncio.wait([archiving])
    await rack.close()


class Rounds(ArchiveObserver):
    def __init__(self) -> None:
        self.errors: list[str | None] = []

    def round_ended(self, seconds: float, error: str | None) -> None:
        self.errors.append(error)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_what_is_published_while_another_looks_is_not_taken_for_useless(tmp_path: Path) -> None:
    store = TroubledStore()
    rack = await opened(tmp_path, store)
    await archive_of(rack).begin()
    await rack.store_bytes("net", "1.0.0", b"bytes")
    await rack.registry.journal.rotate()
    late, other = archive_of(rack), archive_of(rack)
    await other.begin()
    looking = asyncio.Event()
    looked = asyncio.Event()
    get_document = store.get_document

    async def slow(name: str) -> Any:
        found = await get_document(name)
        if not looking.is_set():
            looking.set()
            await looked.wait()
        return found

    store.get_document = slow  # type: ignore[method-assign]
    looks = asyncio.create_task(late.begin())
    await looking.wait()
    await other.round()
    looked.set()
    await looks
    named = {f"journal/1/{each.file.name}" for each in (await archives(store))[1].manifest.files}
    assert named
    assert named <= set(store.blobs)
    await rack.registry.close()


async def test_a_tail_has_few_pieces_however_often_it_grows(tmp_path: Path) -> None:
    rack = await opened(tmp_path, MemoryStore())
    archive = archive_of(rack)
    await archive.begin()
    for number in range(200):
        await rack.store_bytes("net", f"1.{number}.0", b"x")
        await archive.round()
    pieces = [stat.key async for stat in rack.store.list("journal/1/tail/")]
    assert 1 <= len(pieces) <= 10
    await rack.registry.close()


async def test_an_older_copy_of_the_folder_is_told_from_its_successor(tmp_path: Path) -> None:
    rack = await opened(tmp_path)
    await rack.store_bytes("net", "1.0.0", b"one")
    await rack.registry.close()
    shutil.copytree(tmp_path / "registry", tmp_path / "copy")

    rack = LocalRack(tmp_path).open()
    await rack.store_bytes("net", "2.0.0", b"two")
    archive = archive_of(rack)
    await archive.begin()
    await archive.round()
    await rack.registry.close()

    shutil.rmtree(tmp_path / "registry")
    shutil.copytree(tmp_path / "copy", tmp_path / "registry")
    rack = LocalRack(tmp_path).open()
    with pytest.raises(ArchiveAhead, match="where the folder has ended"):
        await archive_of(rack).begin()
    # Also once it has grown past the other.
    for number in range(5):
        await rack.store_bytes("other", f"1.{number}.0", b"other")
    with pytest.raises(ArchiveAhead, match="other records"):
        await archive_of(rack).begin()
    await rack.close()


async def test_what_no_point_in_reach_needs_is_forgotten(tmp_path: Path) -> None:
    rack = await opened(tmp_path, MemoryStore())
    clock = Clock()
    archive = archive_of(rack, clock=clock, keep_s=1000.0)
    await archive.begin()

    async def files() -> set[str]:
        return {stat.key async for stat in rack.store.list("journal/1/")} - {"journal/1/MANIFEST"}

    await rack.store_bytes("net", "1.0.0", b"one")
    await rack.registry.journal.rotate()
    await archive.round()
    first = await files()
    await rack.store_bytes("net", "1.1.0", b"two")
    await compact_here(rack.registry)
    await archive.round()
    assert first & await files(), "the points before the base are still in reach"
    clock.now += 1001
    await archive.round()
    kept = await files()
    assert sorted(name.split("/")[2][:4] for name in kept) == ["base", "tail"]
    await rack.registry.close()
    done = await rebuilt(rack.store, tmp_path / "rebuilt")
    assert done.versions == 2


async def test_an_older_epoch_is_forgotten_once_the_new_one_is_old_enough(tmp_path: Path) -> None:
    store, clock = MemoryStore(), Clock()
    rack = await opened(tmp_path, store)
    await rack.store_bytes("net", "1.0.0", b"one")
    await archive_of(rack).round()
    await rack.registry.close()
    shutil.rmtree(tmp_path / "registry")
    await rebuilt(store, tmp_path / "registry")
    rack = LocalRack(tmp_path, store=store).open()
    archive = archive_of(rack, clock=clock, keep_s=1000.0)
    clock.now += 10**9
    await archive.begin()
    assert [stat.key async for stat in store.list("journal/1/")]
    await archive.round()
    assert [stat.key async for stat in store.list("journal/1/")] == []
    await rack.registry.close()
    assert (await rebuilt(store, tmp_path / "again")).from_epoch == 2


async def test_the_old_registry_can_never_own_the_storage_again(tmp_path: Path) -> None:
    rack = await opened(tmp_path)
    await rack.store_bytes("net", "1.0.0", b"one")
    await archive_of(rack).round()
    await rebuilt(rack.store, tmp_path / "elsewhere")
    for take_over in (False, True):
        with pytest.raises(NotOwner, match="epoch 2"):
            await take_ownership(
                rack.store,
                rack=RACK,
                registry_id=rack.registry.journal.registry_id,
                epoch=1,
                take_over=take_over,
            )
    await rack.close()


class GatedStore(MemoryStore):
    """Whoever reads the archive's pieces first waits until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: asyncio.Event | None = None
        self.let_go = asyncio.Event()

    async def get_document(self, name: str) -> Any:
        if "/tail/" in name and self.waiting is not None and not self.waiting.is_set():
            self.waiting.set()
            await self.let_go.wait()
        return await super().get_document(name)


async def test_of_two_rebuilds_at_once_the_one_that_began_last_makes_a_registry(tmp_path: Path) -> None:
    store = GatedStore()
    rack = await opened(tmp_path, store)
    await rack.store_bytes("net", "1.0.0", b"one")
    await archive_of(rack).round()
    await rack.registry.close()
    store.waiting = asyncio.Event()
    first = asyncio.create_task(rebuilt(store, tmp_path / "first"))
    await store.waiting.wait()
    done = await rebuilt(store, tmp_path / "second")
    store.let_go.set()
    with pytest.raises(NotOwner, match=r"epoch 3; this one is .*, epoch 2"):
        await first
    assert done.journal.epoch == 3
    assert not list((tmp_path / "first").glob("*.jsonl"))
    assert (await view_after_boot(tmp_path / "second"))["versions"].keys() == {"net"}


async def test_a_registry_that_takes_over_goes_on_in_a_higher_epoch(tmp_path: Path) -> None:
    """Else a reader of changes would take the one for the other, and the archives would mix."""
    store = MemoryStore()
    first = await opened(tmp_path / "first", store)
    await first.store_bytes("net", "1.0.0", b"one")
    await archive_of(first).round()
    second = LocalRack(tmp_path / "second", store=store)
    second.registry.open()
    journal = second.registry.journal
    owner = await take_ownership(
        store,
        rack=RACK,
        registry_id=journal.registry_id,
        epoch=journal.epoch,
        take_over=True,
        raise_epoch=journal.raise_epoch,
    )
    assert (owner.epoch, journal.epoch) == (2, 2)
    second.registry.start()
    second.readiness.set("registry", True)
    await second.store_bytes("other", "1.0.0", b"two")
    await archive_of(second).round()
    for rack in (first, second):
        await rack.registry.close()
    assert (await view_after_boot(tmp_path / "second" / "registry"))["versions"].keys() == {"other"}
    assert {int(stat.key.split("/")[1]) async for stat in store.list("journal/")} == {1, 2}


async def test_versions_without_bytes_are_told_and_quarantined_by_the_worker(tmp_path: Path) -> None:
    rack = await opened(tmp_path)
    await rack.store_bytes("net", "1.0.0", b"one")
    await rack.store_bytes("net", "2.0.0", b"two")
    await archive_of(rack).round()
    await rack.store_bytes("later", "1.0.0", b"not archived")
    entry = rack.registry.catalog.find("net", "1.0.0")
    assert entry is not None
    await rack.store.delete(entry.files[0]["key"])
    await rack.close()
    shutil.rmtree(tmp_path / "registry")

    store = DiskStore(tmp_path / "models")
    done = await rebuilt(store, tmp_path / "registry")
    assert (done.missing_versions, done.missing) == (1, ("net:1.0.0",))
    assert (done.unknown_blobs, done.unknown_bytes) == (1, len(b"not archived"))
    rack = LocalRack(tmp_path, store=store).open()
    async with asyncio.timeout(10):
        while (found := rack.registry.catalog.find("net", "1.0.0")) is None or not found.quarantined:
            await asyncio.sleep(0.02)
    assert (await rack.call("getModel", {"modelId": "net", "version": "2.0.0"}))["success"]
    await rack.close()


async def test_a_folder_with_records_is_never_replaced(tmp_path: Path) -> None:
    rack = await opened(tmp_path)
    await rack.store_bytes("net", "1.0.0", b"one")
    await archive_of(rack).round()
    await rack.registry.close()
    with pytest.raises(CannotRebuild, match="1 records"):
        await rebuilt(rack.store, tmp_path / "registry")
    assert (await view_after_boot(tmp_path / "registry"))["versions"].keys() == {"net"}
    await rack.store.close()


async def test_without_an_archive_or_before_its_beginning_nothing_is_made(tmp_path: Path) -> None:
    store = MemoryStore()
    with pytest.raises(CannotRebuild, match="no archive"):
        await rebuilt(store, tmp_path / "none")
    rack = await opened(tmp_path, store)
    await rack.store_bytes("net", "1.0.0", b"one")
    await archive_of(rack).round()
    with pytest.raises(CannotRebuild, match="so far"):
        await rebuilt(store, tmp_path / "none", Until(time_ms=1))
    with pytest.raises(CannotRebuild, match="epoch 7"):
        await rebuilt(store, tmp_path / "none", epoch=7)
    await rack.registry.close()


def test_pieces_that_overlap_are_covered_by_the_largest(tmp_path: Path) -> None:
    assert covering([Piece(0, 5), Piece(5, 7), Piece(0, 7), Piece(7, 9)]) == [Piece(0, 7), Piece(7, 9)]
    assert covering([Piece(0, 5), Piece(6, 7)]) == [Piece(0, 5)]
    assert covering([Piece(3, 5)]) == []
