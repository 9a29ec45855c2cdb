"""Records read back from the files of a journal that is open."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from worker.journal.appender import Appender
from worker.journal.files import Files
from worker.journal.format import Entry
from worker.journal.segment import Segment


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
        # After `until` was looked at, so that the segment it is in is among them.
        segments = self._appender.segments
        found: list[Entry] = []
        for segment in segments[_position(segments, after + 1) :]:
            for entry in segment.entries(self._files, self._folder, after=after, until=until):
                found.append(entry)
                if len(found) == limit:
                    return found
        return found

    def record(self, sequence: int, *, wait: bool) -> tuple[dict[str, Any], int]:
        """As `Segment.record`, of the segment that has the line."""
        segments = self._appender.segments
        segment = segments[_position(segments, sequence)]
        return segment.record(self._files, self._folder, sequence, wait=wait)


def _position(segments: Sequence[Segment], sequence: int) -> int:
    """Which file has the line `sequence`, if it is there."""
    return max(0, bisect_right(segments, sequence, key=_first) - 1)


def _first(segment: Segment) -> int:
    return segment.first
