"""Every crash of every scenario, in depth: `python -m tests.crash [scenario ...]`."""

from __future__ import annotations

import sys
import time

from tests.crash.scenarios import SCENARIOS
from tests.crash.states import FULL, Counts, enumerate_states


def main() -> None:
    total, began = Counts(), time.monotonic()
    print(f"{'scenario':28}{'moments':>10}{'states':>12}{'boots':>12}{'seconds':>10}")
    for scenario in SCENARIOS:
        if sys.argv[1:] and scenario.name not in sys.argv[1:]:
            continue
        started = time.monotonic()
        counts = enumerate_states(scenario, FULL)
        total += counts
        _row(scenario.name, counts, time.monotonic() - started)
    _row("all; no promise was broken", total, time.monotonic() - began)


def _row(name: str, counts: Counts, seconds: float) -> None:
    print(f"{name:28}{counts.moments:>10,}{counts.states:>12,}{counts.boots:>12,}{seconds:>10.1f}", flush=True)


if __name__ == "__main__":
    main()
