"""Damage of every kind to every byte of a journal: it is reported, made up for, or what a torn write leaves."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.crash.specimen import SECTOR_BYTES, Specimen
from tests.crash.tally import Tally, progress
from worker.journal import JournalDamaged, verify

_SUBSETS = 2400


@dataclass(frozen=True, slots=True)
class Damage:
    """`data` in place of the file `name`. `kept`: the boot goes on with so many records at least, and at most; None:
    the boot is refused."""

    what: str
    name: str
    data: bytes
    kept: tuple[int, int] | None


def flips(specimen: Specimen) -> Iterator[Damage]:
    """Every bit of every file, one by one."""
    for name, whole in specimen.files.items():
        for offset, bit in product(range(len(whole)), range(8)):
            data = bytearray(whole)
            data[offset] ^= 1 << bit
            yield Damage(f"bit {bit} of byte {offset}", name, bytes(data), _unless_derived(specimen, name))


def cuts(specimen: Specimen) -> Iterator[Damage]:
    """Every file, cut at every byte."""
    for name, whole in specimen.files.items():
        first_line = whole.index(b"\n") + 1
        for size in range(len(whole)):
            kept = _unless_derived(specimen, name)
            if name == specimen.active and size >= first_line:
                kept = (specimen.kept(size), specimen.kept(size))
            yield Damage(f"cut at {size}", name, whole[:size], kept)


def lost_sectors(specimen: Specimen) -> Iterator[Damage]:
    """Each sector alone, then random ones: those of the last batch, and of acknowledged ones."""
    choose = random.Random(1)
    for name, whole in specimen.files.items():
        for sector in range(len(whole) // SECTOR_BYTES + 1):
            start = sector * SECTOR_BYTES
            if name != specimen.active:
                data = _without(whole, [sector], 0)
                yield Damage(f"sector {sector} lost", name, data, _unless_derived(specimen, name))
            elif start + SECTOR_BYTES <= specimen.last_batch:
                yield Damage(f"sector {sector} lost", name, _without(whole, [sector], 0), None)
    whole, begin = specimen.files[specimen.active], specimen.last_batch
    everything = range(begin // SECTOR_BYTES, (len(whole) - 1) // SECTOR_BYTES + 1)
    acknowledged = range(begin // SECTOR_BYTES)
    subsets = [[sector] for sector in everything]
    subsets += [choose.sample(everything, choose.randint(2, len(everything))) for _ in range(_SUBSETS)]
    for subset in subsets:
        data = _without(whole, subset, begin)
        yield Damage(f"sectors {subset} lost", specimen.active, data, (specimen.kept(begin), len(specimen.entries) - 1))
        if choose.random() < 0.2:
            more = _without(data, choose.sample(acknowledged, choose.randint(1, 3)), 0)
            yield Damage("sectors of acknowledged and unacknowledged batches lost", specimen.active, more, None)


def lines(specimen: Specimen) -> Iterator[Damage]:
    """Each line dropped, doubled, moved behind the next one, and put in the place of another."""
    for name in specimen.journal_files:
        whole = specimen.files[name].splitlines(keepends=True)
        for i, line in enumerate(whole):
            changed = {"doubled": [*whole[: i + 1], *whole[i:]]}
            if i + 1 < len(whole):
                changed["swapped"] = [*whole[:i], whole[i + 1], line, *whole[i + 2 :]]
            if i + 1 < len(whole) or name != specimen.active:  # else it is a cut
                changed["dropped"] = [*whole[:i], *whole[i + 1 :]]
            for j, other in enumerate(whole):
                if i != j:
                    changed[f"replaced by line {j}"] = [*whole[:i], other, *whole[i + 1 :]]
            for how, result in changed.items():
                yield Damage(f"line {i} {how}", name, b"".join(result), None)


def _unless_derived(specimen: Specimen, name: str) -> tuple[int, int] | None:
    """What any damage to that file means: nothing, if it is the index."""
    return (len(specimen.entries), len(specimen.entries)) if name.endswith(".idx") else None


def _without(data: bytes, sectors: list[int], begin: int) -> bytes:
    lost = bytearray(data)
    for sector in sectors:
        start, end = max(begin, sector * SECTOR_BYTES), min(len(data), (sector + 1) * SECTOR_BYTES)
        lost[start:end] = bytes(end - start)
    return bytes(lost)


def judge(specimen: Specimen, damage: Damage, tally: Tally) -> None:
    tally.cases += 1
    with specimen.damaged(damage.name, damage.data):
        try:
            wrong = _refusal(specimen, damage, tally) if damage.kept is None else _boot(specimen, damage, tally)
        except Exception as error:  # noqa: BLE001 - damage must not lead to anything else
            wrong = f"{type(error).__name__}: {error}"
    if wrong:
        tally.broken.append(f"{damage.name}, {damage.what}: {wrong}")


def _refusal(specimen: Specimen, damage: Damage, tally: Tally) -> str | None:
    """What is wrong with how it is reported."""
    before = specimen.content()
    try:
        specimen.boot()
    except JournalDamaged as error:
        if error.path != damage.name:
            return f"it is reported of {error.path}"
    else:
        tally.boots += 1
        tally.unreported += 1
        return "the boot says nothing"
    if specimen.content() != before:
        return "the refusal changed something"
    if not _is_found(specimen.folder):
        tally.unreported += 1
        return "verify finds nothing"
    return None


def _boot(specimen: Specimen, damage: Damage, tally: Tally) -> str | None:
    """What is wrong with the boot that goes on."""
    assert damage.kept is not None
    try:
        found = specimen.boot()
    except JournalDamaged as error:
        tally.refused += 1
        return str(error)
    tally.boots += 1
    least, most = damage.kept
    if found != specimen.entries[: len(found)] or not least <= len(found) <= most:
        tally.lost += max(1, least - len(found))
        return f"{len(found)} of {len(specimen.entries)} records, not {least} to {most}"
    if (left := verify(specimen.folder).damage) is not None:
        return f"after the boot verify finds {left}"
    return None


def _is_found(folder: Path) -> bool:
    try:
        return verify(folder).damage is not None
    except JournalDamaged:
        return True


Kind = Callable[[Specimen], Iterator[Damage]]

_SMALL, _LARGE = ([1, 3, 1, 2], 10), ([1, 40, 5, 60], 120)
KINDS: tuple[tuple[str, Kind, tuple[list[int], int], bool], ...] = (
    ("every bit flipped, closed", flips, _SMALL, True),
    ("every bit flipped, crashed", flips, _SMALL, False),
    ("cut at every byte, closed", cuts, _SMALL, True),
    ("cut at every byte, crashed", cuts, _SMALL, False),
    ("lost sectors", lost_sectors, _LARGE, False),
    ("lines dropped and moved", lines, _SMALL, True),
)


def run(*, every: int = 1) -> Iterator[Tally]:
    """All of them, or one in `every`: a row for each kind."""
    for name, kind, (batches, text), closed in KINDS:
        tally = Tally(name)
        with TemporaryDirectory(prefix="damage-") as folder:
            specimen = Specimen(Path(folder), batches, text=text, closed=closed)
            damages = sum(1 for _ in kind(specimen)) // every
            for number, damage in enumerate(kind(specimen)):
                if number % every == 0:
                    judge(specimen, damage, tally)
                    if tally.cases % 10_000 == 0:
                        progress(name, tally.cases, damages, tally)
                if len(tally.broken) > 20:
                    break
        yield tally.done()
