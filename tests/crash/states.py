"""Every crash at every moment of a scenario: what each may leave, and whether the journal keeps its promises on it."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.crash.disk import Disk, Unit
from tests.crash.life import Life, boot
from tests.crash.stage import FOLDER, Moment, Promise, Scenario, Stage, Violation
from worker.journal import JournalDamaged, verify

Kept = frozenset[Unit]


@dataclass(frozen=True, slots=True)
class Depth:
    """How much of what may happen is looked at.

    `samples` random parts of what is not synced for each moment; with `singles` also each unit alone kept, and alone
    lost. Of the boots that are looked at, one in `nested` is itself cut at each of its operations.
    """

    samples: int
    singles: bool
    nested: int


BOUNDED = Depth(samples=2, singles=False, nested=2)
FULL = Depth(samples=40, singles=True, nested=1)


@dataclass(slots=True)
class Counts:
    moments: int = 0
    states: int = 0
    boots: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.moments + other.moments, self.states + other.states, self.boots + other.boots)


def enumerate_states(scenario: Scenario, depth: Depth, *, seed: int = 1) -> Counts:
    """Raises Violation, with what was done, at the first promise that is broken."""
    return Examination(scenario, depth, seed).of(Stage(scenario).play())


def choices(units: Sequence[Unit], depth: Depth, choose: random.Random) -> Iterator[Kept]:
    """The parts of `units` that a power cut keeps: the extremes, all in order up to each, and random ones."""
    everything = frozenset(units)
    yield frozenset()
    yield everything
    for kinds in ({"name"}, {"sector"}, {"size"}, {"name", "size"}, {"sector", "size"}, {"name", "sector"}):
        yield frozenset(unit for unit in units if unit.kind in kinds)
    for number in sorted({unit.number for unit in units}):
        yield frozenset(unit for unit in units if unit.number < number)
    if depth.singles:
        for unit in units:
            yield frozenset({unit})
            yield everything - {unit}
    for _ in range(depth.samples if len(units) > 1 else 0):
        share = choose.random()
        yield frozenset(unit for unit in units if choose.random() < share)


class Examination:
    """Equal states under an equal promise are looked at once."""

    def __init__(self, scenario: Scenario, depth: Depth, seed: int) -> None:
        self._scenario = scenario
        self._depth = depth
        self._choose = random.Random(seed)
        self._seen: set[Hashable] = set()
        self.counts = Counts()

    def of(self, moments: Sequence[Moment]) -> Counts:
        for moment in moments:
            self.counts.moments += 1
            # A process that ends leaves the cache as it is; it may be what a power cut comes upon later.
            self._look(moment, "SIGKILL", moment.disk.copy())
            for kept in dict.fromkeys(choices(moment.disk.units(), self._depth, self._choose)):
                self._look(moment, f"a power cut that keeps {sorted(kept)}", moment.disk.after_cut(kept))
        return self.counts

    def _look(self, moment: Moment, how: str, disk: Disk) -> None:
        identity = (content(disk), tuple(disk.units()), moment.promise.acknowledged, len(moment.promise.submitted))
        if identity in self._seen:
            return
        self._seen.add(identity)
        self.counts.states += 1
        try:
            self._examine(disk, moment.promise)
        except (Violation, JournalDamaged) as error:
            raise Violation(
                f"{self._scenario.name}, before operation {moment.number} ({moment.name}), {how}: {error}"
            ) from error

    def _examine(self, disk: Disk, promise: Promise) -> None:
        self._scenario.intact(disk)
        nested = self.counts.states % self._depth.nested == 0
        during: list[Disk] = []
        if nested:
            disk.before = lambda name: during.append(disk.copy())
        shown = self._boot(disk, promise)
        disk.before = lambda name: None
        for cut in during:
            for kept in choices(cut.units(), BOUNDED, self._choose):
                self._boot(cut.after_cut(kept), promise)
        self._boot(disk.copy(), shown)
        # What a boot has shown is promised, whatever comes.
        for kept in (frozenset[Unit](), self._random_part(disk)):
            self._boot(disk.after_cut(kept), shown)
        if (damage := verify(FOLDER, files=disk).damage) is not None:
            raise Violation(f"verify finds {damage}")
        self._go_on(disk.copy(), shown)

    def _boot(self, disk: Disk, promise: Promise) -> Promise:
        self.counts.boots += 1
        self._scenario.mend(disk)
        found = boot(FOLDER, disk)
        promise.check(found, self._scenario.fold)
        self._scenario.intact(disk)
        shown = tuple(entry.record for entry in found)
        return Promise(len(shown), shown)

    def _go_on(self, disk: Disk, promise: Promise) -> None:
        """The next owner's records are as safe."""
        self.counts.boots += 1
        life = Life(FOLDER, disk, segment_bytes=600)
        added = ({"n": -1, "text": ""}, {"n": -2, "text": ""})
        for record in added:
            life.put([record])
        left = disk.copy()
        life.close()
        records = (*promise.submitted, *added)
        for kept in (frozenset[Unit](), self._random_part(left)):
            self._boot(left.after_cut(kept), Promise(len(records), records))

    def _random_part(self, disk: Disk) -> Kept:
        return frozenset(unit for unit in disk.units() if self._choose.random() < 0.5)


def content(disk: Disk, folder: Path = Path("/")) -> Hashable:
    """All names and bytes, as they are read now."""
    return tuple(
        (name, content(disk, folder / name) if disk.is_dir(folder / name) else disk.reader(folder / name).read())
        for name in disk.list(folder)
    )
