"""A catalog of many versions, as the journal holds it."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from schemas.journal import StoreRecord
from worker.journal import SEGMENT_BYTES, Entry, Journal

TYPES = ("onnx", "pytorch", "tensorflow", "safetensors", "gguf")
TAGS = 40
VERSIONS_PER_MODEL = 4
START_MS = 1_793_520_000_000
_WRITERS = 512


def key_of(number: int) -> tuple[str, str]:
    """Model and version of record `number`."""
    model = number // VERSIONS_PER_MODEL
    return f"org-{model % 97}/model-{model:07d}", f"{number % VERSIONS_PER_MODEL + 1}.0.0"


def store_record(number: int, *, rack: str = "bench") -> StoreRecord:
    """A version with one file; about 600 bytes as a line of the journal. `number` makes it."""
    model, version = key_of(number)
    digest = hashlib.sha256(f"{number}".encode()).hexdigest()
    kind = TYPES[number % len(TYPES)]
    size = 1_000_000 + number * 17
    return {
        "model": model,
        "version": version,
        "type": kind,
        "files": [
            {
                "path": f"model.{kind}",
                "size": size,
                "sha256": digest,
                "mediaType": "application/octet-stream",
                "key": f"blobs/{number:026d}",
            }
        ],
        "metadata": {
            "type": kind,
            "version": version,
            "description": f"Model {number}, as it was trained.",
            "tags": [f"team-{number % TAGS}", f"stage-{number % 3}"],
            "accuracy": number % 1000 / 1000,
        },
        "checksum": digest,
        "size": size,
        "created": START_MS + number * 1000,
        "origin": rack,
        "replicas": [],
    }


def write_journal(folder: Path, count: int, *, rack: str = "bench", segment_bytes: int = SEGMENT_BYTES) -> None:
    """A journal with the records 0 to `count`, written as the worker writes it."""
    asyncio.run(_write(folder, count, rack, segment_bytes))


async def _write(folder: Path, count: int, rack: str, segment_bytes: int) -> None:
    journal = await asyncio.to_thread(Journal.open, folder, replay=_ignore, segment_bytes=segment_bytes)
    journal.start(lambda _: None)
    numbers = iter(range(count))

    async def writer() -> None:
        for number in numbers:
            await journal.append("store", dict(store_record(number, rack=rack)))

    await asyncio.gather(*(writer() for _ in range(_WRITERS)))
    await journal.close()


def seal(folder: Path) -> None:
    """Leave no record in the active file of the journal."""
    asyncio.run(_seal(folder))


async def _seal(folder: Path) -> None:
    journal = await asyncio.to_thread(Journal.open, folder, replay=_ignore)
    journal.start(lambda _: None)
    await journal.rotate()
    await journal.close()


def _ignore(_: Entry) -> None:
    return


def journal_lines(folder: Path) -> list[Path]:
    """The files of a journal that hold its lines, in order."""
    return sorted(folder.glob("seg-*.jsonl"))
