"""Lookups over RabbitMQ: the worker beside programs on aio-pika, FastStream and Nameko that give the same bytes from
memory; and what many of them do to the worker's memory."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiormq
import orjson
import psutil

from deploy.local import NotStarted, Unavailable
from deploy.local.server import wait_until_ready
from tests.amqp import delete_queues
from tests.benchmarks import framework_responders
from tests.benchmarks.bench import Bench
from tests.benchmarks.frameworks import FRAMEWORKS, python_with
from tests.benchmarks.records import key_of, write_journal
from tests.benchmarks.rounds import best_of, percentile
from tests.benchmarks.rpc_caller import Load, RpcCaller
from tests.benchmarks.services import Services, Worker, cpu_seconds, pid_of
from tests.benchmarks.table import Table, Target, microseconds, milliseconds, rate, times
from worker.transport.topology import provision, request_queue

LOOKUP, FRAMEWORK = Target(0.8, 2.5), Target(1.5, 1.5)
WORKER, BARE, PATTERNS = "worker", "bare aio-pika", "aio_pika.patterns.RPC"
# In flight, and whether replies come directly or to an exclusive queue.
CASES = ((1, False), (32, False), (32, True), (256, False))
_JUDGED_IN_FLIGHT = 32
_CATALOG = 1000
_READY_S = 30.0
_WARM_UP_S = 0.3
_SETTLING_S = 2.0


@dataclass(frozen=True)
class Responder:
    """Something that answers lookups; `spent` tells its processor seconds so far."""

    rack: str
    spent: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Round:
    """Processor time in seconds a request; the broker's is None where it is not our process."""

    load: Load
    own_cpu: float
    caller_cpu: float
    broker_cpu: float | None


def measure(bench: Bench) -> Iterator[Table]:
    services = bench.services
    url = services.broker.url
    table = Table(
        "RPC lookups a second: getModelMetadata, the same requests and replies for all, on the same quorum queue",
        ["who", "in flight", "replies", "per s", "p50 ms", "p99 ms", "own us/req", "broker", "caller", "x bare"],
        "us/req: processor time a request. The caller is one process with one blocking socket.",
    )
    model, version = key_of(0)
    params = {"modelId": model, "version": version}
    write_journal(services.folder / "bench-rpc" / "registry", _CATALOG, rack="bench-rpc")
    with ExitStack() as running:
        worker = running.enter_context(services.worker("bench-rpc"))
        with RpcCaller(url, worker.rack, "getModelMetadata", params) as caller:
            reply = caller.call()
        responders = {WORKER: Responder(worker.rack, worker.cpu_seconds)}
        for name, kind in ((BARE, "bare"), (PATTERNS, "patterns")):
            responders[name] = running.enter_context(_responder(services, kind, reply))
        for name, requirement in FRAMEWORKS.items():
            try:
                python = python_with(requirement)
                responders[name] = running.enter_context(_responder(services, name.lower(), reply, python))
            except (Unavailable, NotStarted) as error:
                table.note(f"*** {name} was NOT RUN: {error}")
        for in_flight, direct in CASES:
            _add_rows(bench, table, responders, params, in_flight, direct=direct)
        yield table
        yield _memory(bench, worker, params)


@contextmanager
def _responder(services: Services, kind: str, reply: dict[str, Any], python: Path | None = None) -> Iterator[Responder]:
    """A peer on the queue of a rack of its own; `python` has the framework it needs."""
    rack, url = f"bench-{kind}", services.broker.url
    reply_file, ready = services.folder / f"{rack}.json", services.folder / f"{rack}.ready"
    reply_file.write_bytes(orjson.dumps(reply))
    asyncio.run(_provision(url, rack))
    if python is None:
        command = [sys.executable, "-m", "tests.benchmarks.responders", kind, url, rack]
    else:
        command = [str(python), framework_responders.__file__, kind, url, request_queue(rack)]
    command += [str(reply_file), str(ready)]
    with services.process(rack, command, {"PYTHONPATH": str(Path.cwd())}) as process:
        wait_until_ready(process, rack, ready.exists, timeout_s=_READY_S)
        responder = psutil.Process(pid_of(str(reply_file)))
        try:
            yield Responder(rack, lambda: cpu_seconds(responder))
        finally:
            process.stop()
            asyncio.run(delete_queues(services.broker.url, rack))


async def _provision(url: str, rack: str) -> None:
    async with await aiormq.connect(url) as connection:
        await provision(connection, rack)


def _add_rows(
    bench: Bench,
    table: Table,
    responders: dict[str, Responder],
    params: dict[str, Any],
    in_flight: int,
    *,
    direct: bool,
) -> None:
    seconds = bench.pick(2.5, 0.8)
    replies = f"{in_flight} in flight, replies {'direct' if direct else 'by queue'},"

    def run(responder: Responder) -> Round:
        with RpcCaller(bench.services.broker.url, responder.rack, "getModelMetadata", params, direct=direct) as caller:
            return _measured(caller, responder, bench.services, in_flight, seconds)

    best = best_of(
        bench.rounds,
        {name: partial(run, responder) for name, responder in responders.items()},
        lambda measured: measured.load.per_second,
    )
    for name, measured in best.items():
        load = measured.load
        ratio = load.per_second / best[BARE].load.per_second
        judged = name == WORKER and in_flight == _JUDGED_IN_FLIGHT
        table.add(
            name,
            str(in_flight),
            "direct" if direct else "queue",
            rate(load.per_second),
            milliseconds(percentile(load.latencies, 0.5)),
            milliseconds(percentile(load.latencies, 0.99)),
            microseconds(measured.own_cpu),
            "-" if measured.broker_cpu is None else microseconds(measured.broker_cpu),
            microseconds(measured.caller_cpu),
            times(ratio),
            value=ratio if judged else None,
            target=LOOKUP,
            judged_as=f"{replies} against a bare aio-pika echo",
        )
    for name in FRAMEWORKS:
        if name in best and in_flight == _JUDGED_IN_FLIGHT:
            ratio = best[WORKER].load.per_second / best[name].load.per_second
            table.add(
                f"  worker against {name}",
                *[""] * 8,
                times(ratio),
                value=ratio,
                target=FRAMEWORK,
                judged_as=f"{replies} against {name}",
            )


def _measured(caller: RpcCaller, responder: Responder, services: Services, in_flight: int, seconds: float) -> Round:
    caller.closed_loop(in_flight, seconds=_WARM_UP_S)
    own, broker, caller_began = responder.spent(), services.broker_cpu_seconds(), time.process_time()
    load = caller.closed_loop(in_flight, seconds=seconds)
    own_spent, caller_spent = responder.spent() - own, time.process_time() - caller_began
    after = services.broker_cpu_seconds()
    broker_spent = None if broker is None or after is None else after - broker
    count = len(load.latencies)
    return Round(load, own_spent / count, caller_spent / count, None if broker_spent is None else broker_spent / count)


def _memory(bench: Bench, worker: Worker, params: dict[str, Any]) -> Table:
    """What many lookups leave behind; the first ones, which fill caches and pools, do not count."""
    table = Table("Memory of the worker over many lookups, 64 in flight", ["requests", "MiB before", "MiB after"])
    process = psutil.Process(worker.pid)
    for direct in (False, True):
        with RpcCaller(bench.services.broker.url, worker.rack, "getModelMetadata", params, direct=direct) as caller:
            caller.closed_loop(64, seconds=_SETTLING_S)
            before, count = process.memory_info().rss, 0
            while count < bench.pick(100_000, 10_000):
                count += len(caller.closed_loop(64, seconds=1.0).latencies)
        sizes = [f"{size / 1024**2:.1f}" for size in (before, process.memory_info().rss)]
        table.add(f"{count:,}, replies {'direct' if direct else 'by queue'}", *sizes)
    return table
