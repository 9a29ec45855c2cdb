"""Compaction while the worker runs: when it is due, and the process that does it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
import structlog

from schemas.errors import ModelManagerError
from worker.journal import Base, Journal, SealedFile, base_name
from worker.registry import Registry

_log = structlog.get_logger()

MIN_BYTES = 64 * 1024 * 1024
_PERIOD_S = 30.0
_AFTER_FAILURE_S = 600.0


class CompactionFailed(Exception):
    """Nothing has changed; str() says why."""


@dataclass(frozen=True, slots=True)
class Compacted:
    """Bytes of the sealed files before, those of the base, and its records; how long it took."""

    bytes_before: int
    bytes: int
    records: int
    seconds: float


class Compaction:
    """Rewrites the sealed segments once they are as large as the base, and at least `min_bytes`."""

    def __init__(self, registry: Registry, *, min_bytes: int = MIN_BYTES, period_s: float = _PERIOD_S) -> None:
        self._registry = registry
        self._min_bytes = min_bytes
        self._period_s = period_s

    async def run(self) -> None:
        """Look every period; a failure is told, and tried again later."""
        while True:
            await asyncio.sleep(self._period_s)
            if not self._is_due():
                continue
            try:
                done = await self.compact()
                _log.info("journal_compacted", **asdict(done))
            except (CompactionFailed, ModelManagerError) as error:
                _log.error("compaction_failed", reason=str(error))
                await asyncio.sleep(_AFTER_FAILURE_S)

    def _is_due(self) -> bool:
        journal = self._registry.journal
        base, behind = journal.sealed_bytes
        if journal.held and shutil.disk_usage(journal.folder).free > 2 * (base + behind):
            return False  # they wait for the archive, and there is room for that
        return journal.healthy and behind >= max(self._min_bytes, base)

    async def compact(self) -> Compacted:
        """Compact now. Raises CompactionFailed, ModelManagerError, JournalFailed."""
        journal = self._registry.journal
        began = time.monotonic()
        manifest = await journal.rotate()
        before = sum(journal.sealed_bytes)
        free = shutil.disk_usage(journal.folder).free
        if free < before:
            raise CompactionFailed(f"{free} bytes are free, and up to {before} are needed")
        base = await _written(journal, base_name(manifest.generation + 1))
        try:
            await journal.adopt(base)
        except ValueError as error:
            raise CompactionFailed(str(error)) from None
        return Compacted(before, base.file.size, base.file.lines - 2, round(time.monotonic() - began, 3))


async def _written(journal: Journal, name: str) -> Base:
    """What the compacting process wrote."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "worker.upkeep.compaction_child",
        str(journal.folder),
        name,
        stdin=asyncio.subprocess.PIPE,  # held open: its end ends the process
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        # Not communicate(), which would close its input.
        assert process.stdout is not None and process.stderr is not None
        output, errors = await asyncio.gather(process.stdout.read(), process.stderr.read())
        status = await process.wait()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    if status != 0:
        reason = errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise CompactionFailed(f"the compacting process ended with status {status}: {reason}")
    members = orjson.loads(output)
    return Base(SealedFile(**members["file"]), members["stands_for"], members["changes_from"])


async def compact_folder(folder: Path) -> Compacted:
    """Compact the journal of a registry that no worker has open.

    Raises JournalLocked, JournalDamaged, CompactionFailed, ModelManagerError.
    """
    registry = Registry(folder)
    await asyncio.to_thread(registry.open)
    registry.start()
    try:
        return await Compaction(registry).compact()
    finally:
        await registry.close()
