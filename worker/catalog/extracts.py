"""What a replay takes of the journal's lines: extracted wherever there is a processor for it, taken by the catalog."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import TypeVar

import msgspec
import numpy as np

from worker.catalog.records import IndexedBlock, IndexedLine

_STORE = "store"
_MIX = 0x9E37_79B9_7F4A_7C15
_KEY_CHARACTERS = 16
_SHA_WORDS = 4  # of 8 bytes

T = TypeVar("T")


class Names(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A column of few texts: each once, and which one stands in each row."""

    texts: list[str]
    places: bytes

    @classmethod
    def of(cls, column: list[str]) -> Names:
        known: dict[str, int] = {}
        places = [known.setdefault(text, len(known)) for text in column]
        return cls(list(known), array("I", places).tobytes())

    def spread(self, values: Sequence[T]) -> list[T]:
        """For each row that one of `values` that stands where its text stands among the texts."""
        return [values[place] for place in memoryview(self.places).cast("I")]


class Run(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """`store` records that follow each other, in columns, and the line behind them that is of another kind, if one is.

    Columns that are bytes have 8 of them an item, but for `file_counts`, the rows of `tags` and the places of Names,
    which have 4; rows count from 0.
    """

    models: list[str]
    versions: Names
    types: Names
    sizes: bytes
    created: bytes
    sequences: bytes
    file_counts: bytes
    file_sizes: bytes
    sha_hashes: bytes
    key_hashes: bytes
    tags: dict[str, bytes]
    # Row and rack.
    replicas: list[tuple[int, str]]
    # Upload, sequence and time.
    uploads: list[tuple[str, int, int]]
    # Key, hash, sequence and time.
    requests: list[tuple[str, str, int, int]]
    other: bytes


class Extract(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Of some lines in order; `latest_ms` is the latest time of all, `last_ms` that of the last."""

    runs: list[Run]
    latest_ms: int
    last_ms: int


def extract(block: IndexedBlock) -> Extract:
    """Of business records, decoded as `IndexedRecord`. Depends on nothing else."""
    lines = block.lines
    if not lines:
        return Extract([], 0, 0)
    others = [index for index, line in enumerate(lines) if line.op != _STORE]
    stores = [line for line in lines if line.op == _STORE] if others else lines
    files = [line.record.files for line in stores]
    each = list(chain.from_iterable(files))
    shas = sha_hashes([file.sha256 for file in each]).tobytes()
    keys = key_hashes([file.key for file in each]).tobytes()
    counts = list(map(len, files))
    sizes = array("Q", [file.size for file in each]).tobytes()
    before = list(accumulate(counts, initial=0))  # files, of each store
    runs: list[Run] = []
    begin = 0
    for place, index in enumerate((*others, len(lines))):
        end = index - place  # of the stores
        first, last = 8 * before[begin], 8 * before[end]
        runs.append(
            _run(
                stores[begin:end],
                array("I", counts[begin:end]).tobytes(),
                (sizes[first:last], shas[first:last], keys[first:last]),
                block.text(index) if index < len(lines) else b"",
            )
        )
        begin = end
    return Extract(runs, max([line.time_ms for line in lines]), lines[-1].time_ms)


def _run(stores: Sequence[IndexedLine], file_counts: bytes, of_files: tuple[bytes, bytes, bytes], other: bytes) -> Run:
    records = [line.record for line in stores]
    by_tag: dict[str, list[int]] = {}
    for row, tags in enumerate([record.metadata.tags for record in records]):
        for tag in tags:
            rows = by_tag.get(tag)
            if rows is None:
                by_tag[tag] = [row]
            else:
                rows.append(row)
    file_sizes, shas, keys = of_files
    return Run(
        models=[record.model for record in records],
        versions=Names.of([record.version or "" for record in records]),
        types=Names.of([record.type for record in records]),
        sizes=array("Q", [record.size for record in records]).tobytes(),
        created=array("Q", [record.created for record in records]).tobytes(),
        sequences=array("Q", [line.sequence for line in stores]).tobytes(),
        file_counts=file_counts,
        file_sizes=file_sizes,
        sha_hashes=shas,
        key_hashes=keys,
        tags={tag: array("I", rows).tobytes() for tag, rows in by_tag.items()},
        replicas=[(row, record.replica_of) for row, record in enumerate(records) if record.replica_of],
        uploads=[(line.record.upload, line.sequence, line.time_ms) for line in stores if line.record.upload],
        requests=[
            (line.record.idem.key, line.record.idem.hash, line.sequence, line.time_ms)
            for line in stores
            if line.record.idem is not None
        ],
        other=other,
    )


Hashes = np.ndarray[tuple[int], np.dtype[np.uint64]]


def sha_hashes(shas: Sequence[str]) -> Hashes:
    """The first 8 bytes of each sha256."""
    return np.frombuffer(bytes.fromhex("".join(shas)), ">u8")[::_SHA_WORDS].astype(np.uint64)


def key_hashes(keys: Sequence[str]) -> Hashes:
    """The last 16 characters of each key, which are the random part of a ULID, mixed into one number."""
    lengths = set(map(len, keys))
    if len(lengths) == 1 and (length := lengths.pop()) > _KEY_CHARACTERS:  # as nearly always
        characters = np.frombuffer("".join(keys).encode("latin-1"), np.uint8).reshape(-1, length)
        pairs = np.ascontiguousarray(characters[:, -_KEY_CHARACTERS:]).view("<u8")
    else:
        text = "".join([key[-_KEY_CHARACTERS:].rjust(_KEY_CHARACTERS) for key in keys])
        pairs = np.frombuffer(text.encode("latin-1"), "<u8").reshape(-1, 2)
    mixed: Hashes = pairs[:, 0] * np.uint64(_MIX) ^ pairs[:, 1]
    return mixed
