"""One run: the load, the faults one after the other, and the judgement."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiormq

from deploy.local import RabbitMQ
from tests.amqp import delete_queues
from tests.ledger.book import Ledger
from tests.ledger.callers import SHARED, SHARED_VERSIONS, OwnClient, PlainClient
from tests.ledger.faults import FAULTS, LONG, Stage
from tests.ledger.proxy import Proxy
from tests.ledger.rack import Rack
from tests.process import Processes
from worker.client.amqp_caller import AmqpCaller
from worker.client.client import ModelManagerClient
from worker.journal import dump
from worker.transport.topology import dead_letter_queue, request_queue

CALLERS = 16
PLAIN = 4
_COUNTERS = {
    "amqp_reconnects_total": "reconnects",
    "amqp_blocked_seconds_total": "blocked seconds",
    "rpc_redelivered_total": "redelivered",
    "rpc_duplicate_total": "duplicates",
}


@dataclass
class Row:
    """One fault: when it began, when callers were answered again, and the proof that it happened."""

    name: str
    begun: float
    ended: float = 0.0
    proof: str = ""


@dataclass
class Report:
    """What came of a run."""

    ledger: Ledger
    rows: list[Row] = field(default_factory=list)
    effects: Counter[str] = field(default_factory=Counter)
    metrics: Counter[str] = field(default_factory=Counter)
    proxies: Counter[str] = field(default_factory=Counter)
    takeovers: list[float] = field(default_factory=list)
    dead_letters: int = 0
    seconds: float = 0.0

    @property
    def broken(self) -> list[str]:
        return self.ledger.broken


def run(broker: RabbitMQ, folder: Path, name: str, *, requests: int, faults: Sequence[str], seed: int = 1) -> Report:
    """At least `requests` requests, with the `faults` spread over them, on a rack of its own."""
    report = Report(Ledger())
    begun = time.monotonic()
    with Processes(folder) as processes:
        asyncio.run(_run(broker, processes, name, report, requests=requests, faults=faults, seed=seed))
    for counter, label in _COUNTERS.items():
        if len(set(faults)) >= len(FAULTS) - len(LONG) and not report.metrics[counter]:
            report.broken.append(f"the workers counted no {label}")
    report.seconds = time.monotonic() - begun
    return report


async def _run(
    broker: RabbitMQ,
    processes: Processes,
    name: str,
    report: Report,
    *,
    requests: int,
    faults: Sequence[str],
    seed: int,
) -> None:
    async with Proxy(broker.url) as callers, Proxy(broker.url) as workers:
        stage = Stage(broker, Rack(processes, name, workers.url), callers, workers)
        try:
            await stage.rack.start()
            await stage.until_consuming()
            await OwnClient(SHARED, broker.url, name, report.ledger, 0).prepare(SHARED_VERSIONS)
            await _load(stage, report, requests, faults, seed)
            await _until_served(stage)
            catalog = await _catalog(broker.url, name)
            report.dead_letters = await _depth(broker.url, dead_letter_queue(name))
            statuses = await stage.rack.stop()
        finally:
            await delete_queues(broker.url, name)
    if any(statuses):
        report.broken.append(f"the workers ended with {statuses}")
    report.effects = report.ledger.check(dump(stage.rack.registry), catalog)
    report.metrics, report.takeovers = stage.rack.metrics, stage.rack.takeovers
    report.proxies = callers.counts + workers.counts


async def _load(stage: Stage, report: Report, requests: int, faults: Sequence[str], seed: int) -> None:
    ledger = report.ledger
    over = asyncio.Event()

    def going() -> bool:
        return not over.is_set() or ledger.finished < requests

    async def harm() -> None:
        for number, name in enumerate(faults, 1):
            while ledger.finished < requests * number / (len(faults) + 1):
                await asyncio.sleep(0.01)
            row = Row(name, time.monotonic())
            report.rows.append(row)
            row.proof = await FAULTS[name](stage)
            await stage.until_consuming()
            await _until_success(ledger, time.monotonic())
            row.ended = time.monotonic()
        over.set()

    async with asyncio.TaskGroup() as group:
        for number in range(CALLERS - PLAIN):
            client = OwnClient(f"own-{number}", stage.callers.url, stage.rack.name, ledger, seed * 100 + number)
            group.create_task(client.run(going))
        for number in range(PLAIN):
            plain = PlainClient(
                f"plain-{number}",
                stage.callers.url,
                stage.rack.name,
                ledger,
                seed * 100 + 50 + number,
                direct=number % 2 == 0,
            )
            group.create_task(plain.run(going))
        group.create_task(harm())


async def _until_success(ledger: Ledger, since: float) -> None:
    async with asyncio.timeout(120):
        while not ledger.successes or ledger.successes[-1] < since:
            await asyncio.sleep(0.01)


async def _until_served(stage: Stage) -> None:
    """Return when the queue is empty, and what was taken from it is answered."""
    await stage.until_consuming()
    async with asyncio.timeout(120):
        while True:
            listed = await asyncio.to_thread(
                stage.broker.ctl, "list_queues", "name", "messages", "--quiet", "--no-table-headers"
            )
            if dict(line.split() for line in listed.splitlines())[request_queue(stage.rack.name)] == "0":
                return


async def _depth(url: str, queue: str) -> int:
    async with aiormq.connect(url) as connection:
        channel = await connection.channel()
        return (await channel.queue_declare(queue, passive=True)).message_count or 0


async def _catalog(url: str, rack: str) -> dict[tuple[str, str], dict[str, Any]]:
    """All versions that are listed, in the form of `book.fold`."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    async with ModelManagerClient(AmqpCaller(url, rack)) as client:
        cursor: str | None = None
        while True:
            page = await client.list_models(limit=1000, cursor=cursor)
            for entry in page["models"]:
                found[entry["modelId"], entry["version"]] = {
                    "mark": entry["metadata"].get("mark"),
                    "revision": entry["revision"],
                    "aliases": sorted(entry["aliases"]),
                }
            cursor = page.get("nextCursor")
            if cursor is None:
                return found


def table(report: Report) -> str:
    """All that was counted, and what is broken."""
    lines = [f"{'fault':24}{'seconds':>8}{'silence':>9}  proof"]
    ends = [*(row.begun for row in report.rows[1:]), report.rows[-1].ended] if report.rows else []
    for row, end in zip(report.rows, ends, strict=True):
        silence = report.ledger.longest_gap(row.begun, max(end, row.ended))
        lines.append(f"{row.name:24}{row.ended - row.begun:>8.1f}{silence:>9.1f}  {row.proof}")
    requests = report.ledger.requests
    lines.append(f"{len(requests):,} requests of {CALLERS} callers in {report.seconds:.0f} s, by outcome:")
    for outcome, count in report.ledger.outcomes().most_common():
        lines.append(f"  {outcome or 'none':28}{count:>8,}")
    lines.append("effects, by what the caller was told and whether the journal has them:")
    for kind, count in sorted(report.effects.items()):
        lines.append(f"  {kind:28}{count:>8,}")
    lines.append("the workers counted:")
    for counter, label in _COUNTERS.items():
        lines.append(f"  {label:28}{report.metrics[counter]:>8,.0f}")
    took = ", ".join(f"{seconds:.2f} s" for seconds in report.takeovers)
    lines.append(f"takeovers: {took or 'none'}; dead letters: {report.dead_letters}")
    lines += [f"BROKEN {text}" for text in report.broken[:20]]
    if len(report.broken) > 20:
        lines.append(f"BROKEN {len(report.broken) - 20} more")
    return "\n".join(lines)
