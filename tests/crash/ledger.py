"""The records that real processes write under crashes, and the book that somebody outside keeps of them."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from worker.journal import Base, Block, Files, Journal
from worker.journal.base_index import index_name, write_index
from worker.journal.boot import replay_base, replay_sealed
from worker.journal.compaction import write_base

LIFE = 1_000_000
"""The records of a life have its number times this and more."""

_ALPHABET = '"é\n\\日abcdefghij'


def is_passing(n: int) -> bool:
    """Whether compaction drops the record `n`."""
    return n % 5 == 0


def record_of(n: int) -> tuple[str, dict[str, Any]]:
    """The op and the content of the record `n`; they follow from the number, so that nothing needs to remember them."""
    text = _ALPHABET[n % len(_ALPHABET)] * (n * 7919 % 700)
    return "pass" if is_passing(n) else "put", {"n": n, "text": text}


class Noted(msgspec.Struct, frozen=True, gc=False):
    n: int = -1  # the lines of the journal itself have none


class Ledger:
    """What a journal is replayed into: sequence and number of each record, also from the index of a base."""

    record = Noted
    help = None

    def __init__(self) -> None:
        self._sequences = array("Q")
        self._numbers = array("Q")

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return list(zip(self._sequences, self._numbers, strict=True))

    def extract(self, block: Block[Noted]) -> list[tuple[int, int]]:
        return [(line.sequence, line.record.n) for line in block.lines]

    def take(self, extract: list[tuple[int, int]]) -> None:
        for sequence, n in extract:
            self._sequences.append(sequence)
            self._numbers.append(n)

    def load(self, parts: dict[str, memoryview]) -> bool:
        self._sequences.frombytes(parts["ledger"])
        self._numbers.frombytes(parts["numbers"])
        return True

    def dumped(self) -> dict[str, array[int]]:
        return {"ledger": self._sequences, "numbers": self._numbers}


def rewrite(files: Files, folder: Path, name: str) -> Base:
    """What the compacting process does: a base without the passing records, and its index, under `.tmp`."""
    ledger = Ledger()
    sealed = replay_sealed(files, folder, ledger)
    keep = np.array([sequence for sequence, n in ledger.pairs if not is_passing(n)], np.uint64)
    dropped = max((sequence for sequence, n in ledger.pairs if is_passing(n)), default=0)
    changes_from = max(sealed.changes_from, dropped)
    base = write_base(files, folder, name, sealed, keep, changes_from=changes_from, time_ms=0)
    again = Ledger()
    segment = replay_base(files, folder / f"{name}.tmp", again)
    write_index(files, folder / f"{index_name(name)}.tmp", base.file, {**segment.dumped(), **again.dumped()})
    return base


@dataclass(frozen=True, slots=True)
class Found:
    """What a boot found: sequence and number of each record, in order; `dropped` is the journal's `changes_from`."""

    pairs: list[tuple[int, int]]
    dropped: int


def found_in(journal: Journal, ledger: Ledger) -> Found:
    """Reads every line. Raises ValueError if content and replay differ, or a record is not what was written."""
    entries = journal.read(0, 2**62)
    if [(entry.sequence, entry.record["n"]) for entry in entries] != ledger.pairs:
        raise ValueError("the replay has not the records that are read")
    for entry in entries:
        if (entry.op, entry.record) != record_of(entry.record["n"]):
            raise ValueError(f"the record {entry.sequence} has not the content it was written with")
    return Found(ledger.pairs, journal.changes_from)


@dataclass(slots=True)
class Book:
    """What was promised about one folder, as seen from outside its owner."""

    life: int = 0
    acknowledged: dict[int, int] = field(default_factory=dict)
    """By sequence: the numbers of the records that were acknowledged, or shown by a boot, which is as good."""
    refused: set[int] = field(default_factory=set)
    acks: int = 0
    lost: int = 0

    def acknowledge(self, sequence: int, n: int) -> None:
        self.acks += 1
        self.acknowledged[sequence] = n

    def check(self, found: Found) -> list[str]:
        """The promises that are broken, in words. What was found is promised from here on."""
        broken: list[str] = []
        sequences = [sequence for sequence, _ in found.pairs]
        numbers = {n for _, n in found.pairs}
        if any(after <= before for before, after in pairwise(sequences)):
            broken.append("the records are not in order")
        if len(numbers) != len(found.pairs):
            broken.append("a record is there twice")
        if falsely := numbers & self.refused:
            broken.append(f"{len(falsely)} records are there that were refused, {min(falsely)} among them")
        if any(n // LIFE > self.life for n in numbers):
            broken.append("a record is there that nobody wrote")
        present = dict(found.pairs)
        lost = [
            (sequence, n)
            for sequence, n in self.acknowledged.items()
            if present.get(sequence) != n
            and not (is_passing(n) and sequence <= found.dropped and sequence not in present)
        ]
        if lost:
            self.lost += len(lost)
            broken.append(f"{len(lost)} acknowledged records are lost, the first {min(lost)}, the last {max(lost)}")
        self.acknowledged = present
        return broken
