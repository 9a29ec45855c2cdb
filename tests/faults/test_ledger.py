"""A bounded part of what `python -m tests.ledger` does: every fault once, but for the one that takes a minute."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.local import RabbitMQ
from tests.ledger.faults import FAULTS, LONG
from tests.ledger.lab import run, table

pytestmark = pytest.mark.broker

REQUESTS = 1500


def test_nothing_is_lost_and_nothing_happens_twice_whatever_fails(
    rabbitmq: RabbitMQ, tmp_path: Path, rack: str
) -> None:
    faults = [name for name in FAULTS if name not in LONG]
    report = run(rabbitmq, tmp_path, rack, requests=REQUESTS, faults=faults)
    print(table(report))
    assert not report.broken
    assert len(report.ledger.requests) >= REQUESTS
    assert [row.name for row in report.rows] == faults
    assert report.effects["acknowledged, there"] > REQUESTS / 4
    assert len(report.takeovers) == 2
    for kind in ("cut", "reset", "half-opened", "frozen", "slowed"):
        assert report.proxies[kind] > 0
