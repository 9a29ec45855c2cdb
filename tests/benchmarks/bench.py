"""What every subject gets to work with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.benchmarks.records import write_journal
from tests.benchmarks.services import Services


@dataclass
class Bench:
    """`folder` is empty at first and thrown away at the end; `versions` is the size of the catalog measured."""

    folder: Path
    services: Services
    quick: bool
    versions: int

    def pick(self, full: float, quick: float) -> float:
        return quick if self.quick else full

    @property
    def rounds(self) -> int:
        return 2 if self.quick else 3

    @cached_property
    def registry(self) -> Path:
        """A journal of `versions` versions."""
        folder = self.folder / "registry"
        write_journal(folder, self.versions)
        return folder
