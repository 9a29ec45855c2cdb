"""Redis, a peer where it is installed: durable writes (`appendfsync always`) by its own client in C, and its boot."""

from __future__ import annotations

import csv
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson

from tests.benchmarks.peers import Writes
from tests.benchmarks.records import key_of, store_record
from tests.benchmarks.services import Services

CONNECTIONS = 64
_READY_S = 10.0
_LOADED_S = 300.0
_LOADED = re.compile(r"DB loaded from append only file: ([0-9.]+) seconds")
_KEYS = 10_000_000


@contextmanager
def redis_server(services: Services, folder: Path) -> Iterator[int | None]:
    """A server of our own on a free port of the loopback, its files in `folder`: the port; None if Redis is not
    installed."""
    if shutil.which("redis-server") is None or shutil.which("redis-benchmark") is None:
        yield None
        return
    folder.mkdir()
    port = _free_port()
    with services.process("redis", _command(folder, port, "always")):
        _wait(port)
        yield port


def _command(folder: Path, port: int, fsync: str) -> list[str]:
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--save", ""]
    return [*command, "--appendonly", "yes", "--appendfsync", fsync, "--auto-aof-rewrite-percentage", "0"]


class RedisBoot:
    """An append-only file of `versions` values, and how long a server takes to load it."""

    def __init__(self, services: Services, folder: Path, versions: int) -> None:
        self._services = services
        self._folder = folder
        folder.mkdir()
        port = _free_port()
        with services.process("redis-fill", _command(folder, port, "no")):
            _wait(port)
            pipe = subprocess.Popen(
                ["redis-cli", "-p", str(port), "--pipe"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
            )
            with pipe:
                assert pipe.stdin is not None
                for number in range(versions):
                    pipe.stdin.write(_set(":".join(key_of(number)).encode(), orjson.dumps(store_record(number))))
            if pipe.returncode:
                raise RuntimeError(f"redis-cli ended with {pipe.returncode}")

    def load(self) -> float:
        """Seconds, as the server tells them."""
        log = self._services.folder / "redis-boot.log"
        log.unlink(missing_ok=True)
        with self._services.process("redis-boot", _command(self._folder, _free_port(), "no")):
            give_up = time.monotonic() + _LOADED_S
            while (loaded := _LOADED.search(log.read_text() if log.exists() else "")) is None:
                if time.monotonic() > give_up:
                    raise TimeoutError(f"Redis has not loaded its file after {_LOADED_S:.0f} s")
                time.sleep(0.1)
        return float(loaded[1])


def _set(key: bytes, value: bytes) -> bytes:
    return b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(key), key, len(value), value)


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
