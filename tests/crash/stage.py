"""Where a scenario is played: on a fake disk, with a note of each moment at which a crash could come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from schemas.errors import ModelManagerError
from tests.crash.disk import Disk, Unit
from tests.crash.life import Life, Record
from worker.journal import Entry, JournalFailed

FOLDER = Path("/data/registry")

Fold = Callable[[Sequence[Record]], Hashable]


class Violation(AssertionError):
    """A promise was broken."""


class Over(Exception):
    """The journal stopped, or could not be opened: the scenario ends here."""


def in_order(records: Sequence[Record]) -> Hashable:
    """The state, where it is all that was ever written."""
    return tuple(map(repr, records))


@dataclass(frozen=True, slots=True)
class Promise:
    """After a crash the first `acknowledged` of `submitted` are there, and of the others any number in order."""

    acknowledged: int = 0
    submitted: tuple[Record, ...] = ()

    def check(self, found: Sequence[Entry], fold: Fold) -> None:
        """Raises Violation."""
        state = fold([entry.record for entry in found])
        for count in range(self.acknowledged, len(self.submitted) + 1):
            if state == fold(self.submitted[:count]):
                return
        raise Violation(
            f"{[entry.record.get('n') for entry in found]} was found; acknowledged were"
            f" {[record.get('n') for record in self.submitted[: self.acknowledged]]}, submitted"
            f" {[record.get('n') for record in self.submitted]}"
        )


@dataclass(frozen=True, slots=True)
class Scenario:
    """What a worker does with its journal. `play` leaves it in the midst of things, or closed.

    `fold` makes of records the state that must survive. `intact` looks for what else must, and raises Violation. `mend`
    is what an operator does before each boot.
    """

    name: str
    play: Callable[[Stage], None]
    fold: Fold = in_order
    intact: Callable[[Disk], None] = field(default=lambda disk: None)
    mend: Callable[[Disk], None] = field(default=lambda disk: None)


@dataclass(frozen=True, slots=True)
class Moment:
    """Before the operation `number`, which is a `name`: the disk as it is, and what was promised by then."""

    number: int
    name: str
    disk: Disk
    promise: Promise


class Stage:
    """`fault` is asked before each operation, with its number and name, as `Disk.before` is."""

    def __init__(self, scenario: Scenario, fault: Callable[[int, str], int | None] = lambda number, name: None) -> None:
        self.scenario = scenario
        self.disk = Disk()
        self.moments: list[Moment] = []
        self.fault = fault
        self.trouble: Callable[[str], int | None] = lambda name: None
        """What the scenario itself does to operations, by name."""
        self._promise = Promise()
        self._life: Life | None = None
        self._records = 0

    def play(self) -> list[Moment]:
        """Every moment of the scenario, its end among them."""
        self._listen()
        with suppress(Over):
            self.scenario.play(self)
        self.moments.append(Moment(len(self.moments), "end", self.disk.copy(), self._promise))
        return self.moments

    @contextmanager
    def life(self, *, segment_bytes: int = 2**26, killed: bool = False) -> Iterator[Life]:
        """An owner of the journal from boot to `close`, or to a SIGKILL: the page cache outlives it."""
        try:
            life = Life(FOLDER, self.disk, segment_bytes=segment_bytes)
        except (JournalFailed, ModelManagerError, OSError) as error:
            # A process that cannot boot ends, and leaves a lock no longer than that.
            self.replace_disk(self.disk.copy())
            raise Over from error
        self._promise.check(life.found, self.scenario.fold)
        shown = tuple(entry.record for entry in life.found)
        self._promise = Promise(len(shown), shown)
        self._life = life
        try:
            yield life
        finally:
            left = self.disk.copy() if killed else None
            if left is not None:
                self.disk.before = lambda name: None
            life.close()
            self._life = None
            self.replace_disk(self.disk.copy() if left is None else left)

    def put(self, count: int = 1, *, size: int = 0, **members: object) -> None:
        """So many records at once, each with a number of its own. Raises Over once the journal has stopped."""
        assert self._life is not None
        records: list[Record] = []
        for _ in range(count):
            self._records += 1
            records.append({"n": self._records, "text": "x" * size, **members})
        self._promise = Promise(self._promise.acknowledged, (*self._promise.submitted, *records))
        if any(isinstance(outcome, JournalFailed) for outcome in self._life.put(records, self._answered)):
            raise Over

    def compact(self) -> None:
        """Raises Over once the journal has stopped."""
        assert self._life is not None
        try:
            self._life.compact()
        except (JournalFailed, ModelManagerError, OSError) as error:
            raise Over from error

    def crash(self, moment: Moment, kept: Iterable[Unit]) -> None:
        """Go back to `moment`, cut the power and go on with what is left."""
        self._promise = moment.promise
        self.replace_disk(moment.disk.after_cut(kept))

    def replace_disk(self, disk: Disk) -> None:
        """Go on with this one: what a crash left of the disk."""
        self.disk.before = lambda name: None
        self.disk = disk
        self._listen()

    def _answered(self, record: Record, outcome: Entry | Exception) -> None:
        submitted = self._promise.submitted
        place = next(index for index, one in enumerate(submitted) if one is record)
        if isinstance(outcome, Entry):
            self._promise = Promise(max(self._promise.acknowledged, place + 1), submitted)
        elif isinstance(outcome, ModelManagerError):
            # A definite no: from here on this record must never be found.
            self._promise = Promise(self._promise.acknowledged, (*submitted[:place], *submitted[place + 1 :]))

    def _listen(self) -> None:
        self.disk.before = self._before

    def _before(self, name: str) -> int | None:
        if self._life is not None and threading.current_thread() is not threading.main_thread():
            self._life.catch_up()
        number = len(self.moments)
        self.moments.append(Moment(number, name, self.disk.copy(), self._promise))
        own = self.trouble(name)
        return self.fault(number, name) if own is None else own
