"""Durable writes to the registry, inside the process, beside SQLite, Redis and the disk itself."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

from tests.benchmarks.bench import Bench
from tests.benchmarks.peers import SqliteWrites, Writes, appended
from tests.benchmarks.records import VERSIONS_PER_MODEL, store_record
from tests.benchmarks.redis_peer import CONNECTIONS, redis_server, redis_writes
from tests.benchmarks.rounds import best_of
from tests.benchmarks.table import Table, Target, microseconds, milliseconds, rate, times
from worker.journal.format import encode, make_line
from worker.registry import Change, Registry

# SQLite has one writer at a time: more threads than these only wait for its lock.
SQLITE_THREADS = 8
SQLITE = {1: Target(0.7, 1.0), 64: Target(12, 20), 512: Target(20, 30)}
REDIS = Target(2, 3)
SYNCS = Target(8, 6, at_most=True)  # p99 of 64 writers, in fdatasyncs of one line
P99_OF_512 = Target(10, 5, " ms", at_most=True)
# Writes a round, which take about a second.
_REGISTRY = {1: 6_000, 64: 80_000, 512: 100_000}
_SQLITE = 8_000
_SQLITE_EACH = 2_000
_REDIS = 30_000


def measure(bench: Bench) -> Iterator[Table]:
    table = Table(
        "Durable registry writes a second, in process: transact (journal, fsync, catalog) beside its peers",
        ["concurrent", "a second", "p50 us", "p99 us", "registry's ratio"],
        "SQLite: WAL, synchronous=FULL, one row a commit; each writer is a thread with a connection of its own: the",
        f"design's ratio is to that. Beside it: {SQLITE_THREADS} threads for all writers, which it does best with,",
        "and tasks of an event loop that have it write on a thread, and await that",
        "append + fdatasync: one thread, a file that grows. SQLite overwrites its log in place, so that its sync need",
        "not commit the file's new size: it may be faster than this, and a lone writer of a log that grows never is",
        f"Redis: appendfsync always, redis-benchmark with {CONNECTIONS} connections, values of a line's size",
    )
    line, _ = make_line(1, 1, 0, encode("store", dict(store_record(1_000_000))), 0)
    with (
        asyncio.Runner() as runner,
        redis_server(bench.services, bench.folder / "redis") as redis,
    ):
        folders = (bench.folder / f"writes-{number}" for number in count())
        sqlite = SqliteWrites(bench.folder / "writes.sqlite")
        part = bench.pick(1, 0.3)
        for writers in SQLITE:
            contenders: dict[str, Callable[[], Writes]] = {
                "registry": partial(_written, runner, folders, writers, int(_REGISTRY[writers] * part)),
                "sqlite": partial(sqlite.write, writers, int((_SQLITE_EACH if writers > 1 else _SQLITE) * part)),
                "sqlite, awaited": partial(_awaited, runner, sqlite, writers, int(_SQLITE * part)),
                "append": partial(appended, bench.folder / "appended", line, part),
            }
            if writers > SQLITE_THREADS:
                contenders["sqlite, at best"] = partial(sqlite.write, SQLITE_THREADS, int(_SQLITE * part))
            if redis is not None and writers == CONNECTIONS:
                contenders["redis"] = partial(redis_writes, redis, int(_REDIS * part), len(line))
            _report(table, writers, best_of(bench.rounds, contenders, lambda writes: writes.per_second))
        if redis is None:
            table.note("Redis was SKIPPED: redis-server and redis-benchmark are not installed")
    yield table


def _report(table: Table, writers: int, best: dict[str, Writes]) -> None:
    registry, one_sync = best["registry"], best["append"].p50
    table.add(f"{writers}, registry", *_cells(registry))
    _add_peer(table, writers, "SQLite", best["sqlite"], registry, SQLITE[writers])
    _add_peer(table, writers, "SQLite, awaited", best["sqlite, awaited"], registry)
    if "sqlite, at best" in best:
        _add_peer(table, writers, f"SQLite, {SQLITE_THREADS} threads", best["sqlite, at best"], registry)
    _add_peer(table, writers, "append + fdatasync", best["append"], registry)
    if "redis" in best:
        _add_peer(table, writers, "Redis", best["redis"], registry, REDIS)
    syncs = registry.p99 / one_sync
    if writers == 64:
        cells = ("64, p99 of the registry, in appends", "", "", "", times(syncs))
        table.add(*cells, value=syncs, target=SYNCS, judged_as="64 concurrent: p99, in syncs")
    if writers == 512:
        cells = ("512, p99 of the registry", "", "", "", milliseconds(registry.p99))
        table.add(*cells, value=registry.p99 * 1000, target=P99_OF_512, judged_as="512 concurrent: p99")


def _add_peer(
    table: Table, writers: int, who: str, peer: Writes, registry: Writes, target: Target | None = None
) -> None:
    ratio = registry.per_second / peer.per_second
    cells = (f"{writers}, {who}", *_cells(peer), times(ratio))
    table.add(*cells, value=ratio, target=target, judged_as=f"{writers} concurrent, against {who}")


def _cells(writes: Writes) -> tuple[str, str, str]:
    return rate(writes.per_second), microseconds(writes.p50), microseconds(writes.p99)


def _awaited(runner: asyncio.Runner, sqlite: SqliteWrites, writers: int, rows: int) -> Writes:
    return runner.run(sqlite.write_awaited(writers, rows))


def _written(runner: asyncio.Runner, folders: Iterator[Path], writers: int, records: int) -> Writes:
    # Made before the clock starts. Each of a model of its own: the writes of one model wait for each other, by design.
    changes = [Change("store", store_record(number * VERSIONS_PER_MODEL)) for number in range(records)]
    gc.freeze()
    registry = Registry(next(folders))
    registry.open()
    return runner.run(_write(registry, writers, changes))


async def _write(registry: Registry, writers: int, changes: list[Change]) -> Writes:
    registry.start()
    latencies: list[float] = []
    left = iter(changes)

    async def writer() -> None:
        for change in left:
            now = time.perf_counter()
            await registry.transact(change.record["model"], partial(_decided, change))
            latencies.append(time.perf_counter() - now)

    began = time.perf_counter()
    await asyncio.gather(*(writer() for _ in range(writers)))
    writes = Writes.of(latencies, time.perf_counter() - began)
    await registry.close()
    return writes


def _decided(change: Change) -> Change:
    return change
