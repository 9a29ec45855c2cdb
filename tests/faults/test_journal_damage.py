"""What happens to the bytes of a journal: a torn write is cut, everything else refuses the boot, nothing is missed."""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.journal import Entry, Files, Journal, JournalDamaged, JournalObserver, dump, verify
from worker.journal.appender import Appender
from worker.journal.boot import recover
from worker.journal.format import encode
from worker.journal.reserve import Reserve

SECTOR = 512


def replayed(folder: Path, **options: Any) -> list[Entry]:
    """What a boot finds; the folder is free again afterwards."""
    entries: list[Entry] = []
    asyncio.run(Journal.open(folder, replay=entries.append, **options).close())
    return entries


def filled(
    folder: Path, batches: Sequence[int], *, text: str = "", segment_bytes: int = 2**26, mark: bool = True
) -> list[Entry]:
    """The records of a journal after batches of exactly these numbers of them; without `mark` as after a crash."""
    files, entries = Files(), []
    folder.mkdir(exist_ok=True)
    recovered = recover(files, folder, lambda _: None, time.time)
    reserve = Reserve(files, folder, size=0, clock=time.time)
    appender = Appender(
        files, folder, recovered, reserve, segment_bytes=segment_bytes, clock=time.time, observe=JournalObserver()
    )
    appender.prepare()
    for size in batches:
        records = [{"n": n, "text": text} for n in range(size)]
        first, time_ms = appender.append([encode("put", record) for record in records])
        entries += [Entry(first + n, time_ms, "put", record) for n, record in enumerate(records)]
        appender.rotate_if_due()
    if mark:
        appender.mark()
    appender.close()
    return entries


def active_file(folder: Path) -> Path:
    return max(folder.glob("seg-*.jsonl"))


def last_batch(folder: Path) -> tuple[int, int]:
    """Offset in the active file and sequence of the first line of the last batch."""
    data = active_file(folder).read_bytes()
    numbers = [int(line.split(b'"b":')[1].split(b",")[0]) for line in data.splitlines()]
    index = numbers.index(numbers[-1])
    return sum(map(len, data.splitlines(keepends=True)[:index])), numbers[-1]


def assert_refused(folder: Path) -> JournalDamaged:
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "LOCK"}
    with pytest.raises(JournalDamaged) as refused:
        Journal.open(folder, replay=lambda _: None)
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "LOCK"}
    assert after == before, "a refusal changes nothing"
    return refused.value


def test_a_cut_at_any_byte_of_the_active_file_leaves_exactly_the_lines_before_it(tmp_path: Path) -> None:
    filled(tmp_path / "whole", [1, 4, 2, 3])
    data = active_file(tmp_path / "whole").read_bytes()
    lines = list(dump(tmp_path / "whole"))
    ends = list(itertools.accumulate(map(len, data.splitlines(keepends=True))))
    folder = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", folder)
    path = active_file(folder)
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        if size < ends[0]:
            assert assert_refused(folder).offset == 0
            continue
        kept = sum(end <= size for end in ends)
        assert replayed(folder) == [line for line in lines[:kept] if line.op == "put"]
        assert path.read_bytes() == data[: ends[kept - 1]]
        torn = list(folder.glob("*.torn"))
        assert [copy.read_bytes() for copy in torn] == ([data[ends[kept - 1] : size]] if size > ends[kept - 1] else [])
        for copy in torn:
            copy.unlink()


@pytest.mark.parametrize("crashed", [False, True], ids=["closed", "crashed"])
def test_every_flipped_bit_is_reported_and_none_is_taken_for_a_torn_write(tmp_path: Path, crashed: bool) -> None:
    filled(tmp_path, [1, 3, 1, 2, 2, 1, 2], segment_bytes=600, mark=not crashed)
    paths = [tmp_path / "MANIFEST", *sorted(tmp_path.glob("seg-*.jsonl"))]
    assert len(paths) >= 3
    for path in paths:
        whole = path.read_bytes()
        damaged = bytearray(whole)
        for offset, bit in itertools.product(range(len(whole)), range(8)):
            damaged[offset] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(JournalDamaged) as refused:
                Journal.open(tmp_path, replay=lambda _: None)
            assert refused.value.path == path.name
            if bit == offset % 8:
                assert found_damage(tmp_path) == path.name
            damaged[offset] ^= 1 << bit
        path.write_bytes(whole)
    assert not list(tmp_path.glob("*.torn"))
    assert verify(tmp_path).damage is None


def found_damage(folder: Path) -> str | None:
    """The name of the file in which `verify` finds damage."""
    try:
        damage = verify(folder).damage
    except JournalDamaged as error:
        return error.path
    return damage.path if damage else None


def test_sectors_lost_from_the_last_batch_are_a_torn_write(tmp_path: Path) -> None:
    entries = filled(tmp_path / "whole", [1, 4, 60], text="x" * 100, mark=False)
    offset, sequence = last_batch(tmp_path / "whole")
    data = active_file(tmp_path / "whole").read_bytes()
    sectors = range(offset // SECTOR, (len(data) - 1) // SECTOR + 1)
    assert len(sectors) > 10
    choose = random.Random(1)
    for round_number in range(150):
        folder = tmp_path / "lost"
        shutil.copytree(tmp_path / "whole", folder)
        lost = bytearray(data)
        chosen = (
            [sectors[round_number]] if round_number < len(sectors) else choose.sample(sectors, choose.randint(1, 9))
        )
        for sector in chosen:
            start, end = max(offset, sector * SECTOR), min(len(data), (sector + 1) * SECTOR)
            lost[start:end] = bytes(end - start)
        active_file(folder).write_bytes(lost)
        found = replayed(folder)
        assert found == entries[: len(found)]
        assert len(found) >= sum(entry.sequence < sequence for entry in entries)
        assert len(found) < len(entries)
        shutil.rmtree(folder)


def test_a_sector_lost_from_any_earlier_batch_is_damage(tmp_path: Path) -> None:
    filled(tmp_path, [5] * 20, text="x" * 100)
    path = active_file(tmp_path)
    data = path.read_bytes()
    offset, _ = last_batch(tmp_path)
    for sector in range(offset // SECTOR):
        lost = bytearray(data)
        lost[sector * SECTOR : (sector + 1) * SECTOR] = bytes(SECTOR)
        path.write_bytes(lost)
        assert_refused(tmp_path)


def dropped(lines: list[bytes], index: int) -> list[bytes]:
    return lines[:index] + lines[index + 1 :]


def doubled(lines: list[bytes], index: int) -> list[bytes]:
    return lines[: index + 1] + lines[index:]


def swapped(lines: list[bytes], index: int) -> list[bytes]:
    return [*lines[:index], lines[index + 1], lines[index], *lines[index + 2 :]]


@pytest.mark.parametrize("change", [dropped, doubled, swapped])
def test_lines_that_are_dropped_doubled_or_swapped_are_damage(
    tmp_path: Path, change: Callable[[list[bytes], int], list[bytes]]
) -> None:
    filled(tmp_path, [1, 3, 2, 4, 1], segment_bytes=800)
    for path in sorted(tmp_path.glob("seg-*.jsonl")):
        lines = path.read_bytes().splitlines(keepends=True)
        # Dropping the very last line of a journal is a cut, and a cut between lines leaves a shorter journal.
        for index in range(len(lines) - 1):
            path.write_bytes(b"".join(change(lines, index)))
            assert_refused(tmp_path)
        path.write_bytes(b"".join(lines))
    assert verify(tmp_path).damage is None


def test_a_refusal_tells_the_file_the_byte_the_sequence_and_how_to_repair(tmp_path: Path) -> None:
    entries = filled(tmp_path, [1, 1, 1])
    path = active_file(tmp_path)
    data = path.read_bytes()
    offset = data.index(b'{"v":1,"seq":%d' % entries[1].sequence)
    path.write_bytes(data[: offset + 30] + b"?" + data[offset + 31 :])
    error = assert_refused(tmp_path)
    assert (error.path, error.offset, error.sequence) == (path.name, offset, entries[1].sequence)
    assert "proves that the line had been durable" in error.reason
    assert all(way in str(error) for way in ("backup", "model-manager rebuild", "model-manager journal repair"))
    assert str(tmp_path) not in str(error)
    report = verify(tmp_path)
    assert report.damage is not None
    assert (report.damage.offset, report.damage.sequence) == (offset, entries[1].sequence)
    assert (report.head, report.records) == (entries[0].sequence, 1)
    with pytest.raises(JournalDamaged):
        list(dump(tmp_path))


@pytest.mark.parametrize("name", ["MANIFEST", "first", "middle", "last"])
def test_a_missing_file_refuses(tmp_path: Path, name: str) -> None:
    filled(tmp_path, [3] * 6, segment_bytes=600)
    segments = sorted(tmp_path.glob("seg-*.jsonl"))
    missing = {"MANIFEST": tmp_path / "MANIFEST", "first": segments[0], "middle": segments[2], "last": segments[-1]}
    missing[name].unlink()
    assert assert_refused(tmp_path).path == missing[name].name


def test_an_older_manifest_refuses_since_it_would_hide_acknowledged_records(tmp_path: Path) -> None:
    filled(tmp_path, [3])
    older = (tmp_path / "MANIFEST").read_bytes()
    for _ in range(2):
        filled(tmp_path, [3], segment_bytes=400)
    newest = (tmp_path / "MANIFEST").read_bytes()
    assert newest != older
    (tmp_path / "MANIFEST").write_bytes(older)
    assert "MANIFEST" in assert_refused(tmp_path).reason
    assert verify(tmp_path).damage is not None
    (tmp_path / "MANIFEST").write_bytes(newest)
    assert len(replayed(tmp_path)) == 9


def test_a_file_of_another_registry_refuses(tmp_path: Path) -> None:
    filled(tmp_path / "one", [2])
    filled(tmp_path / "two", [2])
    shutil.copy(active_file(tmp_path / "two"), active_file(tmp_path / "one"))
    assert "another registry" in assert_refused(tmp_path / "one").reason


def test_after_a_cut_the_journal_goes_on_and_is_cut_again(tmp_path: Path) -> None:
    kept: list[Entry] = []
    for round_number in range(4):
        found = replayed(tmp_path)
        assert found == kept
        kept = found + filled(tmp_path, [2])
        with active_file(tmp_path).open("ab") as stream:
            stream.write(b'{"v":1,"seq":99' + bytes(round_number))
    assert replayed(tmp_path) == kept
    assert len(list(tmp_path.glob("*.torn"))) == 4
    assert verify(tmp_path).damage is None


class Recording(Files):
    """Remembers what was written, renamed and synced, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        self.calls.append(("pwrite", bytes(data), offset))
        return super().pwrite(fd, data, offset)

    def ftruncate(self, fd: int, size: int) -> None:
        self.calls.append(("ftruncate", size))
        super().ftruncate(fd, size)

    def fdatasync(self, fd: int) -> None:
        self.calls.append(("fdatasync",))
        super().fdatasync(fd)

    def rename(self, old: Path, new: Path) -> None:
        self.calls.append(("rename", new.name))
        super().rename(old, new)

    def fsync_dir(self, folder: Path) -> None:
        self.calls.append(("fsync_dir", folder.name))
        super().fsync_dir(folder)


def test_a_boot_writes_the_last_batch_again_since_the_cache_may_show_what_the_disk_lacks(tmp_path: Path) -> None:
    filled(tmp_path, [1, 5], mark=False)
    offset, _ = last_batch(tmp_path)
    data = active_file(tmp_path).read_bytes()
    files = Recording()
    replayed(tmp_path, files=files)
    assert files.calls[0] == ("ftruncate", len(data))
    assert files.calls[1:] == [("pwrite", data[offset:], offset), ("fdatasync",), ("fsync_dir", tmp_path.name)]
    assert active_file(tmp_path).read_bytes() == data


def steps(files: Recording) -> list[str]:
    return [" ".join(str(part) for part in call if isinstance(part, str)) for call in files.calls]


def test_a_rotation_makes_each_step_durable_before_the_next(tmp_path: Path) -> None:
    replayed(tmp_path)
    files = Recording()
    journal = Journal.open(tmp_path, replay=lambda _: None, files=files, segment_bytes=300)
    files.calls.clear()

    async def append() -> None:
        journal.start(lambda _: None)
        await journal.append("put", {"text": "x" * 300})
        await journal.close()

    asyncio.run(append())
    publish = ["pwrite", "fdatasync", "rename {}", f"fsync_dir {tmp_path.name}"]
    assert [step.format(f"seg-{4:020d}.jsonl") for step in publish] == steps(files)[4:8]
    assert steps(files)[:4] == ["pwrite", "fdatasync", "pwrite", "fdatasync"]
    assert [step.format("MANIFEST") for step in publish] == steps(files)[8:]
    assert b'"op":"put"' in files.calls[0][1]
    assert b'"op":"seal"' in files.calls[2][1]
    assert b'"op":"open"' in files.calls[4][1]


def test_a_new_journal_is_durable_with_the_names_of_the_folders_it_needed(tmp_path: Path) -> None:
    files = Recording()
    replayed(tmp_path / "data" / "registry", files=files)
    publish = ["pwrite", "fdatasync", "rename {}", "fsync_dir registry"]
    done = steps(files)
    assert done[done.index(f"fsync_dir {tmp_path.name}") :][:10] == [
        f"fsync_dir {tmp_path.name}",
        "fsync_dir data",
        *(step.format(f"seg-{1:020d}.jsonl") for step in publish),
        *(step.format("MANIFEST") for step in publish),
    ]


def test_the_bytes_of_a_torn_write_are_safe_before_they_are_cut(tmp_path: Path) -> None:
    filled(tmp_path, [1])
    path = active_file(tmp_path)
    size = path.stat().st_size
    with path.open("ab") as stream:
        stream.write(b'{"v":1')
    files = Recording()
    replayed(tmp_path, files=files)
    copied = ["pwrite", "fdatasync", f"rename {path.name}.{size}.torn", f"fsync_dir {tmp_path.name}"]
    assert steps(files) == [*copied, "ftruncate", "pwrite", "fdatasync", f"fsync_dir {tmp_path.name}"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\n\"é\0", max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.lists(st.lists(st.dictionaries(st.text("abc", max_size=2), json_values, max_size=3), max_size=5)),
    segment_bytes=st.integers(100, 3000),
    cut=st.floats(0, 1),
)
def test_any_records_cut_anywhere_replay_to_a_prefix_with_all_that_was_acknowledged_before_the_cut(
    tmp_path_factory: pytest.TempPathFactory, groups: list[list[dict[str, Any]]], segment_bytes: int, cut: float
) -> None:
    folder = tmp_path_factory.mktemp("journal")

    async def scenario() -> list[tuple[Entry, Path, int]]:
        journal = Journal.open(folder, replay=lambda _: None, segment_bytes=segment_bytes)
        journal.start(lambda _: None)
        acknowledged: list[tuple[Entry, Path, int]] = []
        for group in groups:
            entries = await asyncio.gather(*(journal.append("put", record) for record in group))
            acknowledged += [(entry, *place(folder, entry.sequence)) for entry in entries]
        await journal.close()
        return sorted(acknowledged, key=lambda item: item[0].sequence)

    acknowledged = asyncio.run(scenario())
    path = active_file(folder)
    opened = path.read_bytes().index(b"\n") + 1
    size = opened + round(cut * (path.stat().st_size - opened))
    path.write_bytes(path.read_bytes()[:size])
    found = replayed(folder)
    assert found == [entry for entry, _, _ in acknowledged[: len(found)]]
    assert len(found) == sum(file != path or end <= size for _, file, end in acknowledged)
    shutil.rmtree(folder)


def place(folder: Path, sequence: int) -> tuple[Path, int]:
    """The file in which a line is, and where it ends."""
    path = max(path for path in folder.glob("seg-*.jsonl") if int(path.stem[4:]) <= sequence)
    data = path.read_bytes()
    start = data.index(b'{"v":1,"seq":%d,' % sequence)
    return path, data.index(b"\n", start) + 1
