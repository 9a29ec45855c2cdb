"""MANIFEST: which files of the folder count, in order."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import orjson

from worker.journal.failures import JournalDamaged
from worker.journal.files import Files, publish
from worker.journal.format import FORMAT_VERSION, checks, close

MANIFEST = "MANIFEST"

_BASE_NAME = re.compile(r"base-[0-9]{10}\.jsonl")
_SEGMENT_NAME = re.compile(r"seg-([0-9]{20})\.jsonl")


def segment_name(first_sequence: int) -> str:
    return f"seg-{first_sequence:020d}.jsonl"


def segment_first(name: str) -> int | None:
    """The sequence of the `open` line of the segment `name`; None if it is no segment's name."""
    found = _SEGMENT_NAME.fullmatch(name)
    return int(found[1]) if found else None


def base_name(generation: int) -> str:
    """The base that MANIFEST names from `generation` on."""
    return f"base-{generation:010d}.jsonl"


def is_base(name: str) -> bool:
    return _BASE_NAME.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class SealedFile:
    """A file that never changes again. `size` in bytes; `crc32` and `sha256` (hex) of all of it."""

    name: str
    size: int
    lines: int
    crc32: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    registry_id: str
    epoch: int
    generation: int
    sealed: tuple[SealedFile, ...]
    active: str

    @property
    def names(self) -> tuple[str, ...]:
        return (*(file.name for file in self.sealed), self.active)

    @property
    def base(self) -> SealedFile | None:
        """The base, if there is one: it is the first file."""
        return next((file for file in self.sealed[:1] if is_base(file.name)), None)

    def rotated(self, sealed: SealedFile, active: str) -> Manifest:
        """The next generation: the active file is `sealed`, and `active` follows it."""
        return Manifest(self.registry_id, self.epoch, self.generation + 1, (*self.sealed, sealed), active)

    def compacted(self, base: SealedFile, stands_for: int) -> Manifest:
        """The next generation: `base` stands for all files up to the sequence `stands_for`."""
        left = tuple(file for file in self.sealed if (segment_first(file.name) or 0) > stands_for)
        return Manifest(self.registry_id, self.epoch, self.generation + 1, (base, *left), self.active)

    def encoded(self) -> bytes:
        files: list[dict[str, Any]] = [
            {
                "name": file.name,
                "size": file.size,
                "lines": file.lines,
                "crc32": f"{file.crc32:08x}",
                "sha256": file.sha256,
            }
            for file in self.sealed
        ]
        members = {
            "v": FORMAT_VERSION,
            "registryId": self.registry_id,
            "epoch": self.epoch,
            "generation": self.generation,
            "files": [*files, {"name": self.active}],
        }
        return close(orjson.dumps(members)[:-1], 0)[0]

    def publish(self, files: Files, folder: Path) -> None:
        """Replace MANIFEST: the commit point of whatever changed the set of files. Raises as `files.publish` does."""
        publish(files, folder, MANIFEST, self.encoded())


def read_manifest(files: Files, folder: Path) -> Manifest:
    """Raises FileNotFoundError if there is none, JournalDamaged if it does not check."""
    with files.reader(folder / MANIFEST) as stream:
        data = stream.read()
    if not checks(data, 0):
        raise JournalDamaged(MANIFEST, offset=0, sequence=0, reason="the file does not have its checksum")
    members = cast("dict[str, Any]", orjson.loads(data))
    if members["v"] != FORMAT_VERSION:
        reason = f"the file has format version {members['v']}, and this program reads {FORMAT_VERSION}"
        raise JournalDamaged(MANIFEST, offset=0, sequence=0, reason=reason)
    *sealed, active = members["files"]
    return Manifest(
        registry_id=members["registryId"],
        epoch=members["epoch"],
        generation=members["generation"],
        sealed=tuple(
            SealedFile(file["name"], file["size"], file["lines"], int(file["crc32"], 16), file["sha256"])
            for file in sealed
        ),
        active=active["name"],
    )
