"""Pulling: the bytes of versions that name this rack, from their origin or another rack that holds them.

A pull is recorded before its first byte and until the copy is complete, so a restart goes on with it. What fails is
tried again, for as long as the origin says that the copy should be here.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import structlog

from schemas.errors import ModelManagerError
from schemas.ids import hex_of
from schemas.journal import StoredFile
from schemas.model import DeliveredFile
from schemas.rpc import GetModelReply
from worker.catalog.replicas import Pull
from worker.catalog.table import DELETED, FORGOTTEN, QUARANTINED
from worker.client.pull import checked_files
from worker.journal import Entry
from worker.pins import Pins, pinned
from worker.policy import Policy
from worker.registry import Change, Registry
from worker.replication.mirror import Mirror
from worker.replication.peers import Gone, Peers, Told, ask
from worker.storage.blobstore import BlobInfo, BlobStore

_log = structlog.get_logger()

_BROKEN_MOST = 5  # times in a row that a transfer breaks without a byte in between
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
# After what this rack does not take, or what is wrong everywhere: its bytes may have come for nothing.
_FIRST_REFUSED_PAUSE_S = 600.0
_LONGEST_REFUSED_PAUSE_S = 86_400.0

Refuse = Callable[[str, Sequence[StoredFile]], Awaitable[None]]


class PullObserver:
    """What pulling tells for metrics. Does nothing; override what is of interest."""

    def pulled(self, rack: str, error: str | None) -> None:
        """A pull ended, or one try of it failed with a code; `rack` is the origin."""

    def received(self, rack: str, count: int) -> None:
        """Bytes came from a rack."""


@dataclass(slots=True)
class _Trial:
    """How a pull went so far: `due` in seconds of `time.monotonic`, `received` in bytes."""

    failures: int = 0
    due: float = 0.0
    received: int = 0
    error: ModelManagerError | None = None


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
        self._running: dict[str, asyncio.Task[None]] = {}  # by model in lower case
        self._trials: dict[int, _Trial] = {}  # by the sequence of the pull
        self._spoiled: set[tuple[str, str]] = set()
        self._wake = asyncio.Event()
        registry.listen(self._on_entry)

    def _on_entry(self, entry: Entry) -> None:
        if entry.op == "pull.begin":
            self._wake.set()
        elif entry.op == "update" and "replicaOf" in entry.record and entry.record["state"] == "quarantined":
            self._spoiled.add((entry.record["model"], entry.record["version"]))
            self._wake.set()

    def state_of(self, model: str, version: str) -> dict[str, Any]:
        """What to tell of a version that is not here yet; empty if it is not awaited."""
        pull = self._registry.catalog.replicas.pull_of(model, version)
        if pull is None:
            return {}
        trial = self._trials.get(pull.sequence, _Trial())
        state: dict[str, Any] = {
            "state": "pending",
            "origin": pull.origin,
            "size": pull.size,
            "received": trial.received,
        }
        if trial.error is not None:
            state["error"] = {"code": trial.error.code, "message": trial.error.message}
        return state

    def hurry(self, model: str, version: str) -> None:
        """The version has changed at its origin: what failed is tried again now."""
        pull = self._registry.catalog.replicas.pull_of(model, version)
        trial = None if pull is None else self._trials.get(pull.sequence)
        if trial is not None and trial.due:
            trial.failures, trial.due = 0, 0.0
            self._wake.set()

    @property
    def failing(self) -> int:
        """How many pulls failed when they were tried last."""
        return sum(trial.error is not None for trial in self._trials.values())

    async def run(self) -> None:
        """Pull until cancelled."""
        self._find_spoiled()
        try:
            while True:
                self._wake.clear()
                await self._pull_spoiled()
                due = self._start_due()
                try:
                    async with asyncio.timeout(due):
                        await self._wake.wait()
                except TimeoutError:
                    continue
        finally:
            running = list(self._running.values())
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running)

    def _find_spoiled(self) -> None:
        """Copies that an earlier process found to be bad, and died before it began a pull."""
        catalog = self._registry.catalog
        table = catalog.table
        for rows in catalog.replicas.rows.values():
            for row in rows:
                if table.state[row] & (QUARANTINED | DELETED | FORGOTTEN) == QUARANTINED:
                    self._spoiled.add((table.model[row], table.version[row]))

    async def _pull_spoiled(self) -> None:
        """Begin a pull for each copy that is quarantined."""
        while self._spoiled:
            model, version = self._spoiled.pop()

            def decide(model: str = model, version: str = version) -> Change | None:
                entry = self._registry.catalog.find(model, version)
                known = self._registry.catalog.replicas.pull_of(model, version)
                if entry is None or entry.replica_of is None or not entry.quarantined or known is not None:
                    return None
                record = {
                    "model": model,
                    "version": version,
                    "origin": entry.replica_of,
                    "checksum": entry.checksum,
                    "size": entry.size,
                    "since": entry.since,
                    "replicas": list(entry.replicas),
                    "replicaOf": entry.replica_of,
                }
                return Change("pull.begin", record)

            try:
                await self._registry.transact(model.lower(), decide)
            except ModelManagerError as error:
                _log.warning("pull_not_begun", model=model, version=version, code=error.code, reason=error.message)

    def _start_due(self) -> float | None:
        """Start what may run now; the seconds until another one is due."""
        now = time.monotonic()
        due: list[float] = []
        open_pulls: set[int] = set()
        for pull in self._registry.catalog.replicas.pulls():
            open_pulls.add(pull.sequence)
            trial = self._trials.get(pull.sequence)
            if trial is not None and trial.due > now:
                due.append(trial.due)
            elif len(self._running) < self._places and pull.model.lower() not in self._running:
                self._start(pull)
        for sequence in self._trials.keys() - open_pulls:
            del self._trials[sequence]
        return max(0.0, min(due) - now) if due else None

    def _start(self, pull: Pull) -> None:
        key = pull.model.lower()
        task = asyncio.create_task(self._try(pull), name=f"pull {pull.model}:{pull.version}")
        self._running[key] = task

        def ended(_: asyncio.Task[None]) -> None:
            del self._running[key]
            self._wake.set()

        task.add_done_callback(ended)

    async def _try(self, pull: Pull) -> None:
        trial = self._trials.setdefault(pull.sequence, _Trial())
        trial.received = 0
        try:
            await self._bring(pull, trial)
        except ModelManagerError as error:
            self._fail(pull, trial, error)
        except Exception:  # noqa: BLE001 - whatever a stranger's answer breaks, the others are pulled
            _log.exception("pull_failed", model=pull.model, version=pull.version, origin=pull.origin)
            self._fail(pull, trial, ModelManagerError("ERR_INTERNAL"))
        else:
            self._observe.pulled(pull.origin, None)

    def _fail(self, pull: Pull, trial: _Trial, error: ModelManagerError) -> None:
        first, longest = (
            (_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
            if error.retryable
            else (_FIRST_REFUSED_PAUSE_S, _LONGEST_REFUSED_PAUSE_S)
        )
        pause = min(longest, first * 2 ** min(trial.failures, 16)) * random.uniform(0.5, 1)
        trial.failures += 1
        trial.due = time.monotonic() + pause
        trial.error = error
        self._observe.pulled(pull.origin, error.code)
        _log.warning(
            "pull_postponed",
            model=pull.model,
            version=pull.version,
            origin=pull.origin,
            code=error.code,
            reason=error.message,
            seconds=round(pause, 1),
        )

    # --- one pull ---

    async def _bring(self, pull: Pull, trial: _Trial) -> None:
        """Bring the bytes, then make the copy what the origin tells at that moment."""
        told = await self._told(pull)
        if told is None:
            return
        self._policy.check_type(told.metadata.type)
        self._policy.check_size(told.size)
        entry = await self._registry.look(lambda: self._registry.catalog.find(pull.model, pull.version))
        with pinned(self._registry) as pins:
            if entry is None or entry.quarantined:
                files = await self._bring_files(pull, told, pins, trial)
            else:
                files = list(entry.files)  # an earlier try came as far as that
            async with self._mirror.turn(pull.model):
                told = await self._told(pull, in_turn=True)
                if told is None or not await self._mirror.arrive(pull, told, files):
                    return
                await self._mirror.match(told)
                await self._mirror.end(pull)
        _log.info("model_replicated", model=pull.model, version=pull.version, origin=pull.origin, size=pull.size)

    async def _told(self, pull: Pull, *, in_turn: bool = False) -> Told | None:
        """What the origin tells of the version; None if it is another one by now or should not be here, which is then
        recorded."""
        if not in_turn:
            async with self._mirror.turn(pull.model):
                return await self._told(pull, in_turn=True)
        told = await ask(self._peers, pull.origin, pull.model, pull.version)
        if isinstance(told, Gone):
            await self._mirror.drop(pull.origin, pull.model, pull.version, told)
            return None
        if told.sha256 == pull.checksum and self._policy.rack in told.replicas:
            return told
        await self._mirror.match(told)
        return None

    async def _bring_files(self, pull: Pull, told: Told, pins: Pins, trial: _Trial) -> list[StoredFile]:
        """The files, with their bytes here and verified, if this rack takes what they hold."""
        brought: dict[str, str] = {}
        files = await self._from_any(pull, told, pins, brought, trial, share=True)
        try:
            await self._refuse(told.metadata.type, files)
        except ModelManagerError:
            if all(file["sha256"] in brought for file in files):
                raise
            # What was here already may have gone bad since, which nobody has noticed yet.
            files = await self._from_any(pull, told, pins, brought, trial, share=False)
            await self._refuse(told.metadata.type, files)
        return files

    async def _from_any(
        self, pull: Pull, told: Told, pins: Pins, brought: dict[str, str], trial: _Trial, *, share: bool
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
                failure = failure if failure is not None and not failure.retryable else error
                _log.info("pull_source_failed", model=pull.model, version=pull.version, rack=rack, code=error.code)
        assert failure is not None, "a version has an origin"
        raise failure

    async def _from(
        self, rack: str, pull: Pull, told: Told, pins: Pins, brought: dict[str, str], trial: _Trial, *, share: bool
    ) -> list[StoredFile]:
        reply = await self._peers.rack(rack).get_model(pull.model, pull.version, delivery="url")
        files = checked_files(reply)
        if hex_of(reply["checksum"]) != pull.checksum:
            raise ModelManagerError("ERR_CHECKSUM_MISMATCH", f"{rack} has other bytes under that name.")
        info = BlobInfo(format=told.metadata.type, model=pull.model, version=pull.version, rack=self._policy.rack)
        stored: list[StoredFile] = []
        for file in files:
            sha256 = hex_of(file["checksum"])
            key = brought.get(sha256) or (await pins.stored(sha256) if share else None)
            if key is None:
                key = pins.new(self._store.new_key())
                chunks = _Download(self._peers, rack, reply, file, trial, self._observe).chunks()
                async with aclosing(chunks):
                    await self._store.put(
                        key,
                        chunks,
                        info=info,
                        size=file["size"],
                        sha256=sha256,
                        max_size=self._policy.max_model_size,
                    )
                brought[sha256] = key
            stored.append(
                {
                    "path": file["path"],
                    "size": file["size"],
                    "sha256": sha256,
                    "mediaType": str(file["mediaType"]),
                    "key": key,
                }
            )
        return stored


class _Download:
    """The bytes of one file from one rack, as one stream, whatever connections break."""

    def __init__(
        self,
        peers: Peers,
        rack: str,
        reply: GetModelReply,
        file: DeliveredFile,
        trial: _Trial,
        observe: PullObserver,
    ) -> None:
        self._peers = peers
        self._rack = rack
        self._reply = reply
        self._file = file
        self._trial = trial
        self._observe = observe

    async def chunks(self) -> AsyncGenerator[bytes]:
        """From the first byte to the last. Each connection goes on where the one before it broke, at a new address."""
        offset, broken, url = 0, 0, self._file["url"]
        while offset < self._file["size"]:
            try:
                async with aclosing(self._peers.read(url, offset)) as chunks:
                    async for chunk in chunks:
                        offset, broken = offset + len(chunk), 0
                        self._trial.received += len(chunk)
                        self._observe.received(self._rack, len(chunk))
                        yield chunk
                if offset < self._file["size"]:
                    raise ModelManagerError("ERR_STORAGE_UNAVAILABLE", "The transfer ended too early.")
            except ModelManagerError as error:
                broken += 1
                if not error.retryable or broken >= _BROKEN_MOST:
                    raise
                await asyncio.sleep(random.uniform(0, 0.1 * 2**broken))
                url = await self._new_url()

    async def _new_url(self) -> str:
        reply = await self._peers.rack(self._rack).get_model(
            self._reply["modelId"], self._reply["version"], delivery="url"
        )
        for file in reply["files"]:
            if (file["path"], file["checksum"]) == (self._file["path"], self._file["checksum"]):
                return file["url"]
        raise ModelManagerError("ERR_CHECKSUM_MISMATCH", f"{self._rack} has other bytes under that name by now.")
