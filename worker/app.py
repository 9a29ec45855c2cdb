"""The composition root: builds everything from the settings, starts it in order, and drains it in order.

Boot: HTTP listens (not ready, saying why) -> registry locked, verified, replayed -> storage reachable and ours -> open
for requests, jobs resumed -> broker. Drain: not ready, no new writes -> consumer cancelled, running requests finish ->
HTTP transfers finish -> jobs left for the next boot -> journal ends with its mark -> archive finished -> registry free.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import time
from collections.abc import Awaitable
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from schemas.documents import openapi_bytes
from schemas.errors import ERRORS, EXIT_CONFIG_INVALID, ModelManagerError
from worker import __version__
from worker.announcer import Announcer
from worker.boot import BootRefused, begin_archive, open_registry, own_storage, reach_storage
from worker.build import build_policy, build_store
from worker.cache import ModelCache
from worker.client.hints import hints
from worker.dispatch import Dispatcher
from worker.journal import Entry, disk_full
from worker.logs import configure_logs
from worker.metrics import Metrics
from worker.peers import ClientPeers
from worker.readiness import Readiness
from worker.registry import Registry
from worker.replication.replication import Replication
from worker.service.service import ModelService
from worker.settings import Loaded
from worker.signing import UrlSigner
from worker.stall import LoopWatch, Supervisor
from worker.transport.amqp import AmqpTransport
from worker.transport.http_server import HttpServer
from worker.transport.link import Broker
from worker.upkeep.archive import Archive
from worker.upkeep.clean_up import CleanUp
from worker.upkeep.compaction import Compaction
from worker.upkeep.ownership import NotOwner, Owner, confirm_ownership, watch_ownership
from worker.upkeep.scrub import Scrub

_log = structlog.get_logger()

_PROBE_PERIOD_S = 10.0
_OWNER_PERIOD_S = 5.0
_EXIT_FAILED = ERRORS["ERR_INTERNAL"].exit_code


async def run(loaded: Loaded, stop: asyncio.Event, *, broker: bool, take_over: bool = False) -> int:
    """Run until `stop` is set; the exit status. With `broker` as a queue worker, else as a standalone HTTP service."""
    settings = loaded.settings
    configure_logs(settings.log.level, settings.log.format, settings.rack)
    for warning in loaded.warnings:
        _log.warning("setting_ignored", reason=warning)
    presence = LoopWatch(settings.timeouts.loop_stall, Supervisor(os.environ))
    watch = asyncio.create_task(presence.run())
    app = App(loaded, presence, broker=broker, take_over=take_over)
    try:
        return await app.run(stop)
    except BootRefused as refused:
        _log.error("boot_refused", reason=str(refused), exit_code=refused.exit_code)
        return refused.exit_code
    finally:
        watch.cancel()
        await asyncio.wait([watch])


class App:
    """One worker. The attributes are its parts, in the order in which they depend on each other."""

    def __init__(self, loaded: Loaded, presence: LoopWatch, *, broker: bool, take_over: bool = False) -> None:
        settings = self._settings = loaded.settings
        self._presence = presence
        self._take_over = take_over
        self._tasks: list[asyncio.Task[None]] = []
        self._failed = asyncio.Event()
        self._exit_code = 0
        self.archive: Archive | None = None
        self.metrics = Metrics(settings.rack, revision=_revision())
        self.readiness = Readiness()
        self.signer = UrlSigner(secrets.token_bytes(32))
        self.store = build_store(settings, self.metrics.storage(settings.storage.backend))
        self.cache = ModelCache(settings.cache.max_entries, settings.cache.max_bytes)
        self.registry = Registry(settings.registry.path, observe=self.metrics.journal)
        self.service = ModelService(
            self.registry,
            self.store,
            build_policy(settings),
            self.cache,
            self.readiness,
            get_url=lambda path, seconds: self._signed_url("GET", path, seconds),
            put_url=lambda path, seconds: self._signed_url("PUT", path, seconds),
            job_places=settings.limits.jobs,
        )
        self.dispatcher = Dispatcher(
            self.service,
            self.registry,
            self.metrics,
            lookups=settings.limits.lookups,
            writes=settings.limits.writes,
            transfers=settings.limits.transfers,
        )
        self.clean_up = CleanUp(
            self.registry,
            self.store,
            self.service.uploads,
            period_s=settings.limits.clean_up_seconds,
            undo_s=settings.limits.undo_seconds,
            removed=self.metrics.blob_removed,
        )
        self.scrub = Scrub(
            self.registry,
            self.store,
            is_sound=self.service.checking.is_sound,
            judge=self.service.checking.judge,
            period_s=settings.limits.scrub_seconds,
            observe=self.metrics.scrub,
        )
        self.compaction = Compaction(self.registry, observe=self.metrics.journal)
        self.http = self._http_server(loaded)
        self.amqp = self._amqp_transport(loaded) if broker else None
        if self.amqp is not None:
            self.announcer = Announcer(settings.rack, self.registry, self.amqp.announce)
            self.replication = self._replication(loaded)
        self.registry.listen(self._count)
        self._measure_disks()

    def _http_server(self, loaded: Loaded) -> HttpServer:
        http, timeouts = self._settings.http, self._settings.timeouts
        return HttpServer(
            host=http.host,
            port=http.port,
            token=loaded.token,
            dispatcher=self.dispatcher,
            service=self.service,
            readiness=self.readiness,
            metrics=self._render_metrics,
            version_info={"name": "wrk-model-manager", "version": __version__, "revision": _revision()},
            signer=self.signer,
            header_timeout_s=timeouts.http_header,
            idle_timeout_s=timeouts.http_idle,
            openapi=openapi_bytes(),
            observe=self.metrics.http,
        )

    def _amqp_transport(self, loaded: Loaded) -> AmqpTransport:
        return AmqpTransport(
            broker=Broker(lambda: loaded.amqp_url, loaded.amqp_files),
            rack=self._settings.rack,
            provision=self._settings.amqp.provision,
            dispatcher=self.dispatcher,
            prefetch=self._settings.limits.prefetch,
            observer=self.metrics.amqp,
        )

    def _replication(self, loaded: Loaded) -> Replication:
        peers = ClientPeers(lambda: loaded.amqp_url, self._settings.rack)
        replication = Replication(
            self.registry,
            self.store,
            build_policy(self._settings),
            self.cache,
            peers,
            hear=lambda: hints(loaded.amqp_url, self._settings.rack),
            refuse=self.service.refuse_stored,
            places=self._settings.limits.pulls,
            observe=self.metrics.replication,
        )
        self.service.replicating.peers = peers
        self.service.reading.pull_state = replication.puller.state_of
        self.service.reading.replication_state = replication.state
        return replication

    async def run(self, stop: asyncio.Event) -> int:
        """Boot, serve until `stop` or a failure, drain."""
        stopping = asyncio.create_task(stop.wait())
        try:
            booting = asyncio.create_task(self._boot())
            await asyncio.wait([booting, stopping], return_when=asyncio.FIRST_COMPLETED)
            if booting.done():
                booting.result()
                failing = asyncio.create_task(self._failed.wait())
                await asyncio.wait([stopping, failing], return_when=asyncio.FIRST_COMPLETED)
                failing.cancel()
            else:
                booting.cancel()
                await asyncio.wait([booting])
        finally:
            stopping.cancel()
            await self._drain()
        return self._exit_code

    # --- boot ---

    async def _boot(self) -> None:
        self.readiness.set("registry", False, "not open yet")
        self.readiness.set("storage", False, "not looked at yet")
        if self.amqp is not None:
            self.readiness.set("broker", False, "not connected yet")
        listening = await self._listen(again=False)
        await open_registry(self.registry, self.readiness)
        self.metrics.replayed(self.registry.replay_seconds)
        if not listening:
            await self._listen(again=True)
        await reach_storage(self.store, self.readiness)
        owner = await own_storage(self.store, self.registry, rack=self._settings.rack, take_over=self._take_over)
        self.dispatcher.vouch = lambda: self._confirm_ownership(owner) if self._presence.doubtful else None
        self.clean_up.spare_older_than(owner)
        if self._settings.archive.enabled:
            archive = self._archive()
            await begin_archive(archive)
            self.archive = archive  # from here on: one that must not be used is not finished either
        self.registry.start()
        self.readiness.set("registry", True)
        self._tell_room()
        resumed = self.service.jobs.resume()
        self._background(self.clean_up.run(), "clean-up")
        self._background(self.compaction.run(), "compaction")
        if self._settings.limits.scrub_seconds:
            self._background(self.scrub.run(), "scrub")
        self._background(self._watch_ownership(owner), "ownership")
        if self.archive is not None:
            self._background(self.archive.run(), "archive")
        self._background(self._watch(), "watch")
        if self.amqp is not None:
            await self.amqp.start()
            self._background(self.announcer.tell_head(), "head hints")
            self._background(self.replication.run(), "replication")
        _log.info(
            "worker_started",
            version=__version__,
            storage=self.store.backend,
            models=self.registry.catalog.totals.models,
            versions=self.registry.catalog.totals.versions,
            replay_seconds=round(self.registry.replay_seconds, 3),
            jobs_resumed=resumed,
            http=self._base_url(),
        )

    async def _listen(self, *, again: bool) -> bool:
        """Whether HTTP listens. A taken port is waited for once: the process that holds the lock may hold it too."""
        try:
            await self.http.start()
        except OSError as error:
            address = f"{self._settings.http.host}:{self._settings.http.port}"
            if again:
                raise BootRefused(f"cannot listen on {address}: {error.strerror}") from None
            _log.warning("http_address_taken", address=address, reason=error.strerror)
            return False
        return True

    def _archive(self) -> Archive:
        settings = self._settings.archive
        archive = Archive(
            self.registry.journal,
            self.store,
            rack=self._settings.rack,
            period_s=settings.period_seconds,
            keep_s=settings.keep_seconds,
            observe=self.metrics.archive,
        )
        self.service.reading.archive_state = lambda: {
            "archivedSequence": archive.head,
            "archiveLagSeconds": round(archive.lag_s, 3),
        }
        self.metrics.collect(lambda: self.metrics.archive.state(archive.head, archive.lag_s))
        return archive

    # --- while it runs ---

    def _background(self, work: Any, name: str) -> None:
        """Run a side task; its death stops the worker rather than leaving it half alive."""
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)
        self._tasks.append(task)

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                _log.error("side_task_died", task=name, exc_info=task.exception())
                self._fail(_EXIT_FAILED)

        task.add_done_callback(ended)

    def _fail(self, exit_code: int) -> None:
        """End the worker; the first reason decides its exit status."""
        self._exit_code = self._exit_code or exit_code
        self._failed.set()

    async def _watch_ownership(self, owner: Owner) -> None:
        """Stop at once when the prefix is another's: nothing more is acknowledged here."""
        try:
            await watch_ownership(self.store, owner, period_s=_OWNER_PERIOD_S)
        except NotOwner as error:
            self._lose_ownership(error)
            await asyncio.Event().wait()

    async def _confirm_ownership(self, owner: Owner) -> None:
        """After an absence: return if the storage is still ours. Raises ModelManagerError."""
        try:
            await self._presence.settle(partial(confirm_ownership, self.store, owner))
        except NotOwner as error:
            self._lose_ownership(error)
            raise ModelManagerError("ERR_SHUTTING_DOWN") from None

    def _lose_ownership(self, error: NotOwner) -> None:
        if not self._failed.is_set():
            _log.error("ownership_lost", reason=str(error), exit_code=EXIT_CONFIG_INVALID)
        self.registry.journal.stop(str(error))
        self._fail(EXIT_CONFIG_INVALID)

    async def _watch(self) -> None:
        """Keep readiness true to the journal, the broker and the store; measure the loop's lag."""
        probed = time.monotonic()
        while True:
            started = time.monotonic()
            await asyncio.sleep(0.5)
            self.metrics.loop_lag(max(0.0, time.monotonic() - started - 0.5))
            journal = self.registry.journal
            if not journal.healthy:
                self.readiness.set("registry", False, journal.failure or "the journal failed")
                self._fail(_EXIT_FAILED)
            else:
                self._tell_room()
            if self.amqp is not None:
                status = self.amqp.status
                self.readiness.set("broker", status.connected and status.consuming, status.reason)
            if time.monotonic() - probed > _PROBE_PERIOD_S:
                probed = time.monotonic()
                await self._probe_storage()

    def _tell_room(self) -> None:
        """A full registry makes the worker not ready; what is sent to it all the same is answered."""
        full = self.registry.journal.full_since is not None
        ready, _ = self.readiness.checks["registry"]
        if full and ready:
            self.readiness.set("registry", False, disk_full().message)
            _log.error("registry_full", reason=disk_full().message)
        elif not full and not ready:
            self.readiness.set("registry", True)
            _log.info("registry_has_room")

    async def _probe_storage(self) -> None:
        try:
            await self.store.probe()
        except ModelManagerError as error:
            self.readiness.set("storage", False, error.message)
        else:
            self.readiness.set("storage", True)

    def _measure_disks(self) -> None:
        folders = {"registry": self._settings.registry.path}
        if self._settings.storage.backend == "disk":
            folders["blobs"] = self._settings.storage.path
        for name, folder in folders.items():
            self.metrics.collect(partial(self._measure_disk, name, folder))

    def _measure_disk(self, name: str, folder: Path) -> None:
        self.metrics.disk_free(name, shutil.disk_usage(folder).free)

    def _count(self, entry: Entry) -> None:
        self.metrics.journal.recorded(entry.op)
        if entry.op == "update" and entry.record["state"] == "quarantined":
            self.metrics.checksum_mismatch("validate")
        if entry.op == "job.end" and entry.record.get("error", {}).get("code") == "ERR_CHECKSUM_MISMATCH":
            self.metrics.checksum_mismatch("upload")

    def _base_url(self) -> str:
        http = self._settings.http
        if http.public_url is not None:
            return http.public_url.rstrip("/")
        host = f"[{http.host}]" if ":" in http.host else http.host
        return f"http://{host}:{self.http.port}"

    def _signed_url(self, verb: str, path: str, seconds: int) -> str:
        query = self.signer.sign(verb, path, expires=int(time.time()) + seconds)
        return f"{self._base_url()}{path}?{query}"

    def _render_metrics(self) -> tuple[str, bytes]:
        if self.registry.opened:
            self.metrics.mirror(self.registry, self.cache, self.service.jobs, self.readiness)
            if self.amqp is not None:
                self.metrics.replication.state(self.replication.state())
        return self.metrics.render()

    # --- the end ---

    async def _drain(self) -> None:
        timeout = self._settings.timeouts.drain
        deadline = time.monotonic() + timeout
        self.readiness.set("draining", False, "the worker is shutting down")
        self.dispatcher.draining = True
        self.http.begin_drain()
        for task in self._tasks:
            task.cancel()
        if self.amqp is not None:
            await self._step(self.amqp.drain(timeout))
            await self._step(self.replication.stop())  # what it wrote into the store is taken away
        await self._step(self.http.finish(max(0.1, deadline - time.monotonic())))
        await self._step(self.http.stop(max(0.1, deadline - time.monotonic())))
        await self._step(self.service.stop())  # an upload that finishes is still looked into
        if self.amqp is not None:
            await self._step(self.amqp.close())
        await self._step(self.registry.finish())
        if self.archive is not None:
            await self._step(self.archive.finish(max(1.0, deadline - time.monotonic())))
        await self._step(self.registry.close())  # its next owner begins at once, and archives: not two at a time
        await self._step(self.store.close())
        _log.info("worker_stopped")

    async def _step(self, work: Awaitable[Any]) -> None:
        """One step of the drain: a failure is told, and the next steps still run."""
        try:
            await work
        except Exception:  # noqa: BLE001 - the journal must be closed whatever else goes wrong
            _log.exception("drain_step_failed")


def _revision() -> str:
    return os.environ.get("MODEL_MANAGER_REVISION", "unknown")
