"""Boot: a journal replayed into the catalog, beside `orjson.loads` over the same lines."""

from __future__ import annotations

import asyncio
import gc
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import orjson
import psutil

from tests.benchmarks.bench import Bench
from tests.benchmarks.records import journal_lines
from tests.benchmarks.rounds import best_of
from tests.benchmarks.table import Table, Target, mebibytes, times
from worker.registry import Registry
from worker.upkeep.compaction import compact_folder

SPEED = Target(2.0, 1.3, at_most=True)
INDEXED = Target(0.8, 0.5, at_most=True)
MEMORY = Target(450, 300, " B", at_most=True)


@dataclass(frozen=True, slots=True)
class Replay:
    """`memory_bytes` is by how much the process has grown."""

    seconds: float
    memory_bytes: int


def measure(bench: Bench) -> Iterator[Table]:
    registry = bench.registry
    size = sum(path.stat().st_size for path in journal_lines(registry))
    compacted = bench.folder / "compacted"
    shutil.copytree(registry, compacted)
    asyncio.run(compact_folder(compacted))
    best = best_of(
        bench.rounds,
        {
            "open": lambda: _in_new_process(_open, registry),
            "indexed": lambda: _in_new_process(_open, compacted),
            "loads": lambda: _in_new_process(_loads, registry),
        },
        lambda replay: -replay.seconds,
    )
    table = Table(
        f"Boot: {bench.versions:,} versions, {mebibytes(size)} MiB of journal, each in a new process",
        ["what", "seconds", "versions/s", "B a version", "ratio"],
    )
    ratio = best["open"].seconds / best["loads"].seconds
    each = best["open"].memory_bytes / bench.versions
    table.add("orjson.loads", f"{best['loads'].seconds:.2f}", f"{bench.versions / best['loads'].seconds:,.0f}")
    table.add(
        "Registry.open",
        f"{best['open'].seconds:.2f}",
        f"{bench.versions / best['open'].seconds:,.0f}",
        "",
        times(ratio),
        value=ratio,
        target=SPEED,
    )
    ratio = best["indexed"].seconds / best["loads"].seconds
    table.add(
        "Registry.open, compacted: from the index",
        f"{best['indexed'].seconds:.2f}",
        f"{bench.versions / best['indexed'].seconds:,.0f}",
        "",
        times(ratio),
        value=ratio,
        target=INDEXED,
    )
    table.add("memory of the catalog", "", "", f"{each:,.0f}", value=each, target=MEMORY)
    yield table


def _in_new_process(work: Callable[[Path], Replay], registry: Path) -> Replay:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, registry).result()


def _loads(folder: Path) -> Replay:
    resident = psutil.Process().memory_info().rss
    began = time.perf_counter()
    for path in journal_lines(folder):
        with path.open("rb", buffering=256 * 1024) as lines:
            for line in lines:
                orjson.loads(line)
    return Replay(time.perf_counter() - began, psutil.Process().memory_info().rss - resident)


def _open(folder: Path) -> Replay:
    registry = Registry(folder)
    gc.collect()
    resident = psutil.Process().memory_info().rss
    began = time.perf_counter()
    registry.open()
    replay = Replay(time.perf_counter() - began, psutil.Process().memory_info().rss - resident)
    asyncio.run(registry.close())
    return replay
