"""Pulling: the bytes of versions that name this rack, from their origin or another rack that holds them.

A pull is recorded before its first byte and until the copy is complete, and so is each file of some size that has come:
a restart, or another try, goes on with the others. What fails is tried again for as long as the origin says that the
copy should be here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

import structlog

from schemas.errors import ModelManagerError
from schemas.journal import StoredFile
from schemas.model import media_type
from worker.catalog.replicas import Pull
from worker.catalog.table import QUARANTINED, REPLICA
from worker.journal import Entry, JournalDamaged
from worker.pins import Pins, pinned
from worker.policy import Policy
from worker.registry import Registry
from worker.replication.download import Download, PullObserver
from worker.replication.mirror import Mirror
from worker.replication.peers import Given, Gone, Peers, Told, ask, locate
from worker.replication.schedule import Schedule, Trial
from worker.storage.blobstore import BlobInfo, BlobMissing, BlobStore

_log = structlog.get_logger()

_LOOK_AGAIN_S = 10.0
_RECORDED_BYTES = 1024 * 1024  # a smaller file is sooner brought again than recorded

Refuse = Callable[[str, Sequence[StoredFile]], Awaitable[None]]


class Puller:
    """Runs at most `places` pulls at once, and one for each model: what was stored first comes first."""

    def __init__(
        self,
        registry: Registry,
        store: BlobStore,
        policy: Policy,
        mirror: Mirror,
        peers: Peers,
        *,
        refuse: Refuse,
        places: int,
        observe: PullObserver,
    ) -> None:
        self._registry = registry
        self._store = store
        self._policy = policy
        self._mirror = mirror
        self._peers = peers
        self._refuse = refuse
        self._places = places
        self._observe = observe
        self._running: set[asyncio.Task[None]] = set()
        self._schedule = Schedule(())
        self._spoiled: set[tuple[str, str]] = set()
        self._wake = asyncio.Event()
        registry.listen(self._on_entry)

    def _on_entry(self, entry: Entry) -> None:
        record = entry.record
        if entry.op == "pull.begin":
            pull = self._registry.catalog.replicas.pull_of(record["model"], record["version"])
            if pull is not None:
                self._schedule.add(pull)
                self._wake.set()
        elif entry.op == "pull.end":
            self._schedule.end(record["model"], record["version"])
        elif entry.op == "update" and "replicaOf" in record and record["state"] == "quarantined":
            self._spoiled.add((record["model"], record["version"]))
            self._wake.set()

    def state_of(self, model: str, version: str) -> dict[str, Any]:
        """What to tell of a version that is not here yet; empty if it is not awaited."""
        trial = self._schedule.trial_of(model, version)
        if trial is None:
            return {}
        state: dict[str, Any] = {
            "state": "pending",
            "origin": trial.pull.origin,
            "size": trial.pull.size,
            "received": trial.received.total(),
        }
        if trial.error is not None:
            state["error"] = {"code": trial.error.code, "message": trial.error.message}
        return state

    def hurry(self, model: str, version: str) -> None:
        """The version has changed at its origin: what failed is tried again now."""
        if self._schedule.hurry(model, version):
            self._wake.set()

    @property
    def failing(self) -> int:
        """How many pulls failed when they were tried last."""
        return self._schedule.failing.total()

    def hopeful(self, origin: str) -> int:
        """How many versions of a rack are awaited that have not failed."""
        return self._registry.catalog.replicas.awaited[origin] - self._schedule.failing[origin]

    async def run(self) -> None:
        """Pull until cancelled."""
        catalog = self._registry.catalog
        self._schedule = Schedule(catalog.replicas.pulls())
        for row in catalog.table.rows_with(QUARANTINED | REPLICA):  # of which an earlier process began no pull any more
            self._spoiled.add((catalog.table.model[row], catalog.table.version[row]))
        try:
            while True:
                self._wake.clear()
                await self._pull_spoiled()
                now = time.monotonic()
                while len(self._running) < self._places and (trial := self._schedule.start(now)) is not None:
                    self._start(trial)
                wait_s = self._schedule.wait_s(now)
                if self._spoiled:
                    wait_s = min(wait_s or _LOOK_AGAIN_S, _LOOK_AGAIN_S)
                try:
                    async with asyncio.timeout(wait_s):
                        await self._wake.wait()
                except TimeoutError:
                    continue
        finally:
            for task in self._running:
                task.cancel()
            if self._running:
                await asyncio.wait(self._running)

    async def _pull_spoiled(self) -> None:
        """Begin a pull for each copy that is quarantined."""
        for model, version in list(self._spoiled):
            try:
                await self._mirror.mend(model, version)
            except ModelManagerError as error:
                _log.warning("pull_not_begun", model=model, version=version, code=error.code, reason=error.message)
                continue
            except (OSError, KeyError, JournalDamaged) as error:  # its record cannot be read: nobody can mend that here
                _log.error("pull_not_begun", model=model, version=version, reason=str(error))
            self._spoiled.discard((model, version))

    def _start(self, trial: Trial) -> None:
        task = asyncio.create_task(self._try(trial), name=f"pull {trial.pull.model}:{trial.pull.version}")
        self._running.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._running.discard(task)
            self._wake.set()

        task.add_done_callback(ended)

    async def _try(self, trial: Trial) -> None:
        pull, error, away = trial.pull, None, False
        trial.received.clear()
        try:
            await self._bring(pull, trial)
        except _Away as failure:
            error, away = failure.error, True
        except _Ours as failure:
            error = failure.error
            if not error.retryable:
                await self._let_go(pull)
        except ModelManagerError as failure:
            error = failure
        except Exception:  # noqa: BLE001 - whatever a stranger's answer breaks, the others are pulled
            _log.exception("pull_failed", model=pull.model, version=pull.version, origin=pull.origin)
            error = ModelManagerError("ERR_INTERNAL")
        pause = self._schedule.done(trial, error, away=away)
        self._observe.pulled(pull.origin, None if error is None else error.code)
        if error is not None:
            _log.warning(
                "pull_postponed",
                model=pull.model,
                version=pull.version,
                origin=pull.origin,
                code=error.code,
                reason=error.message,
                seconds=round(pause, 1),
            )

    async def _let_go(self, pull: Pull) -> None:
        """Keep nothing of what came: this rack does not take it now, or has no room for it, which others may use."""
        try:
            await self._mirror.bring(pull, None)
        except ModelManagerError as error:
            _log.warning("pulled_files_kept", model=pull.model, version=pull.version, code=error.code)

    # --- one pull ---

    async def _bring(self, pull: Pull, trial: Trial) -> None:
        """Bring the bytes, then make the copy what the origin tells at that moment."""
        told = await self._told(pull)
        if told is None:
            return
        with _ours():
            self._policy.check_type(told.metadata.type)
            self._policy.check_size(told.size)
        entry = await self._registry.look(lambda: self._registry.catalog.find(pull.model, pull.version))
        with pinned(self._registry) as pins:
            if entry is None or entry.quarantined:
                files = await self._bring_files(pull, told, pins, trial)
            else:
                files = list(entry.files)  # an earlier try came as far as that
            async with self._mirror.turn(pull.model):
                now = await self._told(pull, in_turn=True)
                if now is None:
                    return
                if now.created_at != told.created_at:  # purged meanwhile and stored anew, perhaps under another path
                    raise ModelManagerError("ERR_STORAGE_UNAVAILABLE", "The version was stored anew meanwhile.")
                if not await self._mirror.arrive(pull, now, files):
                    return
                await self._mirror.match(now)
                if not await self._mirror.end(pull):
                    raise ModelManagerError("ERR_STORAGE_UNAVAILABLE", "The copy has gone bad meanwhile.")
        _log.info("model_replicated", model=pull.model, version=pull.version, origin=pull.origin, size=pull.size)

    async def _told(self, pull: Pull, *, in_turn: bool = False) -> Told | None:
        """What the origin tells of the version; None if it is another one by now or should not be here, which is then
        recorded."""
        if not in_turn:
            async with self._mirror.turn(pull.model):
                return await self._told(pull, in_turn=True)
        try:
            told = await ask(self._peers, pull.origin, pull.model, pull.version)
        except ModelManagerError as error:
            raise _Away(error) if error.retryable else error from None
        if isinstance(told, Gone):
            await self._mirror.drop(pull.origin, pull.model, pull.version, told)
            return None
        if told.sha256 == pull.checksum and self._policy.rack in told.replicas:
            return told
        await self._mirror.match(told)
        return None

    async def _bring_files(self, pull: Pull, told: Told, pins: Pins, trial: Trial) -> list[StoredFile]:
        """The files, with their bytes here and verified, if this rack takes what they hold."""
        brought: dict[str, str] = {}
        share = True
        while True:
            files = await self._from_any(pull, told, pins, brought, trial, share=share)
            try:
                with _ours():
                    await self._refuse(told.metadata.type, files)
                return files
            except _Ours as refusal:
                if refusal.error.retryable or all(file["sha256"] in brought for file in files):
                    raise
            share = False  # what was here already may have gone bad since, which nobody has noticed yet

    async def _from_any(
        self, pull: Pull, told: Told, pins: Pins, brought: dict[str, str], trial: Trial, *, share: bool
    ) -> list[StoredFile]:
        """The files from the first rack that can give them; `brought` are storage keys by sha256: of what came from one
        rack, no other is asked."""
        failure: ModelManagerError | None = None
        for rack in dict.fromkeys((pull.origin, *told.replicas)):
            if rack == self._policy.rack:
                continue
            try:
                return await self._from(rack, pull, told, pins, brought, trial, share=share)
            except ModelManagerError as error:
                _log.info("pull_source_failed", model=pull.model, version=pull.version, rack=rack, code=error.code)
                if failure is None or (error.retryable and not failure.retryable):
                    failure = error  # what passes is worth to wait for
        assert failure is not None, "a version has an origin"
        raise failure

    async def _from(
        self, rack: str, pull: Pull, told: Told, pins: Pins, brought: dict[str, str], trial: Trial, *, share: bool
    ) -> list[StoredFile]:
        files = await locate(self._peers, rack, told)
        info = BlobInfo(format=told.metadata.type, model=pull.model, version=pull.version, rack=self._policy.rack)
        stored: list[StoredFile] = []
        for file in files:
            key = brought.get(file.sha256)
            if key is None and share:
                key = await self._shared(file, pins)
                if key is not None:
                    trial.received[file.sha256] = file.size
            if key is None:
                key = pins.new(self._store.new_key())
                download = Download(self._peers, rack, told, file, trial, self._observe)
                try:
                    async with aclosing(download.chunks()) as chunks:
                        await self._store.put(
                            key,
                            chunks,
                            info=info,
                            size=file.size,
                            sha256=file.sha256,
                            max_size=self._policy.max_model_size,
                        )
                    if file.size >= _RECORDED_BYTES:
                        await self._mirror.bring(pull, {"size": file.size, "sha256": file.sha256, "key": key})
                except ModelManagerError as error:
                    if error is download.failure or error.code == "ERR_CHECKSUM_MISMATCH":
                        raise
                    raise _Ours(error) from None
                brought[file.sha256] = key
            stored.append(
                {
                    "path": file.path,
                    "size": file.size,
                    "sha256": file.sha256,
                    "mediaType": media_type(file.path),
                    "key": key,
                }
            )
        return stored

    async def _shared(self, file: Given, pins: Pins) -> str | None:
        """The blob here that has these bytes already, if it has as many of them as it should."""
        key = await pins.stored(file.sha256)
        if key is None:
            return None
        try:
            return key if (await self._store.stat(key)).size == file.size else None
        except BlobMissing:
            return None
        except ModelManagerError as error:
            raise _Ours(error) from None


@dataclass
class _Away(Exception):
    """The origin does not answer."""

    error: ModelManagerError


@dataclass
class _Ours(Exception):
    """Our own store failed, or this rack does not take such a version: another rack would not help."""

    error: ModelManagerError


@contextmanager
def _ours() -> Iterator[None]:
    try:
        yield
    except ModelManagerError as error:
        raise _Ours(error) from None
