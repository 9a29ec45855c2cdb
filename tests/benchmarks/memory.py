"""What a large store costs: the worker's memory, and the latency of lookups while it runs.

A store is done in four ways: by HTTP PUT and by an upload, to disk and to S3; then eight at once. A child process
brings the bytes of sparse files. Meanwhile `listModels` is called over RPC, at most two hundred times a second. The
control is the same load outside the worker: the same store class puts the same bytes in a process at `nice -n 19`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from tests.benchmarks.bench import Bench
from tests.benchmarks.bytes_of_models import put, sparse_file
from tests.benchmarks.http_transfer import put_file
from tests.benchmarks.records import write_journal
from tests.benchmarks.rounds import percentile
from tests.benchmarks.rpc_caller import Load, RpcCaller
from tests.benchmarks.services import BUCKET, Worker
from tests.benchmarks.table import Table, Target, mebibytes, milliseconds, times
from worker.client.client import ModelManagerClient
from worker.client.http_caller import HttpCaller
from worker.storage.blobstore import BlobStore
from worker.storage.disk import DiskStore
from worker.storage.s3 import S3Store

MEMORY = Target(256, 128, " MiB", at_most=True)
LATENCY = Target(1.3, 1.0, at_most=True)
_MIB = 1024 * 1024
_CATALOG = 1000
_EVERY_S = 0.005
_CALLS = 300  # fewer say too little of a 99th percentile to judge by it
_NICENESS = 19
_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Seen:
    """One large store as it looked from outside."""

    seconds: float
    lookups: Load
    peak_bytes: int

    @property
    def p99(self) -> float:
        return percentile(self.lookups.latencies, 0.99)


@dataclass(frozen=True, slots=True)
class Source:
    """Files to be stored at once, and where to: `s3` is the endpoint, None means to `folder`."""

    paths: tuple[Path, ...]
    url: str
    folder: Path
    s3: str | None


def measure(bench: Bench) -> Iterator[Table]:
    one, each_of_eight = (int(bench.pick(*sizes)) * _MIB for sizes in ((2048, 512), (1024, 64)))
    table = Table(
        f"Storing {mebibytes(one)} MiB, or {_AT_ONCE} times {mebibytes(each_of_eight)} MiB at once: peak memory of the "
        "worker, and listModels (100 entries) over RPC meanwhile",
        ["store", "MiB/s", "peak MiB", "calls", "p50 ms", "p99 ms", "p99 x control"],
        f"p99 is judged from {_CALLS} calls on. The second line of a row is for p99 against the control's",
        "control: the same store class puts the same bytes in a process at nice 19, while the worker only answers",
        "the design bounds the memory of one store; of many at once it has the block that each receives more",
    )
    for backend in ("disk", "S3"):
        _measure_backend(bench, table, backend, (one,), (each_of_eight,) * _AT_ONCE)
    yield table


def _measure_backend(bench: Bench, table: Table, backend: str, *stores: tuple[int, ...]) -> None:
    """One row for each way to do each of `stores`, which are sizes of files in bytes."""
    rack = f"bench-memory-{backend.lower()}"
    s3 = bench.services.object_store.endpoint_url if backend == "S3" else None
    write_journal(bench.services.folder / rack / "registry", _CATALOG, rack=rack)
    with (
        bench.services.worker(rack, s3=s3 is not None) as worker,
        RpcCaller(bench.services.broker.url, rack, "listModels", {"limit": 100}) as caller,
    ):

        def during(work: Callable[[Source], None], sizes: tuple[int, ...]) -> Seen:
            names = [f"{rack}{work.__name__}-{len(sizes)}-{number}" for number in range(len(sizes))]
            paths = tuple(sparse_file(bench.folder / name, size, name) for name, size in zip(names, sizes, strict=True))
            return _during(worker, caller, work, Source(paths, worker.url, bench.folder / "control", s3))

        _add(table, f"none, {backend}", _idle(worker, caller, bench.pick(4, 2)))
        for sizes in stores:
            what = backend if len(sizes) == 1 else f"{backend}, {len(sizes)} at once"
            control = during(_put_nicely, sizes)
            _add(table, f"control, {what}", control, size=sum(sizes))
            for way, work in (("HTTP PUT", _send), ("upload", _push)):
                _add(table, f"{way}, {what}", during(work, sizes), size=sum(sizes), control=control)
    shutil.rmtree(bench.services.folder / rack)  # the disk need not hold the models of both backends


def _add(table: Table, what: str, seen: Seen, *, size: int | None = None, control: Seen | None = None) -> None:
    """The row of a store; those that have a control are judged twice, by memory and by latency."""
    peak = seen.peak_bytes / _MIB
    ratio = None if control is None else seen.p99 / control.p99
    table.add(
        what,
        "" if size is None else mebibytes(size / seen.seconds),
        f"{peak:.0f}",
        f"{len(seen.lookups.latencies):,}",
        milliseconds(percentile(seen.lookups.latencies, 0.5)),
        milliseconds(seen.p99),
        "" if ratio is None else times(ratio),
        value=None if ratio is None else peak,
        target=MEMORY,
        judged_as=f"peak memory: {what}",
    )
    if control is not None and min(len(one.lookups.latencies) for one in (seen, control)) >= _CALLS:
        table.add("", value=ratio, target=LATENCY, judged_as=f"p99 of lookups: {what}")


# --- watching ---


def _idle(worker: Worker, caller: RpcCaller, seconds: float) -> Seen:
    _forget_peak(worker)
    end = time.monotonic() + seconds
    lookups = caller.paced(_EVERY_S, lambda: time.monotonic() > end)
    return Seen(seconds, lookups, _peak(worker))


def _during(worker: Worker, caller: RpcCaller, work: Callable[[Source], None], source: Source) -> Seen:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
        child.submit(os.getpid).result()  # it has started, and has imported what it needs
        _forget_peak(worker)
        began = time.monotonic()
        storing = child.submit(work, source)
        lookups = caller.paced(_EVERY_S, storing.done)
        storing.result()
        return Seen(time.monotonic() - began, lookups, _peak(worker))


def _forget_peak(worker: Worker) -> None:
    """Make the kernel count the peak anew from here."""
    Path(f"/proc/{worker.pid}/clear_refs").write_text("5")


def _peak(worker: Worker) -> int:
    lines = Path(f"/proc/{worker.pid}/status").read_text().splitlines()
    kibibytes = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kibibytes) * 1024


# --- in the child process ---


def _put_nicely(source: Source) -> None:
    async def work(store: BlobStore) -> None:
        for blob in await asyncio.gather(*(put(store, path) for path in source.paths)):
            await store.delete(blob.key)
        await store.close()

    os.nice(_NICENESS)
    if source.s3 is None:
        asyncio.run(work(DiskStore(source.folder)))
    else:
        asyncio.run(work(S3Store(endpoint_url=source.s3, bucket=BUCKET, prefix="control")))


def _send(source: Source) -> None:
    def send(path: Path) -> None:
        put_file(f"{source.url}/api/models/bench/{path.name}/versions/1/content?type=custom", path)

    with ThreadPoolExecutor(len(source.paths)) as senders:
        list(senders.map(send, source.paths))


def _push(source: Source) -> None:
    async def work() -> None:
        async with ModelManagerClient(HttpCaller(source.url)) as client:
            pushes = (
                client.push(path, f"bench/{path.name}", "1", metadata={"type": "custom"}) for path in source.paths
            )
            await asyncio.gather(*pushes)

    asyncio.run(work())
