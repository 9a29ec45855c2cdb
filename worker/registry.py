"""The registry: the journal, the catalog folded from it, and what must hold around a commit.

A write is one `transact`: under the lock of what it changes, a plain function looks at the catalog and decides on a
record; the record is appended (that is the commit), folded into the catalog, announced to the listeners. Nothing can
come between the look and the commit. A caller who goes away before the decision has no effect, and one who goes away
after it does not interrupt it.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import structlog

from schemas.errors import ModelManagerError
from schemas.journal import Idempotency
from worker.catalog.catalog import Catalog
from worker.catalog.extracts import Extract, extract
from worker.catalog.records import IndexedBlock, IndexedRecord
from worker.catalog.retention import frees_room
from worker.catalog.snapshot import load_catalog
from worker.journal import Entry, Help, Journal, JournalFailed, JournalObserver, RecordCold, disk_full

_log = structlog.get_logger()
_T = TypeVar("_T")
_UNOBSERVED = JournalObserver()


class Change(msgspec.Struct, frozen=True, gc=False):
    """A decision to write: the record's `op` and content."""

    op: str
    record: Any


class _Scopes:
    """One holder for each name in use, and who waits to be the next."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[asyncio.Future[None]] | None] = {}

    def take(self, name: str) -> bool:
        """Hold the name, if it is free."""
        if name in self._waiting:
            return False
        self._waiting[name] = None  # mostly nobody ever waits
        return True

    async def wait(self, name: str) -> None:
        """Hold the name, when its turn has come. Not to be cancelled."""
        if not self.take(name):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            waiting = self._waiting[name]
            if waiting is None:
                waiting = self._waiting[name] = deque()
            waiting.append(turn)
            await turn

    def release(self, name: str) -> None:
        waiting = self._waiting[name]
        if waiting:
            waiting.popleft().set_result(None)
        else:
            del self._waiting[name]


class CatalogReplay:
    """A catalog as what a journal is replayed into."""

    record = IndexedRecord
    help: Help | None = Help((sys.executable, "-m", "worker.boot_helper"), Extract)

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def extract(self, block: IndexedBlock) -> Extract:
        return extract(block)

    def take(self, extract: Extract) -> None:
        self._catalog.take(extract)

    def load(self, parts: dict[str, memoryview]) -> bool:
        return load_catalog(self._catalog, parts)


class Registry:
    """Owns the journal and the catalog. Everything but `open` runs on the event loop."""

    def __init__(self, folder: Path, *, observe: JournalObserver = _UNOBSERVED) -> None:
        self.catalog = Catalog(self._record)
        self.replay_seconds = 0.0
        self._folder = folder
        self._observe = observe
        self._journal: Journal | None = None
        self._scopes = _Scopes()
        self._warm: dict[int, tuple[Any, int]] = {}  # records that were read for a `look` that goes on
        self._pins: dict[str, int] = {}
        self._unpinned: set[str] = set()
        self._listeners: list[Callable[[Entry], None]] = []
        self._moved: asyncio.Event | None = None  # while somebody waits for it
        self._transactions: set[asyncio.Task[Any]] = set()
        self._under_way: dict[str, asyncio.Future[None]] = {}  # requests whose record is on its way, by their key

    def open(self) -> None:
        """Take the lock, verify and replay the journal. Blocking, long for a large one. Raises the journal's errors."""
        started = time.monotonic()
        catalog = self.catalog = Catalog(self._record)
        self._journal = Journal.open(
            self._folder, replay=CatalogReplay(catalog), frees=frees_room, observe=self._observe
        )
        catalog.settle()
        self.replay_seconds = time.monotonic() - started

    def _record(self, sequence: int, *, wait: bool) -> tuple[Any, int]:
        warm = self._warm.get(sequence)
        if warm is not None:
            return warm
        return self.journal.record(sequence, wait=wait)

    def start(self) -> None:
        """Take writes from now on."""
        # Often, so that what is walked is still in the processor's cache: 50,000 objects that are not take 30 ms. The
        # old ones seldom: few cycles arise here.
        gc.set_threshold(2_000, 20, 50)
        self.journal.start(self._on_durable)

    async def finish(self) -> None:
        """Let running transactions end, then finish the journal: nothing is written any more."""
        if self._transactions:
            await asyncio.wait(self._transactions)
        if self._journal is not None:
            await self._journal.finish()

    async def close(self) -> None:
        """Finish, and give the folder free."""
        await self.finish()
        if self._journal is not None:
            await self._journal.close()

    @property
    def journal(self) -> Journal:
        if self._journal is None:
            raise ModelManagerError("ERR_STORAGE_UNAVAILABLE", "The registry is not open yet.")
        return self._journal

    def check_room(self) -> None:
        """Raises ERR_STORAGE_FULL while the disk is full: a write that frees no room would be refused in the end."""
        if self.journal.full_since is not None:
            raise disk_full()

    @property
    def opened(self) -> bool:
        return self._journal is not None

    # --- reading ---

    async def look(self, look: Callable[[], _T], *, ahead: Callable[[], Sequence[int]] | None = None) -> _T:
        """What `look` finds in the catalog. It is run again when a record it needs had to be read from the disk.

        `ahead` gives the sequences of records that it needs, so that it is not run again for each of them.
        """
        warmed: list[int] = []
        try:
            while True:
                try:
                    return look()
                except RecordCold as cold:
                    wanted = [cold.sequence] if ahead is None else [cold.sequence, *ahead()]
                    ahead = None
                    read = await asyncio.to_thread(self._read, wanted)
                    self._warm.update(read)
                    warmed += read
        finally:
            for sequence in warmed:
                self._warm.pop(sequence, None)

    def _read(self, sequences: Sequence[int]) -> dict[int, tuple[Any, int]]:
        return {sequence: self.journal.record(sequence) for sequence in sequences}

    async def record(self, sequence: int) -> dict[str, Any]:
        """The record of a line of the journal; KeyError if there is none, or none any more."""
        found: dict[str, Any] = await self.look(lambda: self._record(sequence, wait=False)[0])
        return found

    # --- writing ---

    async def transact(
        self,
        scope: str,
        decide: Callable[[], Change | _T],
        *,
        pins: Iterable[str] = (),
        ahead: Callable[[], Sequence[int]] | None = None,
    ) -> Entry | _T:
        """Run `decide` under the lock of `scope`; append the change it returns, or return what else it returns.

        `pins` are storage keys that must stay until this is over, `ahead` is that of `look`. From the decision on the
        transaction outlives a cancelled caller, and `recorded` waits for it.
        """
        held = tuple(pins)
        if not self._scopes.take(scope):
            return await self._transact_in_turn(scope, decide, held, ahead)
        # The way of nearly all writes: decided, handed over and waited for with no task of its own.
        try:
            outcome = decide()
            if not isinstance(outcome, Change):
                self._scopes.release(scope)
                return outcome
            if held:
                self.pin(held)
            key = self._depart(outcome) if "idem" in outcome.record else None
            try:
                written = self.journal.submit(outcome.op, outcome.record, partial(self._settled, scope, held, key))
            except BaseException:
                self._arrive(held, key)
                raise
            if written is None:
                self._arrive(held, key)
        except RecordCold:
            written = None
        except JournalFailed:
            self._scopes.release(scope)
            raise _outcome_unknown() from None
        except BaseException:
            self._scopes.release(scope)
            raise
        if written is None:
            self._scopes.release(scope)
            return await self._transact_in_turn(scope, decide, held, ahead)
        try:
            return await written
        except JournalFailed:
            raise _outcome_unknown() from None

    def _depart(self, change: Change) -> str | None:
        """Note that a record is on its way to the disk; the key of its request, if it has one."""
        idempotency: Idempotency | None = change.record.get("idem")
        if idempotency is None:
            return None
        self._under_way.setdefault(idempotency["key"], asyncio.get_running_loop().create_future())
        return idempotency["key"]

    def _arrive(self, pins: tuple[str, ...], key: str | None) -> None:
        if pins:
            self.unpin(pins)
        if key is not None and (arrived := self._under_way.pop(key, None)) is not None:
            arrived.set_result(None)

    def _settled(self, scope: str, pins: tuple[str, ...], key: str | None) -> None:
        self._scopes.release(scope)
        if pins or key is not None:
            self._arrive(pins, key)

    async def _transact_in_turn(
        self,
        scope: str,
        decide: Callable[[], Change | _T],
        pins: tuple[str, ...],
        ahead: Callable[[], Sequence[int]] | None,
    ) -> Entry | _T:
        """The same for a write that waits: for its turn, for a record, or for room."""
        abandoned = asyncio.Event()
        task = asyncio.create_task(self._transact(scope, decide, abandoned, ahead))
        self.pin(pins)
        self._transactions.add(task)
        task.add_done_callback(self._transactions.discard)
        task.add_done_callback(lambda _: self.unpin(pins))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            abandoned.set()
            raise

    async def _transact(
        self,
        scope: str,
        decide: Callable[[], Change | _T],
        abandoned: asyncio.Event,
        ahead: Callable[[], Sequence[int]] | None,
    ) -> Entry | _T:
        await self._scopes.wait(scope)
        try:
            outcome = await self.look(decide, ahead=ahead)
            if not isinstance(outcome, Change):
                return outcome
            if abandoned.is_set():  # its caller may have come again, and would not find it
                raise asyncio.CancelledError
            key = self._depart(outcome)
            try:
                return await self.journal.append(outcome.op, outcome.record)
            finally:
                self._arrive((), key)
        except JournalFailed:
            raise _outcome_unknown() from None
        finally:
            self._scopes.release(scope)

    def _on_durable(self, entries: Sequence[Entry]) -> None:
        self.catalog.apply(entries)
        for entry in entries:
            for listener in self._listeners:
                listener(entry)
        if self._moved is not None:
            self._moved.set()
            self._moved = None

    def listen(self, listener: Callable[[Entry], None]) -> None:
        """Call `listener` for each entry, in order, once it is in the catalog; it must not block or raise."""
        self._listeners.append(listener)

    async def moved(self, timeout_s: float) -> None:
        """Wait until something is written, at most `timeout_s`."""
        if self._moved is None:
            self._moved = asyncio.Event()
        try:
            async with asyncio.timeout(timeout_s):
                await self._moved.wait()
        except TimeoutError:
            return

    # --- pins ---

    def pin(self, keys: Iterable[str]) -> None:
        """Keep these blobs from being removed, though no record names them yet."""
        for key in keys:
            self._pins[key] = self._pins.get(key, 0) + 1

    async def pin_stored(self, sha256: str) -> str | None:
        """Pin the blob that holds these bytes, if the rack has them; its key."""
        while True:
            key = await self.look(lambda: self.catalog.blobs.key_of(sha256))
            if key is None:
                return None
            if self.wanted(key):  # it may have gone while its record was read
                self.pin([key])
                return key

    def unpin(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._pins[key] -= 1
            if self._pins[key] == 0:
                del self._pins[key]
                self._unpinned.add(key)

    def wanted(self, key: str) -> bool:
        """Whether the blob must stay: a record or a pin needs it."""
        return key in self._pins or self.catalog.blobs.needs(key)

    def take_unwanted(self) -> set[str]:
        """The storage keys that lost their last record or pin since the last call: their blobs may be removed.

        Empty after the journal failed, since it is then unknown what the records need.
        """
        if not self.journal.healthy:
            return set()
        candidates = self.catalog.blobs.take_unneeded() | self._unpinned
        self._unpinned = set()
        return {key for key in candidates if not self.wanted(key)}

    def give_back(self, keys: Iterable[str]) -> None:
        """Of what `take_unwanted` returned, or a sweep found: blobs that could not be removed yet."""
        self._unpinned.update(keys)

    # --- repeated requests ---

    def knows(self, idempotency: Idempotency) -> bool:
        """Whether `recorded` has anything to look at: mostly a request is a new one."""
        key = idempotency["key"]
        return key in self._under_way or self.catalog.requests.get(key) is not None

    async def recorded(self, idempotency: Idempotency) -> Entry | None:
        """The entry of the effect this request had already, if that is remembered; ERR_CONFLICT if the key belongs to
        another request.

        Waits for a record that is on its way.
        """
        under_way = self._under_way.get(idempotency["key"])
        if under_way is not None:
            await asyncio.shield(under_way)
        known = self.catalog.requests.get(idempotency["key"])
        if known is None:
            return None
        if known.hash != idempotency["hash"]:
            raise ModelManagerError("ERR_CONFLICT", "This idempotency key was used for another request.")
        try:
            return await asyncio.to_thread(self.journal.entry, known.sequence)
        except KeyError:  # it was old enough to go with a compaction
            return None


def _outcome_unknown() -> ModelManagerError:
    return ModelManagerError(
        "ERR_STORAGE_UNAVAILABLE",
        "The registry's disk failed; whether this was stored is not known. Repeat the request.",
    )
