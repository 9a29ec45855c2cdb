"""Reading the catalog inside the process: by id and version beside SQLite, and searching."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson

from schemas.rpc import ListReply
from tests.benchmarks.bench import Bench
from tests.benchmarks.records import TAGS, TYPES, key_of, store_record
from tests.benchmarks.rounds import best_of
from tests.benchmarks.table import Table, Target, microseconds, milliseconds, times
from worker.catalog.entries import VersionEntry
from worker.catalog.search import page, search_query
from worker.journal import RecordCold
from worker.registry import Registry

LOOKUP = Target(3, 10)
SEARCH = Target(50, 10, " ms", at_most=True)
_SEARCHED = 1_000_000  # versions that the design's number is for
_ROWS_AT_ONCE = 10_000

Find = Callable[[str, str], object]


def measure(bench: Bench) -> Iterator[Table]:
    database = bench.folder / "lookups.sqlite"
    _fill(database, bench.versions)
    registry = Registry(bench.registry)
    registry.open()
    try:
        with closing(sqlite3.connect(database)) as connection:
            yield _lookups(bench, registry, connection)
        yield _searches(bench, registry)
    finally:
        asyncio.run(registry.close())


def _fill(database: Path, versions: int) -> None:
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE versions (model TEXT, version TEXT, body BLOB, PRIMARY KEY (model, version))")
        for start in range(0, versions, _ROWS_AT_ONCE):
            numbers = range(start, min(start + _ROWS_AT_ONCE, versions))
            rows = [(*key_of(number), orjson.dumps(store_record(number))) for number in numbers]
            connection.executemany("INSERT INTO versions VALUES (?, ?, ?)", rows)
        connection.commit()


# --- by id and version ---


def _lookups(bench: Bench, registry: Registry, connection: sqlite3.Connection) -> Table:
    catalog = registry.catalog

    def described(model: str, version: str) -> object:
        entry = resolved(model, version)
        return entry.described(catalog.aliases_of(entry))

    def encoded(model: str, version: str) -> object:
        return orjson.dumps(described(model, version))

    def selected(model: str, version: str) -> object:
        query = "SELECT body FROM versions WHERE model = ? AND version = ?"
        return orjson.loads(connection.execute(query, (model, version)).fetchone()[0])

    def resolved(model: str, version: str) -> VersionEntry:
        try:
            return catalog.resolve(model, version)
        except RecordCold as cold:  # the worker would read it on a thread
            registry.journal.record(cold.sequence)
            return resolved(model, version)

    keys = [key_of(number) for number in random.Random(1).choices(range(bench.versions), k=20_000)]
    best = best_of(
        bench.rounds,
        {
            "resolve": lambda: _seconds_each(resolved, keys),
            "described": lambda: _seconds_each(described, keys),
            "encoded": lambda: _seconds_each(encoded, keys),
            "sqlite": lambda: _seconds_each(selected, keys),
        },
        lambda seconds: -seconds,
    )
    table = Table(
        f"One lookup by id and version among {bench.versions:,}, in process", ["what", "us", "times as fast as SQLite"]
    )
    table.add("SQLite: select by the same key, orjson.loads", microseconds(best["sqlite"]))
    ratio = best["sqlite"] / best["resolve"]
    table.add("catalog: the entry", microseconds(best["resolve"]), times(ratio), value=ratio, target=LOOKUP)
    ratio = best["sqlite"] / best["described"]
    table.add("catalog: the whole reply", microseconds(best["described"]), times(ratio), value=ratio, target=LOOKUP)
    ratio = best["sqlite"] / best["encoded"]
    table.add("catalog: the whole reply, encoded", microseconds(best["encoded"]), times(ratio))
    return table


def _seconds_each(find: Find, keys: list[tuple[str, str]]) -> float:
    began = time.perf_counter()
    for model, version in keys:
        find(model, version)
    return (time.perf_counter() - began) / len(keys)


# --- searches ---


def _searches(bench: Bench, registry: Registry) -> Table:
    both: dict[str, Any] = {"type": TYPES[1], "tags": ["team-1"]}
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("type and tag", both, "modelId"),
        ("type and tag, largest first", both, "-size"),
        ("type and tag without a match", {"type": TYPES[0], "tags": [f"team-{TAGS - 1}"]}, "modelId"),
        ("type alone", {"type": TYPES[1]}, "modelId"),
        ("words in the text", {"text": f"model {bench.versions - 1}"}, "modelId"),
    ]
    table = Table(
        f"Search of {bench.versions:,} versions, milliseconds",
        ["criteria", "first time", "first page of 100", "all pages", "matches"],
        f"the design's number ({SEARCH}) is for a first page by type and tag at {_SEARCHED:,}: --versions {_SEARCHED}",
    )
    for name, criteria, sort in cases:
        first, _ = asyncio.run(_first_page(registry, criteria, sort))
        pages = [asyncio.run(_first_page(registry, criteria, sort))[0] for _ in range(5)]
        whole, matches = asyncio.run(_all_pages(registry, criteria, sort))
        indexed = "tags" in criteria
        table.add(
            name,
            milliseconds(first),
            milliseconds(min(pages)),
            milliseconds(whole),
            f"{matches:,}",
            value=min(pages) * 1000 if indexed and bench.versions >= _SEARCHED else None,
            target=SEARCH,
        )
    return table


async def _first_page(registry: Registry, criteria: dict[str, Any], sort: str) -> tuple[float, ListReply]:
    began = time.perf_counter()
    reply = await page(registry.catalog, search_query(criteria, sort), look=registry.look, limit=100, cursor=None)
    return time.perf_counter() - began, reply


async def _all_pages(registry: Registry, criteria: dict[str, Any], sort: str) -> tuple[float, int]:
    query = search_query(criteria, sort)
    began = time.perf_counter()
    matches, cursor = 0, None
    while True:
        reply = await page(registry.catalog, query, look=registry.look, limit=1000, cursor=cursor)
        matches += reply["count"]
        cursor = reply.get("nextCursor")
        if cursor is None:
            return time.perf_counter() - began, matches
