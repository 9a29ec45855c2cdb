"""A boot from SQLite: the peer of a journal that is replayed."""

from __future__ import annotations

import gc
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tests.benchmarks.records import key_of, store_record
from worker.catalog.catalog import Catalog
from worker.catalog.extracts import extract
from worker.catalog.records import IndexedFile, IndexedMetadata, IndexedRecord
from worker.journal.format import FORMAT_VERSION, Line

_ROWS_AT_ONCE = 10_000
_ROWS_A_BLOCK = 256  # as many as the journal hands over at once

_INDEXED = "rowid, model, version, type, size, created, file_size, sha256, key, tags"


@dataclass(frozen=True, slots=True)
class _Block:
    lines: list[Line[IndexedRecord]]

    def text(self, index: int) -> bytes:
        raise NotImplementedError(f"line {index} is no text")


def fill(database: Path, versions: int) -> None:
    """A table of versions: what the catalog indexes in columns of its own, and the whole record."""
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(
            "CREATE TABLE versions (model TEXT, version TEXT, type TEXT, size INTEGER, created INTEGER,"
            " file_size INTEGER, sha256 TEXT, key TEXT, tags TEXT, body BLOB, PRIMARY KEY (model, version))"
        )
        for start in range(0, versions, _ROWS_AT_ONCE):
            rows = [_row(number) for number in range(start, min(start + _ROWS_AT_ONCE, versions))]
            connection.executemany("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        connection.commit()


def _row(number: int) -> tuple[Any, ...]:
    record = store_record(number)
    (file,) = record["files"]
    indexed = (*key_of(number), record["type"], record["size"], record["created"])
    tags = " ".join(record["metadata"]["tags"])
    return (*indexed, file["size"], file["sha256"], file["key"], tags, orjson.dumps(record))


def seconds_into_catalog(database: Path) -> float:
    """The same catalog as the journal's, filled from the columns, and as there without Python's collector."""
    gc.disable()
    began = time.perf_counter()
    catalog = Catalog(_no_record)
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute(f"SELECT {_INDEXED} FROM versions ORDER BY rowid")
        while block := rows.fetchmany(_ROWS_A_BLOCK):
            catalog.take(extract(_Block([_line(*row) for row in block])))
    catalog.settle()
    return time.perf_counter() - began


def _line(
    sequence: int,
    model: str,
    version: str,
    kind: str,
    size: int,
    created: int,
    file_size: int,
    sha256: str,
    key: str,
    tags: str,
) -> Line[IndexedRecord]:
    files, metadata = (IndexedFile(file_size, sha256, key),), IndexedMetadata(tuple(tags.split()))
    record = IndexedRecord(model, version, kind, files, metadata, size, created)
    return Line(FORMAT_VERSION, sequence, sequence, created, "store", record)


def _no_record(sequence: int, *, wait: bool) -> tuple[Any, int]:
    raise KeyError(sequence)


def seconds_into_dict(database: Path) -> float:
    """Every record decoded, in a dict by its key, as Python does it: its collector takes most of the time."""
    began = time.perf_counter()
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT model, version, body FROM versions")
        records = {(model, version): orjson.loads(body) for model, version, body in rows}
    seconds = time.perf_counter() - began
    assert records
    return seconds


def seconds_into_dict_uncollected(database: Path) -> float:
    gc.disable()
    return seconds_into_dict(database)
