"""Boot: a journal replayed into the catalog, beside `orjson.loads` over the same lines, SQLite and Redis."""

from __future__ import annotations

import asyncio
import gc
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import orjson
import psutil

from tests.benchmarks import sqlite_boot
from tests.benchmarks.bench import Bench
from tests.benchmarks.records import journal_lines, seal, write_journal
from tests.benchmarks.redis_peer import RedisBoot
from tests.benchmarks.rounds import best_of
from tests.benchmarks.table import Table, Target, mebibytes, times
from worker.registry import Registry
from worker.upkeep.compaction import compact_folder

MEMORY = Target(450, 300, " B", at_most=True)
_LOADS = "orjson.loads of each line"
_LEFT, _CHECKED, _SEALED, _INDEXED = "as a worker leaves it", "line-checked", "sealed", "from the index"
# A boot of each journal against `_LOADS`.
SPEED = {
    _LEFT: Target(2.0, 1.3, at_most=True),
    _CHECKED: Target(2.0, 1.3, at_most=True),
    _SEALED: Target(1.6, 1.3, at_most=True),
    _INDEXED: Target(0.8, 0.5, at_most=True),
}
_COLUMNS, _DICT, _REDIS = "SQLite: its columns, into the same catalog", "SQLite: all decoded, into a dict", "Redis: AOF"
_DICT_UNCOLLECTED = f"{_DICT}, collector off"
# How many times as fast as these a boot is.
PEERS: dict[tuple[str, str], Target | None] = {
    (_CHECKED, _COLUMNS): Target(0.77, 1),
    (_SEALED, _COLUMNS): Target(1.3, 1.5),
    (_INDEXED, _COLUMNS): Target(2.3, 3),
    (_SEALED, _DICT): Target(3, 4),
    (_SEALED, _DICT_UNCOLLECTED): None,
    (_SEALED, _REDIS): Target(0.91, 1.2),
    (_INDEXED, _REDIS): None,
}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Boot:
    """`memory_bytes` is by how much the process has grown."""

    seconds: float
    memory_bytes: int


def measure(bench: Bench) -> Iterator[Table]:
    journals = _journals(bench)
    database = bench.folder / "boot.sqlite"
    sqlite_boot.fill(database, bench.versions)
    contenders: dict[str, Callable[[], Boot]] = {
        what: partial(_in_new_process, _open, folder) for what, folder in journals.items()
    }
    contenders[_LOADS] = partial(_in_new_process, _loads, bench.registry)
    contenders[_COLUMNS] = partial(_timed, _in_new_process, sqlite_boot.seconds_into_catalog, database)
    contenders[_DICT] = partial(_timed, _in_new_process, sqlite_boot.seconds_into_dict, database)
    contenders[_DICT_UNCOLLECTED] = partial(
        _timed, _in_new_process, sqlite_boot.seconds_into_dict_uncollected, database
    )
    if shutil.which("redis-server") and shutil.which("redis-cli"):
        contenders[_REDIS] = partial(
            _timed, RedisBoot(bench.services, bench.folder / "redis-boot", bench.versions).load
        )
    best = best_of(bench.rounds, contenders, lambda boot: -boot.seconds)
    size = sum(path.stat().st_size for path in journal_lines(bench.registry))
    yield _against_loads(bench.versions, size, best)
    yield _against_peers(best)


def _journals(bench: Bench) -> dict[str, Path]:
    """The same versions as journals can hold them."""
    checked, sealed, compacted = (bench.folder / name for name in ("checked", "sealed", "compacted"))
    write_journal(checked, bench.versions, segment_bytes=1 << 40)
    shutil.copytree(bench.registry, sealed)
    seal(sealed)
    shutil.copytree(bench.registry, compacted)
    asyncio.run(compact_folder(compacted))
    return {_LEFT: bench.registry, _CHECKED: checked, _SEALED: sealed, _INDEXED: compacted}


def _against_loads(versions: int, size: int, best: dict[str, Boot]) -> Table:
    table = Table(
        f"Boot: {versions:,} versions, {mebibytes(size)} MiB of journal, each in a new process",
        ["what", "seconds", "versions/s", "B a version", "ratio"],
        "as a worker leaves it: sealed files and an active one; line-checked: all in the active one",
    )
    floor = best[_LOADS].seconds
    table.add(_LOADS, *_cells(versions, floor))
    for what, target in SPEED.items():
        seconds = best[what].seconds
        cells = (f"Registry.open, {what}", *_cells(versions, seconds), "", times(seconds / floor))
        table.add(*cells, value=seconds / floor, target=target)
    each = best[_LEFT].memory_bytes / versions
    table.add("memory of the catalog", "", "", f"{each:,.0f}", value=each, target=MEMORY)
    return table


def _cells(versions: int, seconds: float) -> tuple[str, str]:
    return f"{seconds:.2f}", f"{versions / seconds:,.0f}"


def _against_peers(best: dict[str, Boot]) -> Table:
    table = Table(
        "Boot, beside the boots of others",
        ["what", "seconds", "the other's", "times as fast"],
        "SQLite that is only opened and asked takes milliseconds: what is compared is a catalog in memory",
    )
    if _REDIS not in best:
        table.note("Redis was SKIPPED: redis-server and redis-cli are not installed")
    for (what, peer), target in PEERS.items():
        if peer in best:
            own, other = best[what].seconds, best[peer].seconds
            cells = (f"{what}, against {peer}", f"{own:.2f}", f"{other:.2f}", times(other / own))
            table.add(*cells, value=other / own, target=target)
    return table


def _timed(work: Callable[..., float], *arguments: object) -> Boot:
    return Boot(work(*arguments), 0)


def _in_new_process(work: Callable[[Path], T], path: Path) -> T:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, path).result()


def _loads(folder: Path) -> Boot:
    resident = psutil.Process().memory_info().rss
    began = time.perf_counter()
    for path in journal_lines(folder):
        with path.open("rb", buffering=256 * 1024) as lines:
            for line in lines:
                orjson.loads(line)
    return Boot(time.perf_counter() - began, psutil.Process().memory_info().rss - resident)


def _open(folder: Path) -> Boot:
    registry = Registry(folder)
    gc.collect()
    resident = psutil.Process().memory_info().rss
    began = time.perf_counter()
    registry.open()
    boot = Boot(time.perf_counter() - began, psutil.Process().memory_info().rss - resident)
    asyncio.run(registry.close())
    return boot
