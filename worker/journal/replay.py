"""What a journal is replayed into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from worker.journal.blocks import Block
from worker.journal.format import Entry

R = TypeVar("R")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Help:
    """Processes that make a large boot faster: `command`, with the journal's folder behind it, runs `help_boot` with
    what the replay decodes and extracts; `content` is the type of what is extracted."""

    command: Sequence[str]
    content: type[Any]


class Replay(Protocol[R, T]):
    """What a journal is replayed into."""

    # What of a record is decoded for `extract`.
    record: type[R]

    # None: all is done in this process.
    help: Help | None

    # What of some business records is taken. Depends on these only: it may be done by another process, or in vain.
    def extract(self, block: Block[R]) -> T: ...

    # What was extracted of business records, in order. Called many times.
    def take(self, extract: T) -> None: ...

    # The state after all lines of a base, in parts, as `dumped` made them: instead of taking its lines.
    # False if these are not parts this program can use; nothing has changed then.
    def load(self, parts: dict[str, memoryview]) -> bool: ...


class EachEntry:
    """A replay that hands over the records one by one."""

    record: type[dict[str, Any]] = dict[str, Any]
    help: Help | None = None

    def __init__(self, each: Callable[[Entry], object]) -> None:
        self._each = each

    def extract(self, block: Block[dict[str, Any]]) -> list[Entry]:
        return [Entry(line.sequence, line.time_ms, line.op, line.record) for line in block.lines]

    def take(self, extract: list[Entry]) -> None:
        for entry in extract:
            self._each(entry)

    def load(self, parts: dict[str, memoryview]) -> bool:
        return False
