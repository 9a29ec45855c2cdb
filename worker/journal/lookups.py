"""Records read back from the files of a journal that is open."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from worker.journal.appender import Appender
from worker.journal.files import Files
from worker.journal.format import Entry
from worker.journal.segment import Segment

_T = TypeVar("_T")


class Lookups:
    """Any thread may ask. What is written meanwhile does not disturb it."""

    def __init__(self, files: Files, folder: Path, appender: Appender) -> None:
        self._files = files
        self._folder = folder
        self._appender = appender

    def entries(self, after: int, limit: int, *, until: int) -> list[Entry]:
        """The first `limit` (1 or more) business records with `after` < sequence <= `until`, in order.

        Raises JournalDamaged if a line is not what it was.
        """
        found: list[Entry] = []

        def go_on(segments: Sequence[Segment]) -> list[Entry]:
            behind = found[-1].sequence if found else after
            for segment in segments[_position(segments, behind + 1) :]:
                for entry in segment.entries(self._files, self._folder, after=behind, until=until):
                    found.append(entry)
                    if len(found) == limit:
                        return found
            return found

        return self._among_segments(go_on)

    def record(self, sequence: int, *, wait: bool) -> tuple[dict[str, Any], int]:
        """As `Segment.record`, of the segment that has the line."""

        def look(segments: Sequence[Segment]) -> tuple[dict[str, Any], int]:
            segment = segments[_position(segments, sequence)]
            return segment.record(self._files, self._folder, sequence, wait=wait)

        return self._among_segments(look)

    def _among_segments(self, look: Callable[[Sequence[Segment]], _T]) -> _T:
        """`look` at the files there are; again if compaction took one away before it was opened, since another file
        stands for it then."""
        while True:
            segments = self._appender.segments
            try:
                return look(segments)
            except FileNotFoundError:
                if segments is self._appender.segments:
                    raise


def _position(segments: Sequence[Segment], sequence: int) -> int:
    """Which file has the line `sequence`, if it is there."""
    return max(0, bisect_right(segments, sequence, key=_first) - 1)


def _first(segment: Segment) -> int:
    return segment.first
