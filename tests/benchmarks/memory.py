"""What a large store costs: the worker's memory, and the latency of lookups while it runs.

A store is done in four ways: by HTTP PUT and by an upload, to disk and to S3; then eight at once. A child process
brings the bytes of sparse files. Meanwhile `listModels` is called over RPC, at most two hundred times a second. The
control is the same load outside the worker: the same child brings the same bytes in the same way to a neighbour, a
standalone service at `nice -n 19`, while the worker only answers. Both are measured in turns, several times.
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
from statistics import median

from tests.benchmarks.bench import Bench
from tests.benchmarks.bytes_of_models import sparse_file
from tests.benchmarks.http_transfer import put_file
from tests.benchmarks.records import write_journal
from tests.benchmarks.rounds import percentile
from tests.benchmarks.rpc_caller import Load, RpcCaller
from tests.benchmarks.services import Worker
from tests.benchmarks.table import Table, Target, mebibytes, milliseconds, times
from worker.client.client import ModelManagerClient
from worker.client.http_caller import HttpCaller

MEMORY = Target(256, 128, " MiB", at_most=True)
LATENCY = Target(1.3, 1.0, at_most=True)
_MIB = 1024 * 1024
_CATALOG = 1000
_EVERY_S = 0.005
_CALLS = 300  # fewer say too little of a 99th percentile to judge by it
_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Seen:
    """One round of a load as it looked from outside; the peak is that of the process the bytes went to."""

    seconds: float
    lookups: Load
    peak_bytes: int

    def percentile(self, share: float) -> float:
        return percentile(self.lookups.latencies, share)


@dataclass(frozen=True, slots=True)
class Source:
    """Files to be stored at once, and the address of the service that is to have them."""

    paths: tuple[Path, ...]
    url: str


Work = Callable[[Source], None]


@dataclass(frozen=True)
class Lab:
    """The worker that answers, the neighbour that has the load of the control, and who asks the worker."""

    bench: Bench
    worker: Worker
    neighbour: Worker
    caller: RpcCaller
    s3: bool

    def rounds(self, work: Work, sizes: tuple[int, ...]) -> tuple[list[Seen], list[Seen]]:
        """Files of `sizes` bytes brought to the worker, and to the neighbour: each once a round, first in turns."""
        seen: dict[Worker, list[Seen]] = {self.worker: [], self.neighbour: []}
        for number in range(int(self.bench.pick(3, 1))):
            order = (self.worker, self.neighbour) if number % 2 == 0 else (self.neighbour, self.worker)
            for target in order:
                paths = self._files(f"{target.rack}{work.__name__}-{len(sizes)}-{number}", sizes)
                seen[target].append(_during(target, self.caller, work, Source(paths, target.url)))
                self.bench.services.drop_blobs(target.rack, s3=self.s3)
        return seen[self.worker], seen[self.neighbour]

    def _files(self, name: str, sizes: tuple[int, ...]) -> tuple[Path, ...]:
        names = [f"{name}-{number}" for number in range(len(sizes))]
        return tuple(sparse_file(self.bench.folder / mark, size, mark) for mark, size in zip(names, sizes, strict=True))


def measure(bench: Bench) -> Iterator[Table]:
    one = int(bench.pick(1024, 256)) * _MIB
    # An object store may need minutes to give back the room of what was removed: of so much it would run out.
    for backend, of_eight in (("disk", bench.pick(1024, 32)), ("S3", bench.pick(256, 32))):
        each_of_eight = int(of_eight) * _MIB
        table = Table(
            f"Storing {mebibytes(one)} MiB to {backend}, or {_AT_ONCE} times {mebibytes(each_of_eight)} MiB at once: "
            "peak memory, and listModels (100 entries) over RPC meanwhile",
            ["store", "MiB/s", "peak MiB", "calls", "p50 ms", "p99 ms", "p99 x control"],
            "medians of the rounds, but the calls of all and the highest peak; a ratio is the median of the rounds'",
            f"p99 is judged from {_CALLS} calls on. The second line of a row is for p99 against the control's",
            "control: the same senders bring the same bytes to a second service, which runs at nice 19 in the session "
            "of the worker, while the worker only answers; its MiB/s and peak are those of that service",
            "the design bounds the memory of one store; of many at once it has the piece that each receives more",
        )
        _measure_backend(bench, table, backend, (one,), (each_of_eight,) * _AT_ONCE)
        yield table


def _measure_backend(bench: Bench, table: Table, backend: str, *stores: tuple[int, ...]) -> None:
    """Two rows, of the control and of the worker, for each way to do each of `stores`: sizes of files in bytes."""
    rack = f"bench-memory-{backend.lower()}"
    s3 = backend == "S3"
    write_journal(bench.services.folder / rack / "registry", _CATALOG, rack=rack)
    with (
        bench.services.worker_and_neighbour(rack, s3=s3) as (worker, neighbour),
        RpcCaller(bench.services.broker.url, rack, "listModels", {"limit": 100}) as caller,
    ):
        lab = Lab(bench, worker, neighbour, caller, s3)
        _add(table, f"none, {backend}", [_idle(worker, caller, bench.pick(4, 2))])
        for sizes in stores:
            what = backend if len(sizes) == 1 else f"{backend}, {len(sizes)} at once"
            for way, work in WAYS.items():
                seen, control = lab.rounds(work, sizes)
                _add(table, f"control: {way}, {what}", control, size=sum(sizes))
                _add(table, f"{way}, {what}", seen, size=sum(sizes), control=control)
    for folder in (worker.rack, neighbour.rack):
        shutil.rmtree(bench.services.folder / folder)


def _add(
    table: Table, what: str, seen: list[Seen], *, size: int | None = None, control: list[Seen] | None = None
) -> None:
    """The row of a load; those that have a control are judged twice, by memory and by latency."""
    peak = max(one.peak_bytes for one in seen) / _MIB
    ratio = None
    if control is not None:
        ratio = median(one.percentile(0.99) / other.percentile(0.99) for one, other in zip(seen, control, strict=True))
    table.add(
        what,
        "" if size is None else mebibytes(size / median(one.seconds for one in seen)),
        f"{peak:.0f}",
        f"{_calls(seen):,}",
        milliseconds(median(one.percentile(0.5) for one in seen)),
        milliseconds(median(one.percentile(0.99) for one in seen)),
        "" if ratio is None else times(ratio),
        value=None if ratio is None else peak,
        target=MEMORY,
        judged_as=f"peak memory: {what}",
    )
    if control is not None and min(_calls(seen), _calls(control)) >= _CALLS:
        table.add("", value=ratio, target=LATENCY, judged_as=f"p99 of lookups: {what}")


def _calls(seen: list[Seen]) -> int:
    return sum(len(one.lookups.latencies) for one in seen)


# --- watching ---


def _idle(worker: Worker, caller: RpcCaller, seconds: float) -> Seen:
    _forget_peak(worker)
    end = time.monotonic() + seconds
    lookups = caller.paced(_EVERY_S, lambda: time.monotonic() > end)
    return Seen(seconds, lookups, _peak(worker))


def _during(target: Worker, caller: RpcCaller, work: Work, source: Source) -> Seen:
    # A session of its own, as a client on another machine would be: what asks is not to wait for what sends.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=os.setsid) as child:
        child.submit(os.getpid).result()  # it has started, and has imported what it needs
        os.sync()  # what the round before has left to be written is not of this one
        _forget_peak(target)
        began = time.monotonic()
        storing = child.submit(work, source)
        lookups = caller.paced(_EVERY_S, storing.done)
        storing.result()
        return Seen(time.monotonic() - began, lookups, _peak(target))


def _forget_peak(worker: Worker) -> None:
    """Make the kernel count the peak anew from here."""
    Path(f"/proc/{worker.pid}/clear_refs").write_text("5")


def _peak(worker: Worker) -> int:
    lines = Path(f"/proc/{worker.pid}/status").read_text().splitlines()
    kibibytes = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kibibytes) * 1024


# --- in the child process ---


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


WAYS: dict[str, Work] = {"HTTP PUT": _send, "upload": _push}
