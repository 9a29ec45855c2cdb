"""The index of a base: what a replay made of its lines, so that a boot need not parse them.

Derived: it may be deleted at any time, and one that does not fit its base, or does not check, is not used. Its first
line is a JSON object, closed as a line of the journal is: `v`, `base` (`name`, `size`, `crc32`), and `parts`, each with
`name`, `size` and `crc32`, that follow it byte to byte. Numbers in parts are little-endian.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import orjson

from worker.journal.files import Files, sync, write_all
from worker.journal.format import checks, close
from worker.journal.manifest import SealedFile

INDEX_VERSION = 1
_BLOCK_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class BaseIndex:
    """`sequences` and `offsets` of the base's lines, u64 each, and the parts of the replay."""

    sequences: memoryview
    offsets: memoryview
    parts: dict[str, memoryview]


def index_name(base: str) -> str:
    return base.removesuffix(".jsonl") + ".idx"


def write_index(
    files: Files, path: Path, base: SealedFile, parts: Mapping[str, Any], *, sync_every: int = _BLOCK_BYTES
) -> None:
    """Write the index of `base` to `path`, durably; `parts` are buffers, "sequences" and "offsets" among them."""
    views = {name: memoryview(part).cast("B") for name, part in parts.items()}
    header = {
        "v": INDEX_VERSION,
        "order": sys.byteorder,
        "base": _identity(base),
        "parts": [{"name": name, "size": len(view), "crc32": crc32(view)} for name, view in views.items()],
    }
    fd = files.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        line, _ = close(orjson.dumps(header)[:-1], 0)
        write_all(files, fd, line, 0)
        offset = len(line)
        for view in views.values():
            for start in range(0, len(view), sync_every):
                piece = view[start : start + sync_every]
                write_all(files, fd, piece, offset)
                sync(files, fd)  # for its pace: the writer of the journal never waits for a mountain of this
                offset += len(piece)
    finally:
        files.close(fd)


def read_index(files: Files, path: Path, base: SealedFile) -> BaseIndex | None:
    """The index of `base`, checked; None if there is none that can be used."""
    try:
        with files.reader(path) as stream:
            line = stream.readline()
            if not checks(line, 0):
                return None
            header = orjson.loads(line)
            if (header["v"], header["order"], header["base"]) != (INDEX_VERSION, sys.byteorder, _identity(base)):
                return None
            parts: dict[str, memoryview] = {}
            for part in header["parts"]:
                data = stream.read(part["size"])
                if len(data) != part["size"] or crc32(data) != part["crc32"]:
                    return None
                parts[part["name"]] = memoryview(data)
    except OSError:
        return None
    return BaseIndex(parts.pop("sequences"), parts.pop("offsets"), parts)


def _identity(base: SealedFile) -> dict[str, Any]:
    return {"name": base.name, "size": base.size, "crc32": base.crc32}
