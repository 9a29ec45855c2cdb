"""The journal as the rest of the program uses it, on real files."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from schemas.errors import ModelManagerError
from worker.journal import Entry, Files, Journal, JournalFailed, JournalLocked, JournalObserver, dump, verify


def reopened(folder: Path, **options: Any) -> tuple[Journal, list[Entry]]:
    entries: list[Entry] = []
    return Journal.open(folder, replay=entries.append, **options), entries


def named(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern))


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.02)


async def replayed(folder: Path, **options: Any) -> list[Entry]:
    """What a boot finds; the folder is free again afterwards."""
    journal, entries = reopened(folder, **options)
    await journal.close()
    return entries


async def filled(folder: Path, batches: Sequence[int], **options: Any) -> list[Entry]:
    """A closed journal with records in batches of about these sizes."""
    journal, _ = reopened(folder, **options)
    journal.start(lambda _: None)
    entries: list[Entry] = []
    for size in batches:
        start = len(entries)
        entries += await asyncio.gather(*(journal.append("put", {"n": start + i}) for i in range(size)))
    await journal.close()
    return sorted(entries, key=lambda entry: entry.sequence)


async def test_what_was_appended_is_replayed_in_order_and_equal(tmp_path: Path) -> None:
    entries = await filled(tmp_path / "deep" / "registry", [1, 5, 20])
    journal, found = reopened(tmp_path / "deep" / "registry")
    assert found == entries
    assert [entry.record["n"] for entry in found] == list(range(26))
    assert journal.head == entries[-1].sequence + 1
    await journal.close()


async def test_every_line_is_json_and_numbered_without_a_gap_over_all_segments(tmp_path: Path) -> None:
    await filled(tmp_path, [3] * 20, segment_bytes=1000)
    segments = named(tmp_path, "seg-*.jsonl")
    assert len(segments) > 3
    values = [json.loads(line) for path in segments for line in path.read_bytes().splitlines()]
    assert [value["seq"] for value in values] == list(range(1, len(values) + 1))
    assert [segment.name for segment in segments] == [
        f"seg-{value['seq']:020d}.jsonl" for value in values if value["op"] == "open"
    ]


async def test_a_stranger_can_check_the_chain_from_the_specification_alone(tmp_path: Path) -> None:
    await filled(tmp_path, [4] * 10, segment_bytes=1000)
    manifest = json.loads((tmp_path / "MANIFEST").read_bytes())
    crc = 0
    previous: dict[str, str] | None = None
    for file in manifest["files"]:
        data = (tmp_path / file["name"]).read_bytes()
        lines = data.splitlines(keepends=True)
        opened = json.loads(lines[0])["rec"]
        assert opened["previous"] == previous
        assert (opened["registryId"], opened["epoch"]) == (manifest["registryId"], manifest["epoch"])
        for line in lines:
            body, mark, tail = line.rpartition(b',"crc":"')
            crc = crc32(body, crc)
            assert mark + tail == b',"crc":"%08x"}\n' % crc
        if "size" in file:
            sealed = json.loads(lines[-1])
            assert sealed["op"] == "seal"
            assert sealed["rec"]["lines"] == len(lines) - 1
            assert (file["size"], file["lines"], file["crc32"]) == (len(data), len(lines), f"{crc32(data):08x}")
        previous = {"name": file["name"], "crc": f"{crc:08x}"}


async def test_a_batch_is_told_in_order_before_anybody_who_waits_for_it_goes_on(tmp_path: Path) -> None:
    journal, _ = reopened(tmp_path)
    told: list[Entry] = []
    journal.start(told.extend)

    async def writer(number: int) -> None:
        for step in range(20):
            entry = await journal.append("put", {"writer": number, "step": step})
            assert entry in told
            assert journal.head >= entry.sequence

    await asyncio.gather(*(writer(number) for number in range(16)))
    assert [entry.sequence for entry in told] == sorted(entry.sequence for entry in told)
    await journal.close()
    assert await replayed(tmp_path) == told


async def test_read_and_entry_reach_every_record_across_segments(tmp_path: Path) -> None:
    entries = await filled(tmp_path, [7] * 30, segment_bytes=1500)
    journal, _ = reopened(tmp_path, segment_bytes=1500)
    journal.start(lambda _: None)
    entries.append(await journal.append("put", {"n": "new"}))
    assert journal.stats().segments > 5
    assert journal.read(0, 10_000) == entries
    for index in range(0, len(entries), 13):
        assert journal.read(entries[index].sequence, 9) == entries[index + 1 : index + 10]
    by_sequence = {entry.sequence: entry for entry in entries}
    for sequence in range(journal.head + 3):
        if sequence in by_sequence:
            assert journal.entry(sequence) == by_sequence[sequence]
        else:
            with pytest.raises(KeyError):
                journal.entry(sequence)
    assert journal.read(journal.head, 5) == []
    await journal.close()


async def test_a_journal_that_is_finished_has_its_mark_and_keeps_the_folder_until_it_is_closed(tmp_path: Path) -> None:
    journal, _ = reopened(tmp_path)
    journal.start(lambda _: None)
    entry = await journal.append("put", {})
    await journal.finish()
    assert journal.durable.head == entry.sequence + 1
    assert journal.read(0, 10) == [entry]
    with pytest.raises(ModelManagerError, match="ERR_SHUTTING_DOWN"):
        await journal.append("put", {})
    with pytest.raises(JournalLocked):
        reopened(tmp_path)
    await journal.close()
    assert await replayed(tmp_path) == [entry]


async def test_a_second_opener_is_refused_and_gets_in_after_the_first_closes(tmp_path: Path) -> None:
    first, _ = reopened(tmp_path)
    with pytest.raises(JournalLocked, match=r"pid \d+ on "):
        reopened(tmp_path)
    first.start(lambda _: None)
    await first.append("put", {})
    await first.close()
    second, found = reopened(tmp_path)
    assert len(found) == 1
    await second.close()


async def test_registry_and_epoch_stay_the_same_for_the_life_of_a_journal(tmp_path: Path) -> None:
    first, _ = reopened(tmp_path)
    await first.close()
    second, _ = reopened(tmp_path)
    await second.close()
    assert len(first.registry_id) == 32
    assert (second.registry_id, second.epoch) == (first.registry_id, first.epoch) == (first.registry_id, 1)


class HeldFiles(Files):
    """Syncs wait for their turn."""

    def __init__(self) -> None:
        self.turn = threading.Event()
        self.turn.set()

    def fdatasync(self, fd: int) -> None:
        assert self.turn.wait(10)
        super().fdatasync(fd)


@pytest.mark.parametrize("ends", ["well", "stopped"])
async def test_a_rotation_that_nobody_waits_for_any_more_does_not_stop_the_journal(tmp_path: Path, ends: str) -> None:
    files = HeldFiles()
    journal, _ = reopened(tmp_path, files=files)
    journal.start(lambda _: None)
    first = await journal.append("put", {})
    files.turn.clear()
    writes = asyncio.create_task(journal.append("put", {}))
    await asyncio.sleep(0.05)
    rotates = asyncio.create_task(journal.rotate())
    await asyncio.sleep(0.05)
    rotates.cancel()
    await asyncio.wait([rotates])
    if ends == "stopped":
        journal.stop("the test says so")
        files.turn.set()
        with pytest.raises(JournalFailed, match="the test says so"):
            await writes
    else:
        files.turn.set()
        entries = [first, await writes, await journal.append("put", {})]
        assert journal.healthy
        assert journal.read(0, 10) == entries
    await journal.close()


async def test_a_cancelled_wait_does_not_undo_the_append(tmp_path: Path) -> None:
    journal, _ = reopened(tmp_path)
    told: list[Entry] = []
    journal.start(told.extend)
    waiting = asyncio.ensure_future(journal.append("put", {"n": 1}))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await journal.append("put", {"n": 2})
    assert [entry.record["n"] for entry in told] == [1, 2]
    await journal.close()


async def test_more_than_the_queue_holds_waits_and_is_appended_in_turn(tmp_path: Path) -> None:
    journal, _ = reopened(tmp_path)
    journal.start(lambda _: None)
    entries = await asyncio.gather(*(journal.append("put", {"n": n}) for n in range(6000)))
    assert [entry.record["n"] for entry in sorted(entries, key=lambda entry: entry.sequence)] == list(range(6000))
    large = await asyncio.gather(*(journal.append("put", {"text": "x" * 900_000}) for _ in range(30)))
    assert len({entry.sequence for entry in large}) == 30
    assert journal.stats().queued == 0
    await journal.close()


async def test_closing_finishes_what_was_appended_and_refuses_what_comes_later(tmp_path: Path) -> None:
    journal, _ = reopened(tmp_path)
    journal.start(lambda _: None)
    appends = [asyncio.ensure_future(journal.append("put", {"n": n})) for n in range(100)]
    await asyncio.sleep(0)
    await journal.close()
    assert len({(await append).sequence for append in appends}) == 100
    with pytest.raises(ModelManagerError) as refused:
        await journal.append("put", {})
    assert refused.value.code == "ERR_SHUTTING_DOWN"
    await journal.close()
    assert len(await replayed(tmp_path)) == 100


async def test_a_bad_record_is_refused_alone(tmp_path: Path) -> None:
    journal, _ = reopened(tmp_path)
    journal.start(lambda _: None)
    head = journal.head
    with pytest.raises(ModelManagerError) as refused:
        await journal.append("put", {"text": "x" * 1024 * 1024})
    assert refused.value.code == "ERR_INVALID_REQUEST"
    with pytest.raises(ValueError, match="belongs to the journal"):
        await journal.append("seal", {})
    assert journal.head == head
    assert (await journal.append("put", {})).sequence == head + 1
    await journal.close()


async def test_a_mark_closes_the_last_batch_after_a_second_without_records(tmp_path: Path) -> None:
    journal, _ = reopened(tmp_path)
    journal.start(lambda _: None)
    entry = await journal.append("put", {})
    await eventually(lambda: journal.head > entry.sequence)
    assert [line.op for line in dump(tmp_path)] == ["open", "put", "mark"]
    await journal.close()
    assert [line.op for line in dump(tmp_path)] == ["open", "put", "mark"]


async def test_an_unknown_file_is_set_aside_and_a_half_published_one_removed(tmp_path: Path) -> None:
    entries = await filled(tmp_path, [3])
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "seg-copy.jsonl").write_text("{}")
    (tmp_path / "MANIFEST.tmp").write_text("half")
    (tmp_path / "seg-00000000000000000009.jsonl.tmp").write_text("half")
    (tmp_path / "lost+found").mkdir()
    assert await replayed(tmp_path) == entries
    (tmp_path / "notes.txt").write_text("mine too")
    assert await replayed(tmp_path) == entries
    assert {path.name: path.read_text() for path in (tmp_path / "aside").iterdir()} == {
        "notes.txt": "mine",
        "notes.txt.1": "mine too",
        "seg-copy.jsonl": "{}",
    }
    assert not named(tmp_path, "*.tmp")


async def test_verify_and_dump_work_beside_the_owner(tmp_path: Path) -> None:
    journal, _ = reopened(tmp_path, segment_bytes=20_000)
    journal.start(lambda _: None)
    stopping = asyncio.Event()

    async def writer() -> None:
        while not stopping.is_set():
            await journal.append("put", {"text": "x" * 300})

    writers = [asyncio.ensure_future(writer()) for _ in range(8)]
    while journal.stats().segments < 12:
        report = await asyncio.to_thread(verify, tmp_path)
        assert report.damage is None
        lines = await asyncio.to_thread(lambda: list(dump(tmp_path)))
        assert [line.sequence for line in lines] == list(range(1, len(lines) + 1))
    stopping.set()
    await asyncio.gather(*writers)
    await journal.close()
    report, stats = verify(tmp_path), journal.stats()
    assert (report.registry_id, report.head, report.records) == (journal.registry_id, stats.head, stats.records)
    assert (report.bytes, report.files, report.generation) == (stats.bytes, stats.segments, stats.generation)
    assert report.lines == report.head


class Seen(JournalObserver):
    def __init__(self) -> None:
        self.appends: list[float] = []
        self.fsyncs: list[float] = []
        self.torn: list[int] = []

    def append_seconds(self, seconds: float) -> None:
        self.appends.append(seconds)

    def fsync_seconds(self, seconds: float) -> None:
        self.fsyncs.append(seconds)

    def torn_tail(self, size: int) -> None:
        self.torn.append(size)


async def test_the_observer_sees_each_append_each_sync_and_what_was_cut(tmp_path: Path) -> None:
    seen = Seen()
    await filled(tmp_path, [1, 1, 1], observe=seen)
    assert len(seen.appends) == 3
    assert len(seen.fsyncs) == 4
    assert min(seen.appends + seen.fsyncs) > 0
    with named(tmp_path, "seg-*")[0].open("ab") as stream:
        stream.write(b'{"v":1,"se')
    journal, _ = reopened(tmp_path, observe=seen)
    assert seen.torn == [10] == [journal.stats().torn_bytes]
    assert [path.read_bytes() for path in named(tmp_path, "*.torn")] == [b'{"v":1,"se']
    await journal.close()


async def test_a_record_that_cannot_be_taken_up_stops_the_journal(tmp_path: Path) -> None:
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
    journal, _ = reopened(tmp_path)

    def refuse(_: Sequence[Entry]) -> None:
        raise LookupError("no such model")

    journal.start(refuse)
    head = journal.head
    for _ in range(2):
        with pytest.raises(JournalFailed, match="no such model"):
            await journal.append("put", {})
    assert not journal.healthy
    assert journal.head == head
    assert isinstance(reported[0], LookupError)
    await journal.close()
    assert len(await replayed(tmp_path)) == 1


async def test_a_journal_that_stops_while_its_thread_takes_a_batch_leaves_nobody_waiting(tmp_path: Path) -> None:
    journal, _ = reopened(tmp_path)
    journal.start(lambda _: None)
    await journal.append("put", {"n": 0})
    writer, gate = journal._writer, threading.Event()
    assert writer is not None
    held = writer.run(lambda _: gate.wait(10))
    loop, queue, thread = asyncio.get_running_loop(), writer._queue, writer._thread

    class Overtaken:
        """The queue, emptied by `abandon` between the thread's look at its length and its next take."""

        stopped = False

        def __getattr__(self, name: str) -> Any:
            return getattr(queue, name)

        def get_nowait(self) -> Any:
            if threading.current_thread() is thread and not self.stopped:
                self.stopped, emptied = True, threading.Event()
                loop.call_soon_threadsafe(lambda: (journal.stop("taken over"), emptied.set()))
                emptied.wait(10)
            return queue.get_nowait()

    await eventually(held.running)
    writer._queue = Overtaken()  # type: ignore[assignment]
    waiting = [asyncio.create_task(journal.append("put", {"n": n})) for n in range(5)]
    await asyncio.sleep(0)
    gate.set()
    async with asyncio.timeout(10):
        ended = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(end) for end in ended] == [JournalFailed] * 5
    await journal.close()
