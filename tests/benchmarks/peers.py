"""What durable writes to the registry are measured against: SQLite, and the disk itself."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import orjson

from tests.benchmarks.records import key_of, store_record
from tests.benchmarks.rounds import percentile


@dataclass(frozen=True, slots=True)
class Writes:
    """Acknowledged writes; `p50` and `p99` of what one took, in seconds."""

    per_second: float
    p50: float
    p99: float

    @classmethod
    def of(cls, latencies: list[float], seconds: float) -> Writes:
        return cls(len(latencies) / seconds, percentile(latencies, 0.5), percentile(latencies, 0.99))


def appended(path: Path, line: bytes, seconds: float) -> Writes:
    """`line` appended to a file that grows, one fdatasync each: what the disk allows a lone writer of a log."""
    latencies: list[float] = []
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        began = time.perf_counter()
        while (now := time.perf_counter()) < began + seconds:
            os.write(fd, line)
            os.fdatasync(fd)
            latencies.append(time.perf_counter() - now)
        return Writes.of(latencies, time.perf_counter() - began)
    finally:
        os.close(fd)


class SqliteWrites:
    """WAL, synchronous=FULL, one row a commit, a connection for each thread."""

    def __init__(self, database: Path) -> None:
        self._database = database
        self._numbers = count()
        with closing(self._connect()) as connection:
            connection.execute(
                "CREATE TABLE versions (model TEXT, version TEXT, body BLOB, PRIMARY KEY (model, version))"
            )

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._database, timeout=60, isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        return connection

    def write(self, threads: int, rows: int) -> Writes:
        """`rows` in all, encoded as they are written; they are made before the clock starts."""
        numbers = [[next(self._numbers) for _ in range(rows // threads)] for _ in range(threads)]
        parts = [[(*key_of(number), store_record(number)) for number in part] for part in numbers]
        latencies: list[float] = []

        def writer(part: Sequence[tuple[str, str, object]]) -> None:
            with closing(self._connect()) as connection:
                for model, version, record in part:
                    now = time.perf_counter()
                    body = orjson.dumps(record)
                    connection.execute("INSERT INTO versions VALUES (?, ?, ?)", (model, version, body))
                    latencies.append(time.perf_counter() - now)

        running = [threading.Thread(target=writer, args=(part,)) for part in parts]
        began = time.perf_counter()
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        return Writes.of(latencies, time.perf_counter() - began)

    async def write_awaited(self, writers: int, rows: int) -> Writes:
        """`rows` in all, by tasks of an event loop that have them written on a thread, as a program that must not block
        does it."""
        numbers = [next(self._numbers) for _ in range(rows)]
        left = iter([(*key_of(number), store_record(number)) for number in numbers])
        latencies: list[float] = []
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as thread:
            connection = await loop.run_in_executor(thread, self._connect)

            async def writer() -> None:
                for model, version, record in left:
                    now = time.perf_counter()
                    row = (model, version, orjson.dumps(record))
                    await loop.run_in_executor(thread, connection.execute, "INSERT INTO versions VALUES (?, ?, ?)", row)
                    latencies.append(time.perf_counter() - now)

            began = time.perf_counter()
            await asyncio.gather(*(writer() for _ in range(writers)))
            writes = Writes.of(latencies, time.perf_counter() - began)
            await loop.run_in_executor(thread, connection.close)
        return writes
