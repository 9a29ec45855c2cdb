"""Durable writes to the registry, inside the process, beside SQLite with one row a commit."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import orjson

from tests.benchmarks.bench import Bench
from tests.benchmarks.records import VERSIONS_PER_MODEL, key_of, store_record
from tests.benchmarks.rounds import best_of, percentile
from tests.benchmarks.table import Table, Target, microseconds, rate, times
from worker.registry import Change, Registry

# SQLite has one writer at a time: more threads than these only wait for its lock.
SQLITE_THREADS = 8
TARGETS = {1: Target(0.7, 1.0), 64: Target(12, 20), 512: Target(20, 30)}


@dataclass(frozen=True, slots=True)
class Writes:
    """`latencies` in seconds, one for each acknowledged write."""

    seconds: float
    latencies: list[float]

    @property
    def per_second(self) -> float:
        return len(self.latencies) / self.seconds


def measure(bench: Bench) -> Iterator[Table]:
    table = Table(
        "Durable registry writes a second, in process: transact (journal, fsync, catalog) beside SQLite",
        ["concurrent", "registry", "p50 us", "p99 us", "SQLite", "p50 us", "p99 us", "ratio"],
        f"SQLite: WAL, synchronous=FULL, one row a commit, a connection a thread, at most {SQLITE_THREADS} threads",
    )
    seconds = bench.pick(1.5, 0.5)
    with asyncio.Runner() as runner:
        registry = Registry(bench.folder / "writes")
        registry.open()
        runner.run(_start(registry))
        numbers = count()
        rows = count()
        database = bench.folder / "writes.sqlite"
        _make_database(database)
        for writers, target in TARGETS.items():
            best = best_of(
                bench.rounds,
                {
                    "registry": partial(_written, runner, registry, writers, seconds, numbers),
                    "sqlite": partial(_insert, database, min(writers, SQLITE_THREADS), seconds, rows),
                },
                lambda writes: writes.per_second,
            )
            ratio = best["registry"].per_second / best["sqlite"].per_second
            table.add(
                str(writers),
                *_cells(best["registry"]),
                *_cells(best["sqlite"]),
                times(ratio),
                value=ratio,
                target=target,
                judged_as=f"{writers} concurrent",
            )
        runner.run(registry.close())
    yield table


def _cells(writes: Writes) -> tuple[str, str, str]:
    return (
        rate(writes.per_second),
        microseconds(percentile(writes.latencies, 0.5)),
        microseconds(percentile(writes.latencies, 0.99)),
    )


async def _start(registry: Registry) -> None:
    registry.start()


def _written(runner: asyncio.Runner, registry: Registry, writers: int, seconds: float, numbers: count[int]) -> Writes:
    return runner.run(_write(registry, writers, seconds, numbers))


async def _write(registry: Registry, writers: int, seconds: float, numbers: count[int]) -> Writes:
    latencies: list[float] = []
    began = time.perf_counter()
    end = began + seconds

    async def writer() -> None:
        while (now := time.perf_counter()) < end:
            # Each writes to a model of its own: the writes of one model wait for each other, by design.
            change = Change("store", store_record(next(numbers) * VERSIONS_PER_MODEL))
            await registry.transact(change.record["model"], partial(_decided, change))
            latencies.append(time.perf_counter() - now)

    await asyncio.gather(*(writer() for _ in range(writers)))
    return Writes(time.perf_counter() - began, latencies)


def _decided(change: Change) -> Change:
    return change


def _connect(database: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(database, timeout=60, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    return connection


def _make_database(database: Path) -> None:
    with closing(_connect(database)) as connection:
        connection.execute("CREATE TABLE versions (model TEXT, version TEXT, body BLOB, PRIMARY KEY (model, version))")


def _insert(database: Path, threads: int, seconds: float, rows: count[int]) -> Writes:
    latencies: list[float] = []
    began = time.perf_counter()
    end = began + seconds

    def writer() -> None:
        with closing(_connect(database)) as connection:
            while (now := time.perf_counter()) < end:
                number = next(rows)
                body = orjson.dumps(store_record(number))
                connection.execute("INSERT INTO versions VALUES (?, ?, ?)", (*key_of(number), body))
                latencies.append(time.perf_counter() - now)

    running = [threading.Thread(target=writer) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return Writes(time.perf_counter() - began, latencies)
