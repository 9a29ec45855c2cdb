"""Sixteen callers, a rack with a standby, and every fault there is between them; then one table of what came of it.

    python -m tests.ledger                          20,000 requests, each fault several times
    python -m tests.ledger --requests 2000 --rounds 1
    python -m tests.ledger --only "queue deleted"   this fault alone

The exit status is 1 if a promise was broken: an acknowledged effect that is not there exactly once, a refused one that
is, a request without its one outcome, or a worker that needed a hand.
"""

from __future__ import annotations

import argparse
import logging
import secrets
import sys
import tempfile
from pathlib import Path

from deploy.local import rabbitmq
from tests.ledger.faults import FAULTS, LONG
from tests.ledger.lab import run, table


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.ledger", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3, help="how often each fault happens; the long ones once (3)")
    parser.add_argument("--only", action="append", choices=FAULTS, metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--seed", type=int, default=1, help="of all that is random (1)")
    options = parser.parse_args()
    faults = options.only or [name for _ in range(options.rounds) for name in FAULTS if name not in LONG]
    faults += [] if options.only else LONG
    logging.basicConfig(level=logging.CRITICAL)  # aiormq tells of every connection that is lost
    with tempfile.TemporaryDirectory(prefix="ledger-") as folder, rabbitmq(Path(folder) / "broker") as broker:
        rack = f"r-{secrets.token_hex(4)}"
        report = run(broker, Path(folder), rack, requests=options.requests, faults=faults, seed=options.seed)
    print(table(report))
    sys.exit(bool(report.broken))


if __name__ == "__main__":
    main()
