"""Compaction while the worker runs: when it is due, and the process that does it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

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


class NothingToCompact(CompactionFailed):
    """There are no sealed files."""


class NoRoomToCompact(CompactionFailed):
    """Also all of the reserve would not do for what is live."""


class CompactionObserver(Protocol):
    """Calls are short and never raise."""

    # A run is over: `ok`, `no_room` or `failed`.
    def compaction_ended(self, result: str, seconds: float) -> None: ...

    # A base with `bytes_after` stands for sealed files with `bytes_before`.
    def compacted(self, bytes_before: int, bytes_after: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Compacted:
    """Bytes of the sealed files before, those of the base, and its records; how long it took."""

    bytes_before: int
    bytes: int
    records: int
    seconds: float


class Compaction:
    """Rewrites the sealed segments once they are as large as the base, and at least `min_bytes`."""

    def __init__(
        self,
        registry: Registry,
        *,
        min_bytes: int = MIN_BYTES,
        period_s: float = _PERIOD_S,
        observe: CompactionObserver | None = None,
    ) -> None:
        self._registry = registry
        self._observe = observe
        self._min_bytes = min_bytes
        self._period_s = period_s

    async def run(self) -> None:
        """Look every period; a failure is told, and tried again later."""
        while True:
            await asyncio.sleep(self._period_s)
            try:
                if self._is_due():
                    done = await self.compact()
                    _log.info("journal_compacted", **asdict(done))
            except (CompactionFailed, ModelManagerError, OSError) as error:
                _log.error("compaction_failed", reason=str(error))
                await asyncio.sleep(_AFTER_FAILURE_S)

    def _is_due(self) -> bool:
        journal = self._registry.journal
        base, behind = journal.sealed_bytes
        if journal.superseded.held and shutil.disk_usage(journal.folder).free > 2 * (base + behind):
            return False  # they wait for the archive, and there is room for that
        return journal.healthy and behind >= max(self._min_bytes, base)

    async def compact(self) -> Compacted:
        """Compact now. Raises CompactionFailed, ModelManagerError, JournalFailed."""
        began = time.monotonic()
        result = "failed"
        try:
            before, base = await self._compact()
            result = "ok"
        except NoRoomToCompact:
            result = "no_room"
            raise
        finally:
            seconds = time.monotonic() - began
            if self._observe is not None:
                self._observe.compaction_ended(result, seconds)
        if self._observe is not None:
            self._observe.compacted(before, base.file.size)
        return Compacted(before, base.file.size, base.file.lines - 2, round(seconds, 3))

    async def _compact(self) -> tuple[int, Base]:
        journal = self._registry.journal
        try:
            manifest = await journal.rotate()
        except ModelManagerError as error:
            raise _no_room(error) from None
        if not manifest.sealed:
            raise NothingToCompact("no record was ever written")
        before = sum(journal.sealed_bytes)
        name = base_name(manifest.generation + 1)
        try:
            base = await _written(journal, name)
            await journal.adopt(base)
        except (ValueError, OSError) as error:
            await journal.discard(name)
            raise CompactionFailed(str(error)) from error
        except CompactionFailed:
            await journal.discard(name)
            raise
        except ModelManagerError as error:
            await journal.discard(name)
            raise _no_room(error) from None
        return before, base


def _no_room(error: ModelManagerError) -> Exception:
    return NoRoomToCompact(error.message) if error.code == "ERR_STORAGE_FULL" else error


async def _written(journal: Journal, name: str) -> Base:
    """What the compacting process wrote, with the room of the reserve if it needs that."""
    members = await _run(journal.folder, name)
    if "needed" in members:
        needed = members["needed"]
        free = await journal.free_up(needed)
        if free >= needed:
            members = await _run(journal.folder, name)
        if "needed" in members:
            raise NoRoomToCompact(f"{free} bytes are free, and {members['needed']} are needed")
    return Base(SealedFile(**members["file"]), members["stands_for"], members["changes_from"])


async def _run(folder: Path, name: str) -> dict[str, Any]:
    """What the compacting process says."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "worker.upkeep.compaction_child",
        str(folder),
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
    return cast("dict[str, Any]", orjson.loads(output))


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
