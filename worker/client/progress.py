"""How a long call tells how far it is."""

from __future__ import annotations

from typing import Protocol


class Report(Protocol):
    """Takes the step's name, the bytes done so far and all bytes (0: not known). It is called from the event loop."""

    def __call__(self, step: str, done: int, total: int, /) -> None: ...


def silent(step: str, done: int, total: int, /) -> None:
    """Tells nobody."""


class Meter:
    """Counts the bytes of one step; `take_back` is for those that must be sent again."""

    def __init__(self, report: Report, step: str, total: int) -> None:
        self._report = report
        self._step = step
        self._total = total
        self._done = 0
        report(step, 0, total)

    def add(self, count: int) -> None:
        self._done += count
        self._report(self._step, self._done, self._total)

    def take_back(self, count: int) -> None:
        self.add(-count)
