"""Storing to disk and fetching from it, beside the plain ways to do the same with a file."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.local.identity import recall_ports
from deploy.local.server import wait_until_ready
from tests.benchmarks.bench import Bench
from tests.benchmarks.bytes_of_models import copy_and_sync, per_second, plain_read, put, random_file, sha256_alone
from tests.benchmarks.http_transfer import get_and_drop, put_file
from tests.benchmarks.rounds import best_of
from tests.benchmarks.services import Services, Worker
from tests.benchmarks.table import Table, Target, mebibytes, times
from worker.storage.disk import DiskStore

STORE = Target(0.8, 0.95)
FETCH = Target(0.8, 1.0)
_MIB = 1024 * 1024
_FETCHES = 4
_NGINX_READY_S = 10.0


def measure(bench: Bench) -> Iterator[Table]:
    size = int(bench.pick(512, 256)) * _MIB
    source = random_file(bench.folder / "source", size)
    with bench.services.standalone("bench-disk") as worker:
        yield _stores(bench, worker, source, size)
        yield _fetches(bench, worker, source, size)


def _stores(bench: Bench, worker: Worker, source: Path, size: int) -> Table:
    folder = bench.folder / "stores"
    copy = bench.folder / "copy"
    numbers = iter(range(1000))

    def stored() -> None:
        async def work() -> None:
            store = DiskStore(folder)
            await put(store, source)
            await store.close()

        asyncio.run(work())

    def sent() -> None:
        put_file(f"{worker.url}/api/models/bench/versions/{next(numbers)}/content?type=custom", source)

    best = best_of(
        bench.rounds,
        {
            "sha256": lambda: per_second(size, lambda: sha256_alone(source)),
            "copy": lambda: per_second(size, lambda: copy_and_sync(source, copy)),
            "put": lambda: _and_remove(folder, per_second(size, stored)),
            "http": lambda: per_second(size, sent),
        },
        lambda rate: rate,
    )
    bound = min(best["sha256"], best["copy"])
    table = Table(
        f"Store {mebibytes(size)} MiB to disk, MiB/s",
        ["what", "MiB/s", "x bound"],
        "bound: the slower of the first two",
    )
    table.add("sha256 alone", mebibytes(best["sha256"]))
    table.add("copy: read, write, fsync", mebibytes(best["copy"]))
    for name, what in (("put", "DiskStore.put"), ("http", "HTTP PUT to the worker")):
        ratio = best[name] / bound
        table.add(what, mebibytes(best[name]), times(ratio), value=ratio, target=STORE)
    return table


def _and_remove(folder: Path, rate: float) -> float:
    shutil.rmtree(folder)
    return rate


def _fetches(bench: Bench, worker: Worker, source: Path, size: int) -> Table:
    def fetch(url: str) -> float:
        def fetches() -> None:
            for _ in range(_FETCHES):
                get_and_drop(url)

        return per_second(size * _FETCHES, fetches)

    contenders = {
        "read": lambda: per_second(size, lambda: plain_read(source)),
        "http": lambda: fetch(f"{worker.url}/api/models/bench/versions/0/content"),
    }
    with _nginx(bench.services, source.parent) as url:
        if url is not None:
            contenders["nginx"] = lambda: fetch(f"{url}/{source.name}")
        best = best_of(bench.rounds, contenders, lambda rate: rate)
    table = Table(f"Fetch {mebibytes(size)} MiB from disk, MiB/s", ["what", "MiB/s", "x nginx"])
    table.add("plain read of the file", mebibytes(best["read"]))
    if "nginx" in best:
        ratio = best["http"] / best["nginx"]
        table.add("nginx, sendfile", mebibytes(best["nginx"]))
        table.add("HTTP GET from the worker", mebibytes(best["http"]), times(ratio), value=ratio, target=FETCH)
    else:
        table.add("HTTP GET from the worker", mebibytes(best["http"]), "no nginx here")
    return table


@contextmanager
def _nginx(services: Services, root: Path) -> Iterator[str | None]:
    """The address of an nginx that serves the files of `root`; None where it is not installed."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        yield None
        return
    folder = services.folder / "nginx"
    folder.mkdir()
    port = recall_ports(folder / "ports.json", "http")["http"]
    user = "user root;" if os.geteuid() == 0 else ""
    temporary = " ".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; {user} pid {folder}/pid; error_log stderr; worker_processes 1; events {{}}\n"
        f"http {{ access_log off; sendfile on; tcp_nopush on; {temporary}\n"
        f"server {{ listen 127.0.0.1:{port}; root {root}; }} }}\n"
    )
    with services.process("nginx", [program, "-p", str(folder), "-c", str(folder / "nginx.conf")]) as process:
        wait_until_ready(process, "nginx", lambda: _accepts(port), timeout_s=_NGINX_READY_S)
        yield f"http://127.0.0.1:{port}"


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
