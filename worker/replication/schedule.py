"""Which pull is next: fair to all racks, and patient with those that are away and with what fails."""

from __future__ import annotations

import heapq
import random
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from schemas.errors import ModelManagerError
from worker.catalog.replicas import Pull

# The first pause and the longest one, in seconds.
_PASSING = (1.0, 60.0)
_REFUSED = (600.0, 86_400.0)  # by this rack, or wrong everywhere: its bytes may have come for nothing


@dataclass(slots=True)
class Trial:
    """A pull, and how it went so far: `due` in seconds of `time.monotonic`, `received` in bytes by the
    sha256 of the file."""

    pull: Pull
    failures: int = 0
    due: float = 0.0
    received: Counter[str] = field(default_factory=Counter)
    error: ModelManagerError | None = None


@dataclass(slots=True)
class _Origin:
    """The pulls from one rack: `fresh` ones by sequence, in their order. It is left alone until `due`."""

    fresh: dict[int, Trial] = field(default_factory=dict)
    running: int = 0
    failures: int = 0
    due: float = 0.0


class Schedule:
    """Of pulls that are not over. One pull of a model runs at a time, so that its versions come in their order."""

    def __init__(self, pulls: Iterable[Pull]) -> None:
        self._trials: dict[tuple[str, str], Trial] = {}  # by model and version
        self._origins: dict[str, _Origin] = {}
        self._later: list[tuple[float, int, Trial]] = []  # those that failed, by when they are due
        self._busy: set[str] = set()  # models in lower case
        self.failing: Counter[str] = Counter()
        """How many failed when they were tried last, by origin."""
        for pull in sorted(pulls, key=lambda pull: pull.sequence):
            self.add(pull)

    def add(self, pull: Pull) -> None:
        """A pull was begun, perhaps in place of another one for the version."""
        self.end(pull.model, pull.version)
        trial = self._trials[pull.model, pull.version] = Trial(pull)
        self._origin(pull).fresh[pull.sequence] = trial

    def end(self, model: str, version: str) -> None:
        """The pull for the version is over, if there is one."""
        trial = self._trials.pop((model, version), None)
        if trial is not None:
            self._origin(trial.pull).fresh.pop(trial.pull.sequence, None)
            self._note(trial, None)

    def trial_of(self, model: str, version: str) -> Trial | None:
        return self._trials.get((model, version))

    def start(self, now: float) -> Trial | None:
        """The pull to run now, which `done` is to follow; None if there is none. The rack of which the fewest run is
        first; of one that is away, one at a time is tried."""
        while self._later and self._later[0][0] <= now:
            _, _, trial = heapq.heappop(self._later)
            if self._is(trial):
                self._origin(trial.pull).fresh[trial.pull.sequence] = trial
        for origin in sorted(self._origins.values(), key=lambda origin: origin.running):
            if origin.due > now or (origin.failures and origin.running):
                continue
            for trial in origin.fresh.values():
                if trial.pull.model.lower() not in self._busy:
                    del origin.fresh[trial.pull.sequence]
                    self._busy.add(trial.pull.model.lower())
                    origin.running += 1
                    return trial
        return None

    def wait_s(self, now: float) -> float | None:
        """The seconds until something more may be due; None if nothing is by itself."""
        due = [origin.due for origin in self._origins.values() if origin.fresh and origin.due > now]
        due += [self._later[0][0]] if self._later else []
        return max(0.0, min(due) - now) if due else None

    def done(self, trial: Trial, error: ModelManagerError | None, *, away: bool) -> float:
        """A try is over, and so is the pull, unless it is still there; the seconds until it is tried again. `away`: its
        origin did not answer, so that others need not try now."""
        origin, now = self._origin(trial.pull), time.monotonic()
        origin.running -= 1
        self._busy.discard(trial.pull.model.lower())
        if self._is(trial):
            self._note(trial, error)
        if away:
            origin.failures += 1
            origin.due = now + _pause(origin.failures, _PASSING)
        else:
            origin.failures = 0
        if not self._is(trial):
            return 0.0
        trial.failures += 1
        pause = _pause(trial.failures, _PASSING if error is None or error.retryable else _REFUSED)
        trial.due = now + pause
        heapq.heappush(self._later, (trial.due, trial.pull.sequence, trial))
        return pause

    def hurry(self, model: str, version: str) -> bool:
        """Try again at once what failed; whether there is such a pull."""
        trial = self._trials.get((model, version))
        if trial is None or trial.error is None or trial.due == 0.0:
            return False
        trial.failures, trial.due = 0, 0.0
        self._later = [each for each in self._later if each[2] is not trial]
        heapq.heapify(self._later)
        self._origin(trial.pull).fresh[trial.pull.sequence] = trial
        return True

    def _note(self, trial: Trial, error: ModelManagerError | None) -> None:
        self.failing[trial.pull.origin] += (error is not None) - (trial.error is not None)
        trial.error = error

    def _is(self, trial: Trial) -> bool:
        """Whether the trial's pull is not over."""
        return self._trials.get((trial.pull.model, trial.pull.version)) is trial

    def _origin(self, pull: Pull) -> _Origin:
        return self._origins.setdefault(pull.origin, _Origin())


def _pause(failures: int, limits: tuple[float, float]) -> float:
    first_s, longest_s = limits
    return float(min(longest_s, first_s * 2 ** min(failures - 1, 16)) * random.uniform(0.5, 1))
