"""Durable writes to Redis (`appendfsync always`), by its own client in C: a peer, where it is installed."""

from __future__ import annotations

import csv
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.benchmarks.peers import Writes
from tests.benchmarks.services import Services

CONNECTIONS = 64
_READY_S = 10.0
_KEYS = 10_000_000


@contextmanager
def redis_server(services: Services, folder: Path) -> Iterator[int | None]:
    """A server of our own on a free port of the loopback, its files in `folder`: the port; None if Redis is not
    installed."""
    server = shutil.which("redis-server")
    if server is None or shutil.which("redis-benchmark") is None:
        yield None
        return
    folder.mkdir()
    port = _free_port()
    command = [server, "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--save", ""]
    command += ["--appendonly", "yes", "--appendfsync", "always", "--auto-aof-rewrite-percentage", "0"]
    with services.process("redis", command):
        _wait(port)
        yield port


def redis_writes(port: int, count: int, size: int) -> Writes:
    """`count` values of `size` bytes under keys of their own, over `CONNECTIONS` connections."""
    command = ["redis-benchmark", "-p", str(port), "-c", str(CONNECTIONS), "-n", str(count), "-d", str(size)]
    command += ["-r", str(_KEYS), "-t", "set", "--csv"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    row = next(csv.DictReader(output.splitlines()))
    return Writes(float(row["rps"]), float(row["p50_latency_ms"]) / 1000, float(row["p99_latency_ms"]) / 1000)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(port: int) -> None:
    give_up = time.monotonic() + _READY_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.05)
