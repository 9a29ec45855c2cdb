"""SIGKILL at any moment: what a process outside saw acknowledged is in the journal, and the folder is free at once."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from pathlib import Path

import pytest

from worker.journal import Entry, Journal, JournalLocked, verify

APPENDING = """
import asyncio, os, sys
from pathlib import Path
from worker.journal import Journal

async def main(folder):
    journal = Journal.open(folder, replay=lambda _: None, segment_bytes=100_000)
    journal.start(lambda _: None)

    async def writer(number):
        while True:
            entry = await journal.append("put", {"writer": number, "text": "x" * 200})
            os.write(1, b"%d\\n" % entry.sequence)

    os.write(1, b"0\\n")
    await asyncio.gather(*(writer(number) for number in range(8)))

asyncio.run(main(Path(sys.argv[1])))
"""


def acknowledged_until_killed(folder: Path, count: int) -> set[int]:
    """Kill a process that appends once it has told of `count` records; the sequences of all it told of."""
    with subprocess.Popen([sys.executable, "-c", APPENDING, str(folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(count + 1)]
        process.kill()
        told += process.stdout.readlines()
    return {int(line) for line in told if line.endswith(b"\n")} - {0}


def replayed(folder: Path) -> list[Entry]:
    """What a boot finds; the folder is free again afterwards."""
    entries: list[Entry] = []
    asyncio.run(Journal.open(folder, replay=entries.append).close())
    return entries


def test_nothing_acknowledged_is_lost_by_sigkill(tmp_path: Path) -> None:
    choose = random.Random(7)
    acknowledged: set[int] = set()
    for _ in range(10):
        count = choose.randint(1, 3000)
        told = acknowledged_until_killed(tmp_path, count)
        assert len(told) >= count
        assert not told & acknowledged, "no sequence is given twice"
        acknowledged |= told
        found = replayed(tmp_path)
        assert acknowledged <= {entry.sequence for entry in found}
        report = verify(tmp_path)
        assert (report.damage, report.records) == (None, len(found))
    assert report.files > 3


def test_a_second_opener_gets_in_as_soon_as_the_owner_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", APPENDING, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(JournalLocked, match=f"pid {process.pid} on "):
            Journal.open(tmp_path, replay=lambda _: None)
        process.kill()
        process.wait()
        replayed(tmp_path)
