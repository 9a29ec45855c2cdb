"""All that can be done to a journal, in full, and one table of what came of it.

    python -m tests.crash               all of it
    python -m tests.crash kills cuts    these parts

states      every crash at every moment of a scenario, on a disk that forgets
kills       SIGKILLs of real processes
cuts        power cuts of real file systems on loop devices; needs root
injections  an error, a short write or a SIGKILL in place of each system call; needs strace
damage      to every bit, sector and line of every file

The exit status is 1 if a promise was broken. What could not be run is told, and breaks none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

from tests.crash import cuts, damage, injections, kills
from tests.crash.scenarios import SCENARIOS
from tests.crash.stage import Violation
from tests.crash.states import FULL, enumerate_states
from tests.crash.tally import Tally, table


def _states(options: argparse.Namespace) -> Iterator[Tally]:
    for scenario in SCENARIOS:
        tally = Tally(f"states of {scenario.name}")
        try:
            counts = enumerate_states(scenario, FULL, seed=options.seed)
        except Violation as error:
            tally.broken.append(str(error))
        else:
            tally.cases, tally.boots, tally.also = counts.states, counts.boots, f"{counts.moments} moments"
        yield tally.done()


def _kills(options: argparse.Namespace) -> Iterator[Tally]:
    yield kills.run(options.count or kills.COUNT, seed=options.seed)


def _cuts(options: argparse.Namespace) -> Iterator[Tally]:
    for kind in cuts.KINDS:
        yield cuts.run(kind, (options.count or cuts.COUNT) // len(cuts.KINDS), seed=options.seed)


def _injections(options: argparse.Namespace) -> Iterator[Tally]:
    yield injections.run(every=options.every)
    yield injections.run_short(every=options.every)


def _damage(options: argparse.Namespace) -> Iterator[Tally]:
    yield from damage.run(every=options.every)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Tally]]] = {
    "states": _states,
    "kills": _kills,
    "cuts": _cuts,
    "injections": _injections,
    "damage": _damage,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.crash", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--count", type=int, help=f"of kills ({kills.COUNT}) and of cuts ({cuts.COUNT})")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of injections and damages only one in N")
    parser.add_argument("--seed", type=int, default=1, help="of all that is random (1)")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there is no part {min(unknown)}")
    rows: list[Tally] = []
    for part in options.parts or PARTS:
        for row in PARTS[part](options):
            rows.append(row)
            print(f"{row.name}: {row.cases:,} in {row.seconds:.1f} s {row.not_run}", file=sys.stderr, flush=True)
    print(table(rows))
    sys.exit(any(row.broken for row in rows))


if __name__ == "__main__":
    main()
