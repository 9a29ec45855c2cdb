"""What this rack holds, or is to hold, of other racks' models; and how far it has taken in their changes."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from schemas.journal import Blob
from worker.catalog.blobs import BlobIndex


@dataclass(frozen=True, slots=True)
class Pull:
    """A version whose bytes are to be brought here, from its origin or another rack that holds it. `checksum` is sha256
    in hex, `size` in bytes, `since` when the model's first version was stored, `sequence` its record's."""

    model: str
    version: str
    origin: str
    checksum: str
    size: int
    since: int
    replicas: tuple[str, ...]
    sequence: int


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far the changes of a rack are taken in: `after` is a sequence of its journal's life `epoch`, of the registry
    with the id `registry`; `sequence` is that of our record."""

    registry: str
    epoch: int
    after: int
    sequence: int


class Replicas:
    """The fold of their records. What is brought for a pull is used in `blobs` until that is over."""

    def __init__(self, blobs: BlobIndex) -> None:
        self._blobs = blobs
        self.cursors: dict[str, Cursor] = {}  # by rack
        self.rows: defaultdict[str, array[int]] = defaultdict(_no_rows)  # by rack, ascending; with those that are gone
        self.awaited: Counter[str] = Counter()
        """How many pulls are not over, by rack."""
        self._pulls: dict[str, dict[str, Pull]] = {}  # by model in lower case, and version
        self._brought: dict[Pull, dict[str, tuple[Blob, int]]] = {}  # with the record's sequence, by sha256

    def pulls(self) -> Iterator[Pull]:
        """Those that are not over. The models in the order of their first one, the versions of each in their own."""
        for pulls in list(self._pulls.values()):
            yield from list(pulls.values())

    def pull_of(self, model: str, version: str) -> Pull | None:
        pull = self._pulls.get(model.lower(), {}).get(version)
        return None if pull is None or pull.model != model else pull

    def pulls_of(self, model: str) -> list[Pull]:
        """Those of the model with this id in any case."""
        return list(self._pulls.get(model.lower(), {}).values())

    def owner_of(self, row: int) -> str | None:
        """The rack whose version is in the row; None if it is our own."""
        for rack, rows in self.rows.items():
            place = bisect_left(rows, row)
            if place < len(rows) and rows[place] == row:
                return rack
        return None

    # --- folding ---

    def begin_pull(self, record: Any, sequence: int, time_ms: int) -> None:
        self.hold(
            Pull(
                model=record["model"],
                version=record["version"],
                origin=record["origin"],
                checksum=record["checksum"],
                size=record["size"],
                since=record["since"],
                replicas=tuple(record["replicas"]),
                sequence=sequence,
            )
        )

    def hold(self, pull: Pull) -> None:
        self._end(pull.model, pull.version)
        self._pulls.setdefault(pull.model.lower(), {})[pull.version] = pull
        self.awaited[pull.origin] += 1

    def bring(self, record: Any, sequence: int, time_ms: int) -> None:
        pull = self.pull_of(record["model"], record["version"])
        if pull is None:
            return
        file: Blob | None = record["file"]
        if file is None:
            self._release(pull)
            return
        brought = self._brought.setdefault(pull, {})
        before = brought.get(file["sha256"])
        brought[file["sha256"]] = file, sequence
        self._blobs.use([file])
        if before is not None:
            self._blobs.release([before[0]["key"]])

    def _release(self, pull: Pull) -> None:
        self._blobs.release(file["key"] for file, _ in self._brought.pop(pull, {}).values())

    def has_brought(self, pull: Pull) -> bool:
        return pull in self._brought

    def brought(self) -> Iterator[tuple[Pull, Blob, int]]:
        """What is here of versions that are not, and the sequences of their records."""
        for pull, files in self._brought.items():
            for file, sequence in files.values():
                yield pull, file, sequence

    def end_pull(self, record: Any, sequence: int, time_ms: int) -> None:
        self._end(record["model"], record["version"])

    def _end(self, model: str, version: str) -> None:
        pulls = self._pulls.get(model.lower(), {})
        pull = pulls.pop(version, None)
        if pull is not None:
            self.awaited[pull.origin] -= 1
            self._release(pull)
            if not pulls:
                del self._pulls[model.lower()]

    def follow(self, record: Any, sequence: int, time_ms: int) -> None:
        self.cursors[record["origin"]] = Cursor(record["registry"], record["epoch"], record["after"], sequence)

    def store(self, row: int, origin: str) -> None:
        """The version in a new row is a copy of that rack's."""
        self.rows[origin].append(row)


def _no_rows() -> array[int]:
    return array("I")
