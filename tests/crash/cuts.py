"""Power cuts under a real file system: what was not synced is gone, and the file system recovers by itself.

Acks count that were seen before the cut began: while it runs, a sync may still return 0 and its bytes be lost, which a
real power cut cannot do.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from tests.crash.kills import LIVES, boot_again, listen_for_a_while, next_owner, take_up
from tests.crash.ledger import Book
from tests.crash.loop_disk import LoopDisk, loop_disk, missing
from tests.crash.tally import Tally, progress

COUNT = 400
KINDS = ("ext4", "xfs")


def run(kind: str, count: int = COUNT // len(KINDS), *, seed: int = 1) -> Tally:
    """Cut the power that often on a disk of that kind."""
    tally = Tally(f"power cuts, {kind}")
    if (lack := missing(kind)) is not None:
        tally.not_run = lack
        return tally
    try:
        with loop_disk(kind) as disk:
            _cut(disk, count, random.Random(seed), tally)
    except OSError as error:
        tally.not_run = f"after {tally.cases} cuts: {error}"
    return tally.done()


def _cut(disk: LoopDisk, count: int, choose: random.Random, tally: Tally) -> None:
    during: Counter[str] = Counter()
    while tally.cases < count and not tally.broken:
        folder = disk.mounted / f"registry-{tally.cases}"
        book = Book()
        for _ in range(min(LIVES, count - tally.cases)):
            cut_once(disk, folder, book, choose, tally, during)
            if tally.cases % 25 == 0:
                progress(tally.name, tally.cases, count, tally)
            if tally.broken:
                break
        else:
            boot_again(folder, book, disk.kind, tally)
        tally.acks += book.acks
        tally.lost += book.lost
        if tally.broken:
            kept = shutil.copytree(folder, tempfile.mkdtemp(prefix="cut-"), dirs_exist_ok=True)
            tally.broken.append(f"what was found is in {kept}")
    tally.also = ", ".join(f"{number} in {place}" for place, number in sorted(during.items()))


def cut_once(
    disk: LoopDisk, folder: Path, book: Book, choose: random.Random, tally: Tally, during: Counter[str]
) -> None:
    owner = next_owner(folder, book, choose)
    try:
        listen_for_a_while(owner, choose)
        disk.cut()
    finally:
        owner.kill()
        owner.end(deaf=True)
    disk.restore()
    during[owner.place] += 1
    tally.cases += 1
    take_up(owner, disk.kind, tally)
