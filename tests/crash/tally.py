"""What was tried, and what came of it: the table at the end."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

_COLUMNS = ("cases", "boots", "acks", "lost", "refused", "unreported")
_SHOWN = 8


@dataclass(slots=True)
class Tally:
    """One row of the table.

    `cases` are the states, kills, cuts, injections or damages that were tried; `boots` followed them. `acks` were seen
    outside; `lost` are those of them that a later boot did not find. Boots that were `refused` and damages that were
    `unreported` break promises, too, and so does all in `broken`, in words.
    """

    name: str
    cases: int = 0
    boots: int = 0
    acks: int = 0
    lost: int = 0
    refused: int = 0
    unreported: int = 0
    also: str = ""
    """What else was counted, in words."""
    not_run: str = ""
    """Why it was not tried, or not all of it."""
    broken: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def done(self) -> Tally:
        self.seconds = time.monotonic() - self.began
        return self

    def __add__(self, other: Tally) -> Tally:
        total = Tally(self.name, broken=self.broken + other.broken, seconds=self.seconds + other.seconds)
        for column in _COLUMNS:
            setattr(total, column, getattr(self, column) + getattr(other, column))
        return total


def progress(name: str, done: int, of: int, tally: Tally) -> None:
    """Where a long part is, on stderr."""
    print(f"{name}: {done:,} of {of:,}, {tally.acks:,} acks, {len(tally.broken)} broken", file=sys.stderr, flush=True)


def table(rows: list[Tally]) -> str:
    """All rows and their sum, then what was not run and what is broken."""
    width = max(len(row.name) for row in rows) + 2
    lines = [f"{'':{width}}" + "".join(f"{column:>12}" for column in _COLUMNS) + f"{'seconds':>10}"]
    total = Tally("all")
    for row in rows:
        total += row
    for row in (*rows, total):
        counts = "".join(f"{getattr(row, column):>12,}" for column in _COLUMNS)
        lines.append(f"{row.name:{width}}{counts}{row.seconds:>10.1f}{'  ' * bool(row.also)}{row.also}")
    lines += [f"NOT RUN {row.name}: {row.not_run}" for row in rows if row.not_run]
    for row in rows:
        lines += [f"BROKEN {row.name}: {text}" for text in row.broken[:_SHOWN]]
        if len(row.broken) > _SHOWN:
            lines.append(f"BROKEN {row.name}: {len(row.broken) - _SHOWN} more")
    return "\n".join(lines)
