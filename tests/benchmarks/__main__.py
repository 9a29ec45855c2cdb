"""Runs the subjects in order, prints a table for each, and the design's numbers once more at the end."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from deploy.local import NotStarted, Unavailable
from tests.benchmarks import boot, compacting, lookups, memory, registry_writes, rpc, s3_transfers, transfers
from tests.benchmarks.bench import Bench
from tests.benchmarks.services import Services
from tests.benchmarks.table import Judged, Table, Verdict

SUBJECTS: dict[str, Callable[[Bench], Iterator[Table]]] = {
    "writes": registry_writes.measure,
    "boot": boot.measure,
    "lookups": lookups.measure,
    "compacting": compacting.measure,
    "disk": transfers.measure,
    "rpc": rpc.measure,
    "s3": s3_transfers.measure,
    "memory": memory.measure,
}


def main() -> int:
    options = _parse()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what was started is ended
    began = time.monotonic()
    judged: list[tuple[str, Judged]] = []
    skipped: list[str] = []
    with tempfile.TemporaryDirectory(prefix="model-manager-bench-", dir=options.folder) as name:
        services = Services(Path(name))
        bench = Bench(Path(name), services, options.quick, options.versions)
        try:
            for subject in options.subjects or SUBJECTS:
                try:
                    for table in SUBJECTS[subject](bench):
                        print(f"\n{table}", flush=True)
                        judged += [(subject, one) for one in table.judged]
                except (Unavailable, NotStarted) as error:
                    skipped.append(subject)
                    print(f"\n*** {subject} SKIPPED: {error}", flush=True)
        finally:
            services.close()
    _summarize(judged, skipped, time.monotonic() - began)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("subjects", nargs="*", metavar="subject", help=f"of {', '.join(SUBJECTS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="less of everything, and coarser numbers")
    parser.add_argument("--versions", type=int, default=100_000, help="size of the catalog (default 100000)")
    parser.add_argument("--folder", type=Path, help="where to work: the disk to be measured (default: for temporary)")
    options = parser.parse_args()
    unknown = set(options.subjects) - set(SUBJECTS)
    if unknown:
        parser.error(f"no such subject: {', '.join(sorted(unknown))}")
    return options


def _summarize(judged: list[tuple[str, Judged]], skipped: list[str], seconds: float) -> None:
    table = Table(f"\nThe design's numbers, {seconds:.0f} s in all", ["subject", "what", "measured"])
    for subject, one in judged:
        table.add(subject, one.what, f"{one.value:.2f}{one.target.unit}", value=one.value, target=one.target)
    print(table)
    counts = {verdict: sum(one.verdict is verdict for _, one in judged) for verdict in Verdict}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    for subject in skipped:
        print(f"*** {subject} was SKIPPED: its services could not be had")


if __name__ == "__main__":
    sys.exit(main())
