"""A table of measurements: what we did, what the peer did, and whether the design's number holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    GOAL = "goal reached"
    FLOOR = "floor holds"
    MISSED = "BELOW FLOOR"


@dataclass(frozen=True, slots=True)
class Target:
    """What the design asks of one number: the floor must hold, the goal is what we are after. `at_most`: of times and
    sizes, where less is better."""

    floor: float
    goal: float
    unit: str = "x"
    at_most: bool = False

    def judge(self, value: float) -> Verdict:
        sign = -1 if self.at_most else 1
        if sign * value >= sign * self.goal:
            return Verdict.GOAL
        return Verdict.FLOOR if sign * value >= sign * self.floor else Verdict.MISSED

    def __str__(self) -> str:
        bound = "at most " if self.at_most else ""
        return f"floor {bound}{self.floor:g}{self.unit}, goal {self.goal:g}{self.unit}"


@dataclass(frozen=True, slots=True)
class Judged:
    """One number that the design names."""

    what: str
    value: float
    target: Target

    @property
    def verdict(self) -> Verdict:
        return self.target.judge(self.value)


class Table:
    """`columns` head the cells of each row; the design's number, where there is one, comes last."""

    def __init__(self, title: str, columns: Sequence[str], *notes: str) -> None:
        self.title = title
        self.judged: list[Judged] = []
        self._columns = [*columns, "design"]
        self._rows: list[list[str]] = []
        self._notes = list(notes)

    def note(self, text: str) -> None:
        """One more line below the table."""
        self._notes.append(text)

    def add(
        self, *cells: str, value: float | None = None, target: Target | None = None, judged_as: str | None = None
    ) -> None:
        """A row; `value` is what `target` judges, named in the summary by `judged_as` or the first cell."""
        design = ""
        if value is not None and target is not None:
            judged = Judged(judged_as or cells[0], value, target)
            self.judged.append(judged)
            design = f"{target}: {judged.verdict}"
        self._rows.append([*cells, *[""] * (len(self._columns) - 1 - len(cells)), design])

    def __str__(self) -> str:
        rows = [self._columns, *self._rows]
        widths = [max(len(row[at]) for row in rows) for at in range(len(self._columns))]
        lines = [_line(row, widths) for row in rows]
        return "\n".join(
            [self.title, lines[0], "-" * len(lines[0]), *lines[1:], *(f"  {note}" for note in self._notes)]
        )


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    """The first and the last cell to the left, numbers to the right."""
    last = len(row) - 1
    cells = [
        cell.ljust(width) if at in (0, last) else cell.rjust(width)
        for at, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def times(value: float) -> str:
    return f"{value:.2f}x"


def rate(per_second: float) -> str:
    return f"{per_second:,.0f}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.2f}"


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


def mebibytes(count: float) -> str:
    return f"{count / 1024**2:,.0f}"
