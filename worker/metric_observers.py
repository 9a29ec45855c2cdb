"""The Prometheus objects of the parts that report what happens in them, with a short method for each such thing.

All names begin with `model_manager_`. A label only ever has values of a table, or the first few of an open set, so that
no caller can make the number of series grow. All methods are quick, never raise, and may be called from any thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from schemas.errors import ERRORS
from schemas.hints import HINT_TYPES
from schemas.journal import RECORDS
from schemas.routes import CONTENT, FILE, ROUTES, UPLOAD_FILE
from worker.journal.observer import JournalObserver
from worker.replication.download import PullObserver
from worker.storage.blobstore import StoreObserver
from worker.upkeep.archive import ArchiveObserver
from worker.upkeep.scrub import ScrubObserver

PREFIX = "model_manager_"
Child = TypeVar("Child", Counter, Gauge, Histogram)
OTHER = "other"

_ROUTES = {route.path for route in ROUTES} | {CONTENT, FILE, UPLOAD_FILE}
_PROBES = {"/livez", "/readyz", "/health", "/metrics", "/version", "/openapi.json"}
_RESULTS = ("ok", "no_room", "failed")
_VERBS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"}


# Buckets, in seconds.
REQUEST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_WAIT_S = (0.01, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60)
_SYNC_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_TRANSFER_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)


class Values:
    """The values a label may have: the known ones and the first `room` others; any further one reads `other`."""

    def __init__(self, known: Iterable[str], room: int = 0) -> None:
        self._taken = set(known)
        self._limit = len(self._taken) + room

    def __call__(self, value: str) -> str:
        if value in self._taken:
            return value
        if len(self._taken) < self._limit:
            self._taken.add(value)
            return value
        return OTHER


class Children(dict[tuple[str, ...], Child]):
    """The series of one object by their labels, each looked up once; `Values` has to bound what they may be."""

    def __init__(self, parent: Child) -> None:
        super().__init__()
        self._parent: Child = parent

    def __missing__(self, labels: tuple[str, ...]) -> Child:
        child: Child = self._parent.labels(*labels)
        self[labels] = child
        return child


class Objects:
    """Makes the objects of one registry, with our prefix."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(f"{PREFIX}{name}", text, tuple(labels), registry=self._registry)

    def gauge(self, name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
        return Gauge(f"{PREFIX}{name}", text, tuple(labels), registry=self._registry)

    def histogram(self, name: str, text: str, buckets: Iterable[float], labels: Iterable[str] = ()) -> Histogram:
        return Histogram(f"{PREFIX}{name}", text, tuple(labels), buckets=tuple(buckets), registry=self._registry)

    def info(self, name: str, text: str, **values: str) -> None:
        Info(f"{PREFIX}{name}", text, registry=self._registry).info(values)


class AmqpMetrics:
    """What happens on RabbitMQ; an `AmqpObserver`."""

    def __init__(self, objects: Objects) -> None:
        self._connected = objects.gauge("amqp_connected", "1 while both connections are up.")
        self._reconnects = objects.counter("amqp_reconnects_total", "Connections made again after a loss.")
        self._blocked = objects.counter("amqp_blocked_seconds_total", "Time in which the broker read nothing of ours.")
        self._last = objects.gauge("amqp_last_delivery_timestamp_seconds", "When the last request arrived; 0: never.")
        self._confirm = objects.histogram("amqp_publish_confirm_seconds", "Publish to confirm.", REQUEST_S)
        self._failed = objects.counter("amqp_publish_failed_total", "Publishes without a confirm in time.")
        self._wait = objects.histogram(
            "rpc_queue_wait_seconds", "Publish to start; publishers tell it in whole s.", _WAIT_S
        )
        self._redelivered = objects.counter("rpc_redelivered_total", "Requests that had been delivered before.")
        self._requeued = objects.counter("rpc_requeued_total", "Requests handed back to the broker.")
        self._ack_lost = objects.counter("rpc_ack_lost_total", "Acknowledgements that came after their channel's end.")
        self._expired = objects.counter("rpc_expired_total", "Requests whose deadline was over before their start.")
        self._dead = objects.counter("rpc_dead_lettered_total", "Requests that were dead-lettered.", ["reason"])
        self._unroutable = objects.counter("rpc_reply_unroutable_total", "Replies that no one was there to take.")
        self._published = objects.counter("hints_published_total", "Hints the broker confirmed.", ["kind"])
        self._dropped = objects.counter("hints_dropped_total", "Hints dropped since too many were waiting.")
        self._reasons = Values(ERRORS)
        self._kinds = Values(HINT_TYPES)
        self._blocked_since: float | None = None
        for code in ERRORS:
            self._dead.labels(code)
        for kind in HINT_TYPES:
            self._published.labels(kind)

    def connected(self, up: bool) -> None:
        self._connected.set(up)

    def reconnected(self) -> None:
        self._reconnects.inc()

    def blocked(self, blocked: bool) -> None:
        self.count_blocked_time()
        self._blocked_since = time.monotonic() if blocked else None

    def count_blocked_time(self) -> None:
        """Count the time blocked so far, also when it goes on."""
        if self._blocked_since is not None:
            now = time.monotonic()
            self._blocked.inc(now - self._blocked_since)
            self._blocked_since = now

    def delivered(self, redelivered: bool) -> None:
        self._last.set_to_current_time()
        if redelivered:
            self._redelivered.inc()

    def queue_wait(self, seconds: float) -> None:
        self._wait.observe(seconds)

    def expired(self) -> None:
        self._expired.inc()

    def dead_lettered(self, reason: str) -> None:
        self._dead.labels(self._reasons(reason)).inc()

    def requeued(self) -> None:
        self._requeued.inc()

    def ack_lost(self) -> None:
        self._ack_lost.inc()

    def reply_unroutable(self) -> None:
        self._unroutable.inc()

    def publish_confirmed(self, seconds: float) -> None:
        self._confirm.observe(seconds)

    def publish_failed(self) -> None:
        self._failed.inc()

    def hint_published(self, kind: str) -> None:
        self._published.labels(self._kinds(kind)).inc()

    def hint_dropped(self) -> None:
        self._dropped.inc()


class HttpMetrics:
    """What happens over HTTP."""

    def __init__(self, objects: Objects) -> None:
        labels = ["route", "method"]
        self._count = objects.counter("http_requests_total", "Requests that were answered.", [*labels, "status"])
        self._seconds = objects.histogram(
            "http_request_duration_seconds",
            "First byte of the request to the last of the reply.",
            _TRANSFER_S,
            ["route"],
        )
        self._bytes = objects.counter("http_bytes_total", "Bytes of bodies.", ["direction"])
        self._routes = Values(_ROUTES | _PROBES)
        self._verbs = Values(_VERBS)
        self._statuses = Values(str(status.value) for status in HTTPStatus)
        for direction in ("in", "out"):
            self._bytes.labels(direction)

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request was answered; `route` is the template of its path, or anything for an unknown one."""
        route = self._routes(route)
        self._count.labels(route, self._verbs(method), self._statuses(str(status))).inc()
        self._seconds.labels(route).observe(seconds)

    def moved(self, direction: str, count: int) -> None:
        """Bytes of a body went `in` or `out`."""
        self._bytes.labels(direction).inc(count)


class JournalMetrics(JournalObserver):
    """What the journal does."""

    def __init__(self, objects: Objects) -> None:
        self._append = objects.histogram("journal_append_seconds", "Record handed over to acknowledged.", _SYNC_S)
        self._fsync = objects.histogram("journal_fsync_seconds", "One fsync, of a batch of records.", _SYNC_S)
        self._failures = objects.counter("journal_fsync_failures_total", "Failed fsyncs; the journal stops at one.")
        self._torn = objects.counter("journal_torn_tail_repaired_total", "Boots that cut an unfinished write off.")
        self._torn_bytes = objects.counter("journal_torn_tail_bytes_total", "Bytes of unfinished writes cut off.")
        self._records = objects.counter("journal_records_total", "Records written.", ["type"])
        self._compactions = objects.counter("journal_compactions_total", "Compactions that ended.", ["result"])
        self._compaction = objects.histogram("journal_compaction_seconds", "One compaction.", _TRANSFER_S)
        self._compacted = objects.gauge(
            "journal_compaction_bytes", "The last compaction: bytes it read, and those of its base.", ["side"]
        )
        self._results = Values(_RESULTS)
        for result in _RESULTS:
            self._compactions.labels(result)
        for side in ("before", "after"):
            self._compacted.labels(side)
        self._types = Values(RECORDS)
        for op in RECORDS:
            self._records.labels(op)

    def append_seconds(self, seconds: float) -> None:
        self._append.observe(seconds)

    def fsync_seconds(self, seconds: float) -> None:
        self._fsync.observe(seconds)

    def fsync_failed(self) -> None:
        self._failures.inc()

    def torn_tail(self, size: int) -> None:
        self._torn.inc()
        self._torn_bytes.inc(size)

    def compaction_ended(self, result: str, seconds: float) -> None:
        """A compaction is over: `ok`, `no_room` or `failed`."""
        self._compactions.labels(self._results(result)).inc()
        self._compaction.observe(seconds)

    def compacted(self, bytes_before: int, bytes_after: int) -> None:
        self._compacted.labels("before").set(bytes_before)
        self._compacted.labels("after").set(bytes_after)

    def recorded(self, op: str) -> None:
        """A record of this kind is durable."""
        self._records.labels(self._types(op)).inc()


class ArchiveMetrics(ArchiveObserver):
    """What the archive of the journal does."""

    def __init__(self, objects: Objects) -> None:
        self._lag = objects.gauge("archive_lag_seconds", "For how long something durable has not been archived.")
        self._sequence = objects.gauge("archive_last_sequence", "The last record the archive leads to.")
        self._bytes = objects.counter("archive_bytes_total", "Bytes archived.", ["kind"])
        self._rounds = objects.counter("archive_rounds_total", "Times the archive was brought up to date.", ["result"])
        self._seconds = objects.histogram("archive_round_seconds", "How long such a round took.", _TRANSFER_S)
        self._codes = Values((*ERRORS, "ok"))
        for kind in ("tail", "segment", "base"):
            self._bytes.labels(kind)
        for result in ("ok", "ERR_STORAGE_UNAVAILABLE", "ERR_STORAGE_FULL"):
            self._rounds.labels(result)

    def shipped(self, kind: str, size: int) -> None:
        self._bytes.labels(kind).inc(size)

    def round_ended(self, seconds: float, error: str | None) -> None:
        self._rounds.labels(self._codes(error or "ok")).inc()
        self._seconds.observe(seconds)

    def state(self, sequence: int, lag_s: float) -> None:
        """Set what is read for a scrape."""
        self._sequence.set(sequence)
        self._lag.set(lag_s)


class ScrubMetrics(ScrubObserver):
    """What the scrubbing finds."""

    def __init__(self, objects: Objects) -> None:
        self._blobs = objects.counter("scrub_blobs_total", "Stored blobs that were read back.", ["result"])
        self._bytes = objects.counter("scrub_bytes_total", "Their bytes.")
        self._ended = objects.gauge("scrub_last_pass_timestamp_seconds", "When all had been read back; 0 until then.")
        for result in ("sound", "wrong", "unreadable"):
            self._blobs.labels(result)

    def looked_at(self, result: str, size: int) -> None:
        self._blobs.labels(result).inc()
        self._bytes.inc(size)

    def pass_ended(self, at: float) -> None:
        self._ended.set(at)


class ReplicationMetrics(PullObserver):
    """What comes from other racks, by their names as `origin`: `rack` is what a scrape may call this one."""

    def __init__(self, objects: Objects) -> None:
        self._pulls = objects.counter("replication_pulls_total", "Tries to bring a version here.", ["origin", "result"])
        self._bytes = objects.counter("replication_bytes_total", "Bytes that came from a rack.", ["origin"])
        self._lag = objects.gauge(
            "replication_lag_seconds", "Since when a rack's changes may not have been taken in.", ["origin"]
        )
        self._copies = objects.gauge("replication_copies", "Versions of other racks that are here.")
        self._pending = objects.gauge("replication_pending", "Versions of other racks that are awaited.")
        self._failing = objects.gauge("replication_failing", "Those of them whose last try failed.")
        self._conflicts = objects.gauge("replication_conflicts", "Own versions of models another rack stored first.")
        self._codes = Values((*ERRORS, "ok"))
        self._racks = Values((), room=256)

    def pulled(self, rack: str, error: str | None) -> None:
        self._pulls.labels(self._racks(rack), self._codes(error or "ok")).inc()

    def received(self, rack: str, count: int) -> None:
        self._bytes.labels(self._racks(rack)).inc(count)

    def state(self, state: Mapping[str, Any]) -> None:
        """Set what `Replication.state` gives."""
        self._copies.set(state["copies"])
        self._pending.set(state["pending"])
        self._failing.set(state["failing"])
        self._conflicts.set(state["conflicts"])
        for followed in state["following"]:
            self._lag.labels(self._racks(followed["rack"])).set(followed["lagSeconds"])


class StorageMetrics(StoreObserver):
    """What one backend of the blob store does."""

    def __init__(self, store: Store, backend: str) -> None:
        self._store = store
        self._backend = backend

    def operation(self, op: str, seconds: float, error: str | None) -> None:
        """An attempt ended, well or with this error code."""
        store = self._store
        op = store.ops(op)
        store.seconds.labels(op, self._backend).observe(seconds)
        if error is not None:
            store.errors.labels(op, store.codes(error)).inc()

    def retried(self, op: str) -> None:
        """An attempt failed and another follows."""
        self._store.retries.labels(self._store.ops(op)).inc()

    def bytes_moved(self, direction: str, count: int) -> None:
        """Bytes were written to the store, or read from it."""
        self._store.bytes.labels(self._store.directions(direction)).inc(count)


class Store:
    """The objects of the blob store, whatever its backends."""

    def __init__(self, objects: Objects) -> None:
        self.seconds = objects.histogram(
            "store_operation_seconds", "One attempt at one operation.", _TRANSFER_S, ["op", "backend"]
        )
        self.errors = objects.counter("store_errors_total", "Failed attempts.", ["op", "code"])
        self.retries = objects.counter("store_retries_total", "Attempts after a failed one.", ["op"])
        self.bytes = objects.counter("store_bytes_total", "Bytes to and from the store.", ["direction"])
        self.ops = Values((), room=24)
        self.codes = Values(ERRORS, room=8)
        self.directions = Values((), room=4)
