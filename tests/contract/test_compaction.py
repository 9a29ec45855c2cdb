"""Compaction keeps all that the catalog, the change feed and repeated requests need, and a boot stays the same."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from schemas.journal import Idempotency
from tests.registry_view import view
from worker.catalog.requests import RememberedRequest, RememberedRequests
from worker.journal import Base, Entry, Files, Journal, JournalDamaged, SealedFile, verify
from worker.journal.manifest import read_manifest, segment_first
from worker.registry import Change, Registry
from worker.upkeep.compaction import Compaction
from worker.upkeep.compaction_child import compact

DAY_MS = 24 * 3600 * 1000
NOW_S = 1_800_000_000.0
NAME = "base-0000000099.jsonl"


def store(model: str, version: str, number: int, **more: Any) -> dict[str, Any]:
    sha256 = f"{number % 50:064x}"  # some share their bytes
    return {
        "model": model,
        "version": version,
        "type": ("onnx", "gguf")[number % 2],
        "files": [
            {
                "path": "model.bin",
                "size": 10 + number % 50,
                "sha256": sha256,
                "mediaType": "application/octet-stream",
                "key": f"blobs/{number % 50:026d}",
            }
        ],
        "metadata": {"type": "onnx", "version": version, "tags": [f"tag-{number % 5}"]},
        "checksum": sha256,
        "size": 10 + number % 50,
        "created": 1_700_000_000_000 + number,
        "origin": "rack-1",
        "replicas": [],
        **more,
    }


def update(model: str, version: str, number: int) -> dict[str, Any]:
    return {
        "model": model,
        "version": version,
        "checksum": "0" * 64,
        "size": 10,
        "metadata": {"type": "onnx", "version": version, "tags": [f"tag-{number % 7}"], "note": number},
        "replicas": ["rack-2"],
        "aliases": [],
        "state": ("available", "quarantined")[number % 2],
        "revision": number,
        "created": 0,
    }


class History:
    """Random operations that fit what came before, as records."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._live: dict[tuple[str, str], str] = {}
        self._purged: list[tuple[str, str]] = []
        self._number = 0
        self._uploads: list[str] = []

    def next(self) -> tuple[str, dict[str, Any]]:
        self._number += 1
        chosen = self._random.choice(["store"] * 4 + ["update"] * 6 + ["delete", "restore", "purge", "alias", "job"])
        found = [key for key, state in self._live.items() if state == ("deleted" if chosen != "delete" else "live")]
        if chosen == "update":
            found = list(self._live)
        if chosen in ("delete", "restore", "purge", "update") and not found:
            chosen = "store"
        return getattr(self, f"_{chosen}")(found)

    def _store(self, _: list[tuple[str, str]]) -> tuple[str, dict[str, Any]]:
        model, version = f"org/Model-{self._random.randrange(12)}", f"{self._number}.0"
        if self._purged and self._random.random() < 0.3:
            model, version = self._purged.pop()
        self._live[(model, version)] = "live"
        idem = {"key": f"request-{self._number}", "hash": "h"}
        return "store", store(model, version, self._number, idem=idem)

    def _update(self, found: list[tuple[str, str]]) -> tuple[str, dict[str, Any]]:
        return "update", update(*self._random.choice(found), self._number)

    def _delete(self, found: list[tuple[str, str]]) -> tuple[str, dict[str, Any]]:
        model = self._random.choice(found)[0]
        versions = [version for name, version in found if name == model][:3]
        for version in versions:
            self._live[(model, version)] = "deleted"
        return "delete", {
            "model": model,
            "versions": versions,
            "whole": False,
            "replicas": [],
            "deleted": self._number,
            "until": self._number + 10**15,
        }

    def _restore(self, found: list[tuple[str, str]]) -> tuple[str, dict[str, Any]]:
        model, version = self._random.choice(found)
        self._live[(model, version)] = "live"
        return "restore", {"model": model, "versions": [version], "whole": False, "replicas": []}

    def _purge(self, found: list[tuple[str, str]]) -> tuple[str, dict[str, Any]]:
        model, version = self._random.choice(found)
        del self._live[(model, version)]
        self._purged.append((model, version))
        return "purge", {"model": model, "versions": [version]}

    def _alias(self, _: list[tuple[str, str]]) -> tuple[str, dict[str, Any]]:
        if not self._live:
            return self._store([])
        model, version = self._random.choice(list(self._live))
        target = None if self._random.random() < 0.3 else version
        return "alias", {"model": model, "alias": self._random.choice("ab"), "version": target, "previous": None}

    def _job(self, _: list[tuple[str, str]]) -> tuple[str, dict[str, Any]]:
        return "job.begin", {"job": f"job-{self._number}", "method": "validateModel", "params": {}, "created": 0}


def opened(folder: Path) -> Registry:
    registry = Registry(folder)
    registry.open()
    return registry


def seen_after_boot(folder: Path) -> dict[str, Any]:
    registry = opened(folder)
    try:
        return view(registry)
    finally:
        asyncio.run(registry.close())


async def append(registry: Registry, op: str, record: dict[str, Any]) -> Entry:
    entry = await registry.transact(record.get("model", "-"), lambda: Change(op, record))
    assert isinstance(entry, Entry)
    return entry


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    registry = opened(tmp_path / "registry")
    registry.start()
    yield registry
    await registry.close()


@pytest.mark.parametrize("seed", range(6))
def test_any_history_is_the_same_before_and_after_compaction_and_at_each_boot(tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "registry"
    history = History(seed)

    async def live() -> dict[str, Any]:
        registry = opened(folder)
        registry.start()
        for _ in range(3):
            for _ in range(120):
                await append(registry, *history.next())
            before = view(registry)
            await Compaction(registry).compact()
            assert view(registry) == before
        for _ in range(40):
            await append(registry, *history.next())
        seen = view(registry)
        await registry.close()
        return seen

    seen = asyncio.run(live())
    assert verify(folder).damage is None
    assert seen_after_boot(folder) == seen  # from the index
    (index,) = folder.glob("*.idx")
    data = bytearray(index.read_bytes())
    data[len(data) // 2] ^= 1
    index.write_bytes(data)
    assert seen_after_boot(folder) == seen  # from the base, since the index does not check
    index.unlink()
    assert seen_after_boot(folder) == seen


async def test_what_is_written_while_it_runs_is_kept(registry: Registry) -> None:
    for number in range(300):
        await append(registry, "store", store(f"before-{number}", "1", number))
    compacting = asyncio.create_task(Compaction(registry).compact())
    number = 300
    while not compacting.done():
        await append(registry, "store", store(f"meanwhile-{number}", "1", number))
        number += 1
    await compacting
    assert number > 301
    assert registry.catalog.totals.versions == number
    assert registry.catalog.resolve("meanwhile-300", "1").sequence > 300
    assert verify(registry.journal.folder).damage is None


async def test_superseded_records_go_and_with_them_the_bytes(registry: Registry) -> None:
    await append(registry, "store", store("m", "1", 1))
    for number in range(500):
        await append(registry, "update", update("m", "1", number))
    before = registry.journal.stats()
    await Compaction(registry).compact()
    after = registry.journal.stats()
    assert (before.records, after.records) == (501, 2)
    assert after.bytes < before.bytes / 50
    assert registry.catalog.resolve("m", "1").revision == 499
    assert sum(path.stat().st_size for path in registry.journal.folder.glob("*.jsonl")) == after.bytes


async def test_the_feed_gives_what_is_left_with_the_sequences_it_had(registry: Registry) -> None:
    kept = [await append(registry, "store", store(f"m-{number}", "1", number)) for number in range(5)]
    await append(registry, "update", update("m-1", "1", 1))
    last = await append(registry, "update", update("m-1", "1", 2))
    await Compaction(registry).compact()
    assert registry.journal.changes_from == 0  # nothing was taken away, so that any reader may go on
    assert registry.journal.read(0, 100) == [*kept, last]
    assert registry.journal.read(kept[2].sequence, 100) == [*kept[3:], last]
    later = await append(registry, "store", store("later", "1", 9))
    assert registry.journal.read(last.sequence, 100) == [later]


class WatchedFiles(Files):
    """Something is done once before a file is opened to be read."""

    def __init__(self) -> None:
        self.before: dict[str, Callable[[], object]] = {}

    def reader(self, path: Path) -> BinaryIO:
        self.before.pop(path.name, lambda: None)()
        return super().reader(path)


@pytest.mark.parametrize(
    "read",
    [
        lambda journal, entries: journal.read(0, 100),
        lambda journal, entries: [journal.entry(entry.sequence) for entry in entries],
        lambda journal, entries: [
            Entry(entry.sequence, entry.time_ms, entry.op, journal.record(entry.sequence)[0]) for entry in entries
        ],
    ],
    ids=["read", "entry", "record"],
)
async def test_a_reader_goes_on_in_the_base_when_compaction_takes_its_files_away(
    tmp_path: Path, read: Callable[[Journal, list[Entry]], list[Entry]]
) -> None:
    files = WatchedFiles()
    journal = Journal.open(tmp_path, replay=lambda _: None, files=files)
    journal.start(lambda _: None)
    entries = []
    for number in range(5):
        entries.append(await journal.append("store", store(f"m-{number}", "1", number)))
        await journal.rotate()

    async def compact_it() -> None:
        await journal.adopt(await asyncio.to_thread(compact, tmp_path, NAME))

    loop = asyncio.get_running_loop()
    (third,) = (name for name in journal.durable.manifest.names if segment_first(name) == entries[2].sequence - 1)
    files.before[third] = lambda: asyncio.run_coroutine_threadsafe(compact_it(), loop).result(30)
    assert await asyncio.to_thread(read, journal, entries) == entries
    assert journal.durable.manifest.base is not None
    await journal.close()


async def test_a_file_that_is_gone_without_a_compaction_is_an_error(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, replay=lambda _: None)
    journal.start(lambda _: None)
    entry = await journal.append("put", {})
    (tmp_path / journal.durable.manifest.active).unlink()
    with pytest.raises(FileNotFoundError):
        journal.read(0, 100)
    with pytest.raises(FileNotFoundError):
        journal.record(entry.sequence)
    await journal.close()


def written(folder: Path, *records: tuple[float, str, dict[str, Any]]) -> None:
    """A journal with these records, each written at that time (days before now)."""
    clock = [0.0]

    async def write() -> None:
        journal = Journal.open(folder, replay=lambda _: None, clock=lambda: clock[0])
        journal.start(lambda _: None)
        for days, op, record in records:
            clock[0] = NOW_S - days * 24 * 3600
            await journal.append(op, record)
        await journal.close()

    asyncio.run(write())


def compacted(folder: Path) -> Registry:
    async def run() -> None:
        registry = opened(folder)
        registry.start()
        await Compaction(registry).compact()
        await registry.close()

    asyncio.run(run())
    return opened(folder)


def deletion(model: str) -> dict[str, Any]:
    return {"model": model, "versions": ["1"], "whole": False, "replicas": [], "deleted": 5}


def test_a_tombstone_is_kept_for_thirty_days_and_readers_behind_one_that_went_are_told(tmp_path: Path) -> None:
    written(
        tmp_path,
        (90, "store", store("old", "1", 1)),
        (40, "delete", deletion("old")),
        (39, "store", store("young", "1", 2)),
        (20, "delete", deletion("young")),
        (0, "store", store("here", "1", 3)),
    )
    registry = compacted(tmp_path)
    assert [(entry.op, entry.record["model"]) for entry in registry.journal.read(0, 100)] == [
        ("delete", "young"),
        ("store", "here"),
    ]
    assert registry.journal.changes_from == 3  # the delete of "old"
    asyncio.run(registry.close())


def test_a_request_is_remembered_for_a_day(tmp_path: Path) -> None:
    def request(days: float) -> tuple[float, str, dict[str, Any]]:
        idem = {"key": f"days-{days}", "hash": "h"}
        return days, "update", {**update("m", "1", int(days * 10)), "idem": idem}

    written(tmp_path, (3, "store", store("m", "1", 1)), request(2), request(0.5), request(0.1), (0, *request(0)[1:]))
    registry = compacted(tmp_path)
    assert registry.catalog.requests.get("days-2") is None
    known = registry.catalog.requests.get("days-0.5")
    assert known is not None
    assert registry.journal.entry(known.sequence).record["idem"]["key"] == "days-0.5"
    asyncio.run(registry.close())


def test_a_request_of_yesterday_whose_record_compaction_dropped_is_unknown(tmp_path: Path) -> None:
    idem: Idempotency = {"key": "nightly", "hash": "h"}
    written(
        tmp_path,
        (1.5, "store", store("m", "1", 1)),
        (1.2, "update", {**update("m", "1", 1), "idem": idem}),
        (0, "update", update("m", "1", 2)),
    )

    async def run() -> None:
        registry = opened(tmp_path)
        registry.start()
        assert (await registry.recorded(idem)) is not None
        await Compaction(registry).compact()
        assert (await registry.recorded(idem)) is None
        await registry.close()

    asyncio.run(run())


def test_requests_of_yesterday_are_forgotten_all_at_once() -> None:
    requests = RememberedRequests()
    for number in range(100):
        requests.add(f"old-{number}", RememberedRequest("h", number, 0))
    requests.add("new", RememberedRequest("h", 100, 2 * DAY_MS))
    assert len(requests) == 1


def test_jobs_that_ended_a_week_ago_go_and_those_that_go_on_stay(tmp_path: Path) -> None:
    def job(name: str) -> dict[str, Any]:
        return {"job": name, "method": "validateModel", "params": {}, "created": 0}

    written(
        tmp_path,
        (60, "job.begin", job("goes-on")),
        (60, "job.begin", job("long-over")),
        (50, "job.end", {"job": "long-over", "state": "succeeded"}),
        (6, "job.begin", job("just-over")),
        (5, "job.end", {"job": "just-over", "state": "succeeded"}),
        (0, "store", store("m", "1", 1)),
    )
    registry = compacted(tmp_path)
    assert sorted(registry.catalog.jobs) == ["goes-on", "just-over"]
    assert not registry.catalog.jobs["goes-on"].ended
    asyncio.run(registry.close())


# --- a crash between any two steps ---


def filled(folder: Path) -> dict[str, Any]:
    """A registry with some segments, closed; what it says."""
    history = History(3)

    async def fill() -> dict[str, Any]:
        registry = opened(folder)
        registry.start()
        for _ in range(200):
            await append(registry, *history.next())
        await registry.journal.rotate()
        seen = view(registry)
        await registry.close()
        return seen

    return asyncio.run(fill())


def written_only(folder: Path) -> None:
    compact(folder, NAME)


def index_renamed(folder: Path) -> None:
    compact(folder, NAME)
    index = folder / "base-0000000099.idx.tmp"
    index.rename(index.with_suffix(""))


def both_renamed(folder: Path) -> None:
    index_renamed(folder)
    (folder / f"{NAME}.tmp").rename(folder / NAME)


def adopted_and_nothing_removed(folder: Path) -> None:
    aside = folder.parent / "before"
    shutil.copytree(folder, aside)

    async def run() -> None:
        registry = opened(folder)
        registry.start()
        await Compaction(registry).compact()
        await registry.close()

    asyncio.run(run())
    for path in aside.glob("seg-*"):
        if not (folder / path.name).exists():
            shutil.copy(path, folder)


@pytest.mark.parametrize("crashed", [written_only, index_renamed, both_renamed, adopted_and_nothing_removed])
def test_a_crash_at_any_step_leaves_the_same_catalog_and_a_tidy_folder(
    tmp_path: Path, crashed: Callable[[Path], None]
) -> None:
    folder = tmp_path / "registry"
    seen = filled(folder)
    crashed(folder)
    assert seen_after_boot(folder) == seen
    assert verify(folder).damage is None
    names = {path.name for path in folder.iterdir()}
    bases = {name for name in names if name.startswith("base-")}
    assert len(bases) == (2 if crashed is adopted_and_nothing_removed else 0)
    assert not {name for name in names if name.endswith(".tmp")}
    assert "aside" not in names


async def test_a_base_that_is_not_what_was_written_is_not_adopted(registry: Registry) -> None:
    for number in range(20):
        await append(registry, "store", store(f"m-{number}", "1", number))
    manifest = await registry.journal.rotate()
    base = await asyncio.to_thread(compact, registry.journal.folder, NAME)
    path = registry.journal.folder / f"{NAME}.tmp"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="read back"):
        await registry.journal.adopt(base)
    assert registry.journal.stats().generation == manifest.generation
    wrong = Base(SealedFile(**{**vars_of(base.file), "lines": 3}), base.stands_for, 0)
    with pytest.raises(ValueError, match="read back"):
        await registry.journal.adopt(wrong)


def vars_of(file: SealedFile) -> dict[str, Any]:
    return {name: getattr(file, name) for name in ("name", "size", "lines", "crc32", "sha256")}


def test_each_damaged_byte_of_a_base_refuses_the_boot(tmp_path: Path) -> None:
    filled(tmp_path)
    asyncio.run(compacted(tmp_path).close())
    (base,) = tmp_path.glob("base-*.jsonl")
    whole = base.read_bytes()
    for place in range(0, len(whole), 997):
        base.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(JournalDamaged):
            opened(tmp_path)
        assert verify(tmp_path).damage is not None
    base.write_bytes(whole)
    asyncio.run(opened(tmp_path).close())


def test_an_index_with_any_damage_is_not_used(tmp_path: Path) -> None:
    seen = filled(tmp_path)
    asyncio.run(compacted(tmp_path).close())
    (index,) = tmp_path.glob("*.idx")
    whole = index.read_bytes()
    header = whole.index(b"\n") + 1
    for place in [*range(0, header, 5), *range(header, len(whole), 499)]:
        index.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
        assert seen_after_boot(tmp_path) == seen


def test_verify_holds_each_sealed_file_against_what_manifest_says_of_it(tmp_path: Path) -> None:
    filled(tmp_path)
    manifest = read_manifest(Files(), tmp_path)
    sealed = dataclasses.replace(manifest.sealed[0], sha256="f" * 64)
    dataclasses.replace(manifest, sealed=(sealed, *manifest.sealed[1:])).publish(Files(), tmp_path)
    damage = verify(tmp_path).damage
    assert damage is not None
    assert damage.path == sealed.name


async def test_a_record_that_rotted_since_the_boot_is_reported_and_never_given_out(registry: Registry) -> None:
    entry = await append(registry, "store", store("m", "1", 1))
    journal = registry.journal
    assert journal.record(entry.sequence)[0] == entry.record
    (segment,) = journal.folder.glob("seg-*.jsonl")
    segment.write_bytes(segment.read_bytes().replace(b'"size":11', b'"size":19'))
    with pytest.raises(JournalDamaged):
        journal.record(entry.sequence)
