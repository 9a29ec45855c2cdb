"""Interleaved rounds: every contender in each round, the order turned round from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

Result = TypeVar("Result")


def best_of(
    rounds: int, contenders: Mapping[str, Callable[[], Result]], better: Callable[[Result], float]
) -> dict[str, Result]:
    """The round of each contender with the highest `better`."""
    best: dict[str, Result] = {}
    names = list(contenders)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            result = contenders[name]()
            if name not in best or better(result) > better(best[name]):
                best[name] = result
    return best


def percentile(values: list[float], share: float) -> float:
    """The value that `share` (0 to 1) of `values` do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
