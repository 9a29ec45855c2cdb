"""Acknowledgements and lookups while the journal is compacted, beside the same load without."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from random import Random

from tests.benchmarks.bench import Bench
from tests.benchmarks.records import VERSIONS_PER_MODEL, key_of, store_record
from tests.benchmarks.rounds import percentile
from tests.benchmarks.table import Table, Target, milliseconds, times
from worker.registry import Change, Registry
from worker.upkeep.compaction import Compacted, Compaction

SLOWER = Target(3, 1.5, at_most=True)
STALL = Target(20, 10, " ms", at_most=True)
_COMPACTED = 1_000_000  # records that the design's numbers are for
_WRITERS = 8
_PAUSE_S = 0.001  # of each writer and of the reader: a worker that is busy, not one that is flooded


@dataclass(slots=True)
class Load:
    """Seconds that each acknowledgement took, and each lookup, from when it was due."""

    writes: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)


def measure(bench: Bench) -> Iterator[Table]:
    folder = bench.folder / "compacting"
    shutil.copytree(bench.registry, folder)
    os.sync()  # what was copied is not written back while we measure
    idle, busy, compacted = asyncio.run(_measure(bench, Registry(folder)))
    table = Table(
        f"While {compacted[-1].records:,} records are compacted: {_WRITERS} writers and a reader, each with a pause"
        f" of {_PAUSE_S * 1000:g} ms",
        ["what", "acks p50 ms", "acks p99 ms", "acks max ms", "reads p99 ms", "longest read ms", "ratio of p99"],
        f"compactions took {', '.join(f'{one.seconds:.1f}' for one in compacted)} s;"
        f" the design's numbers are for {_COMPACTED:,} records: --versions {_COMPACTED}",
    )
    ratio = percentile(busy.writes, 0.99) / percentile(idle.writes, 0.99)
    judged = bench.versions >= _COMPACTED
    table.add("idle", *_cells(idle))
    cells = ("compacting", *_cells(busy), times(ratio))
    table.add(*cells, value=ratio, target=SLOWER if judged else None, judged_as="p99 of acks, against idle")
    longest = max(busy.reads) * 1000
    table.add("longest read", value=longest, target=STALL if judged else None)
    yield table


def _cells(load: Load) -> list[str]:
    values = (
        percentile(load.writes, 0.5),
        percentile(load.writes, 0.99),
        max(load.writes),
        percentile(load.reads, 0.99),
        max(load.reads),
    )
    return [milliseconds(value) for value in values]


async def _measure(bench: Bench, registry: Registry) -> tuple[Load, Load, list[Compacted]]:
    await asyncio.to_thread(registry.open)
    registry.start()
    gc.collect()
    compaction = Compaction(registry)
    numbers = count(bench.versions * VERSIONS_PER_MODEL, VERSIONS_PER_MODEL)
    idle, busy = Load(), Load()
    compacted: list[Compacted] = []

    async def compact() -> None:
        compacted.append(await compaction.compact())

    for _ in range(bench.rounds):
        pause = partial(asyncio.sleep, bench.pick(4, 1))
        await _under_load(registry, bench.versions, numbers, idle, pause)
        await _under_load(registry, bench.versions, numbers, busy, compact)
    await registry.close()
    return idle, busy, compacted


async def _under_load(
    registry: Registry, versions: int, numbers: count[int], load: Load, work: Callable[[], Awaitable[None]]
) -> None:
    tasks = [asyncio.create_task(_write(registry, numbers, load)) for _ in range(_WRITERS)]
    tasks.append(asyncio.create_task(_read(registry, versions, load)))
    await work()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _write(registry: Registry, numbers: count[int], load: Load) -> None:
    while True:
        change = Change("store", store_record(next(numbers)))
        began = time.perf_counter()
        await registry.transact(change.record["model"], partial(_decided, change))
        load.writes.append(time.perf_counter() - began)
        await asyncio.sleep(_PAUSE_S)


def _decided(change: Change) -> Change:
    return change


async def _read(registry: Registry, versions: int, load: Load) -> None:
    random, catalog = Random(1), registry.catalog
    while True:
        due = time.perf_counter() + _PAUSE_S
        await asyncio.sleep(_PAUSE_S)
        key = key_of(random.randrange(versions))
        await registry.look(partial(catalog.resolve, *key))
        load.reads.append(time.perf_counter() - due)
