"""Where the archive of a journal lies in the rack's storage, and what can be made of it again.

```
journal/<epoch>/MANIFEST                        which sealed files are there, whole; one JSON object
journal/<epoch>/<name>                          a base or a sealed segment, byte for byte
journal/<epoch>/tail/<segment>/<start>-<end>    these bytes of a segment that is still written to
journal/<epoch>/CLOSED                          `{"sequence"}`: the owner stopped in peace; no more will come
```

An object that MANIFEST does not name, and that is no piece of a tail, was being written when its writer died.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from worker.journal import SealedFile, Until
from worker.journal.manifest import segment_first

ROOT = "journal/"

_EPOCH = re.compile(r"journal/([0-9]+)/(.+)")
_PIECE = re.compile(r"tail/(seg-[0-9]{20}\.jsonl)/([0-9]{12})-([0-9]{12})")


@dataclass(frozen=True, slots=True)
class ArchivedFile:
    """A sealed file that was archived at `archived_ms`. `last` is the sequence of its last line: of a base the one it
    stands for; `time_ms`, of a base, when the newest record it stands for was written (unix milliseconds)."""

    file: SealedFile
    last: int
    archived_ms: int
    time_ms: int = 0

    @property
    def first(self) -> int:
        """The sequence of its first line; 0 for a base, which stands for all before."""
        return segment_first(self.file.name) or 0


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `start` to `end` of a segment."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class ArchiveManifest:
    """What is archived of one epoch, apart from its tail. Since `complete_ms` it has led to what was acknowledged, but
    for the lag; None: not yet."""

    registry_id: str
    epoch: int
    files: tuple[ArchivedFile, ...] = ()
    complete_ms: int | None = None

    def with_file(self, file: ArchivedFile) -> ArchiveManifest:
        return replace(self, files=(*self.files, file))

    def without(self, names: Iterable[str]) -> ArchiveManifest:
        gone = set(names)
        return replace(self, files=tuple(each for each in self.files if each.file.name not in gone))

    @property
    def names(self) -> set[str]:
        return {each.file.name for each in self.files}

    def reach(self) -> int:
        """The last sequence that its files lead to without a gap."""
        return max((chain[-1].last for chain in self._chains()), default=0)

    def leading_to(self, until: Until) -> list[ArchivedFile]:
        """The files to take, in order, for a journal up to that point: the newest base that lies before it, and all
        segments behind that. Empty if the archive does not go back so far."""
        chains = [chain for chain in self._chains() if chain[0].first or until.reaches(chain[0].last, chain[0].time_ms)]
        return max(chains, key=lambda chain: (chain[-1].last, chain[0].last), default=[])

    def _chains(self) -> list[list[ArchivedFile]]:
        """From each base, and from the very first segment, as far as the segments go without a gap."""
        segments = {each.first: each for each in self.files if each.first}
        chains = []
        for start in (each for each in self.files if each.first <= 1):
            chain = [start]
            while (following := segments.get(chain[-1].last + 1)) is not None:
                chain.append(following)
            chains.append(chain)
        return chains

    def stands_for(self, before_ms: int) -> int:
        """The last sequence that a base stands for which was there at that time."""
        bases = (each.last for each in self.files if not each.first and each.archived_ms <= before_ms)
        return max(bases, default=0)

    def outlived(self, before_ms: int) -> list[str]:
        """The files that no point later than `before_ms` needs: a base stands for them that was there already."""
        stands_for = self.stands_for(before_ms)
        return [each.file.name for each in self.files if each.last < stands_for or 0 < each.first <= stands_for]

    @property
    def last(self) -> int:
        """The last sequence of all its files, whether there is a way to it or not."""
        return max((each.last for each in self.files), default=0)

    def encoded(self) -> bytes:
        files = [
            {
                "name": each.file.name,
                "size": each.file.size,
                "lines": each.file.lines,
                "crc32": f"{each.file.crc32:08x}",
                "sha256": each.file.sha256,
                "last": each.last,
                "time": each.time_ms,
                "archived": each.archived_ms,
            }
            for each in self.files
        ]
        return orjson.dumps(
            {
                "v": 1,
                "registryId": self.registry_id,
                "epoch": self.epoch,
                "complete": self.complete_ms,
                "files": files,
            }
        )


def parse_manifest(data: bytes) -> ArchiveManifest:
    members: dict[str, Any] = orjson.loads(data)
    files = tuple(
        ArchivedFile(
            SealedFile(each["name"], each["size"], each["lines"], int(each["crc32"], 16), each["sha256"]),
            last=each["last"],
            archived_ms=each["archived"],
            time_ms=each["time"],
        )
        for each in members["files"]
    )
    return ArchiveManifest(members["registryId"], members["epoch"], files, members["complete"])


@dataclass(slots=True)
class Tails:
    """The pieces that are there, by segment, in order and without overlap; and objects that are of no use."""

    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    useless: list[str] = field(default_factory=list)


def manifest_key(epoch: int) -> str:
    return f"{ROOT}{epoch}/MANIFEST"


def closed_key(epoch: int) -> str:
    return f"{ROOT}{epoch}/CLOSED"


def file_key(epoch: int, name: str) -> str:
    return f"{ROOT}{epoch}/{name}"


def piece_key(epoch: int, segment: str, piece: Piece) -> str:
    return f"{ROOT}{epoch}/tail/{segment}/{piece.start:012d}-{piece.end:012d}"


def epoch_of(key: str) -> int | None:
    found = _EPOCH.fullmatch(key)
    return int(found[1]) if found else None


def tails(epoch: int, keys: Iterable[str], manifest: ArchiveManifest) -> Tails:
    """What the objects of an epoch are, besides those that MANIFEST names."""
    found = Tails()
    for key in keys:
        rest = key.removeprefix(f"{ROOT}{epoch}/")
        piece = _PIECE.fullmatch(rest)
        if piece and piece[1] not in manifest.names:
            found.pieces.setdefault(piece[1], []).append(Piece(int(piece[2]), int(piece[3])))
        elif rest not in ("MANIFEST", "CLOSED") and rest not in manifest.names:
            found.useless.append(key)
    for segment, pieces in found.pieces.items():
        cover = covering(pieces)
        found.useless += [piece_key(epoch, segment, piece) for piece in pieces if piece not in cover]
        found.pieces[segment] = cover
    return found


def covering(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces that follow each other from byte 0, as far as they go, the largest ones first."""
    cover: list[Piece] = []
    end = 0
    for piece in sorted(pieces, key=lambda each: (each.start, -each.end)):
        if piece.start == end and piece.end > end:
            cover.append(piece)
            end = piece.end
    return cover
