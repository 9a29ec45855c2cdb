"""What Prometheus can read of a worker: requests, state, and the parts that `metric_observers.py` has.

Series whose labels are known are there from the start, at 0. What mirrors a state (models, cache, journal) is read when
Prometheus asks: nothing polls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, get_args

import prometheus_client
import structlog
from prometheus_client import CollectorRegistry

from schemas.errors import ERRORS
from schemas.json_schemas import CONTRACT
from schemas.rpc import METHODS, JobState
from worker import __version__
from worker.metric_observers import (
    OTHER,
    REQUEST_S,
    AmqpMetrics,
    ArchiveMetrics,
    Children,
    HttpMetrics,
    JournalMetrics,
    Objects,
    ReplicationMetrics,
    ScrubMetrics,
    StorageMetrics,
    Store,
    Values,
)

if TYPE_CHECKING:
    from worker.cache import ModelCache
    from worker.jobs.runner import Jobs
    from worker.readiness import Readiness
    from worker.registry import Registry

_log = structlog.get_logger()

_FORMATS_MAX = 20

# What the error budget counts, so that their first occurrence is seen as an increase.
_CODES_FROM_THE_START = ("ok", "ERR_INTERNAL", *(code for code, kind in ERRORS.items() if kind.retryable))
_LAG_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)


class _State:
    """Gauges that are read off the worker's state for each scrape."""

    def __init__(self, objects: Objects) -> None:
        self.models = objects.gauge("models", "Models; live: with a version that is not deleted.", ["state"])
        self.versions = objects.gauge("model_versions", "Versions; deleted ones can still be restored.", ["state"])
        self.bytes = objects.gauge(
            "model_bytes", "Sizes of the versions, bytes they share counted each time.", ["state"]
        )
        self.formats = objects.gauge("model_formats", "Live versions by format.", ["format"])
        self.uploads = objects.gauge("uploads_open", "Uploads that are open or completed, and not stored yet.")
        self.jobs = objects.gauge("jobs", "Jobs the registry remembers.", ["state"])
        self.sequence = objects.gauge("journal_last_sequence", "The number of the last durable record.")
        self.journal_bytes = objects.gauge("journal_bytes", "The durable bytes of the journal.")
        self.full = objects.gauge("registry_full", "1 while the registry's disk is full: only deletes are taken.")
        self.replay = objects.gauge("journal_replay_seconds", "How long the boot took to verify and replay it.")
        self.ready = objects.gauge("ready", "1 while requests should be sent here.")
        self.free = objects.gauge("disk_free_bytes", "Room on the disk of the blobs or the registry.", ["disk"])
        self.entries = objects.gauge("cache_entries", "Models in the cache.")
        self.cached = objects.gauge("cache_bytes", "Bytes in the cache.")
        self.hits = objects.counter("cache_hits_total", "Look-ups the cache could answer.")
        self.misses = objects.counter("cache_misses_total", "Look-ups it could not.")
        self.counted_hits = self.counted_misses = 0
        for gauge in (self.models, self.versions, self.bytes):
            for state in ("live", "deleted"):
                gauge.labels(state)
        for job_state in get_args(JobState):
            self.jobs.labels(job_state)


class Metrics:
    """All there is to scrape of one worker. Its parts have the names of what they measure."""

    def __init__(self, rack: str, registry: CollectorRegistry | None = None, *, revision: str = "unknown") -> None:
        # Else every counter and histogram has a second series, read by nobody.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry or CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self._registry)
        prometheus_client.PlatformCollector(registry=self._registry)
        prometheus_client.GCCollector(registry=self._registry)
        objects = Objects(self._registry)
        objects.info("build", "The build.", version=__version__, revision=revision, schema=CONTRACT)
        objects.info("rack", "The rack.", rack=rack)
        self._lag = objects.histogram("event_loop_lag_seconds", "How late the event loop wakes up.", _LAG_S)
        self._mismatches = objects.counter("checksum_mismatch_total", "Bytes with a wrong checksum.", ["where"])
        self._orphans = objects.counter("orphans_removed_total", "Blobs removed that nothing needs.", ["kind"])
        self._scrape_errors = objects.counter("scrape_errors_total", "States that could not be read for a scrape.")
        self._requests = Children(objects.counter("rpc_requests_total", "Requests that ended.", ["op", "code"]))
        self._durations = Children(
            objects.histogram("rpc_request_duration_seconds", "Start to reply.", REQUEST_S, ["op"])
        )
        self._in_flight = Children(objects.gauge("rpc_in_flight", "Requests in progress.", ["op"]))
        self._duplicates = objects.counter("rpc_duplicate_total", "Requests answered from an earlier one's record.")
        self._ops = Values((*METHODS, "unknown"))
        self._codes = Values((*ERRORS, "ok", "ERR_CANCELLED"))
        self._places = Values(("upload", "read", "validate"), room=4)
        self._kinds = Values(("orphan", "unneeded"), room=4)
        self._state, self._store = _State(objects), Store(objects)
        self.amqp, self.http, self.journal = AmqpMetrics(objects), HttpMetrics(objects), JournalMetrics(objects)
        self.archive, self.scrub = ArchiveMetrics(objects), ScrubMetrics(objects)
        self.replication = ReplicationMetrics(objects)
        self._callbacks: list[Callable[[], None]] = []
        for method in METHODS:
            self._durations[method,]
            self._in_flight[method,]
            for code in _CODES_FROM_THE_START:
                self._requests[method, code]
        for where in ("upload", "read", "validate"):
            self._mismatches.labels(where)
        for kind in ("orphan", "unneeded"):
            self._orphans.labels(kind)

    # --- things that happen ---

    def request_started(self, method: str) -> None:
        self._in_flight[self._ops(method),].inc()

    def request_ended(self, method: str, code: str, seconds: float) -> None:
        """`code` is `ok` or an error code."""
        op = self._ops(method)
        self._in_flight[op,].dec()
        self._requests[op, self._codes(code)].inc()
        self._durations[op,].observe(seconds)
        if code == "ERR_CHECKSUM_MISMATCH" and method in ("storeModel", "getModel"):
            self.checksum_mismatch("upload" if method == "storeModel" else "read")

    def request_repeated(self) -> None:
        self._duplicates.inc()

    def storage(self, backend: str) -> StorageMetrics:
        """Where a blob store of this backend tells what it does."""
        return StorageMetrics(self._store, backend)

    def blob_removed(self, kind: str) -> None:
        self._orphans.labels(self._kinds(kind)).inc()

    def checksum_mismatch(self, where: str) -> None:
        """Bytes did not have their checksum, in an `upload`, when they were `read`, or when `validate` looked."""
        self._mismatches.labels(self._places(where)).inc()

    def replayed(self, seconds: float) -> None:
        self._state.replay.set(seconds)

    def loop_lag(self, seconds: float) -> None:
        self._lag.observe(seconds)

    def disk_free(self, disk: str, size: int) -> None:
        """The room on the disk of the `blobs` or the `registry`, in bytes."""
        self._state.free.labels(disk).set(size)

    # --- the scrape ---

    def collect(self, callback: Callable[[], None]) -> None:
        """Call this before every scrape, to set what mirrors a state. It must be quick; a failure is only counted."""
        self._callbacks.append(callback)

    def mirror(self, registry: Registry, cache: ModelCache, jobs: Jobs, readiness: Readiness) -> None:
        """Set all that is read off an open registry and the parts around it."""
        state, catalog, journal = self._state, registry.catalog, registry.journal.stats()
        for gauge, live, deleted in (
            (state.models, catalog.totals.models, catalog.table.models - catalog.totals.models),
            (state.versions, catalog.totals.versions, len(catalog.deleted)),
            (state.bytes, catalog.totals.bytes, catalog.deleted_bytes),
        ):
            gauge.labels("live").set(live)
            gauge.labels("deleted").set(deleted)
        self._mirror_formats(catalog.table.type_counts())
        counts = jobs.counts()
        for job_state in get_args(JobState):
            state.jobs.labels(job_state).set(counts.get(job_state, 0))
        state.uploads.set(sum(upload.state in ("open", "completed") for upload in catalog.uploads.values()))
        state.sequence.set(journal.head)
        state.journal_bytes.set(journal.bytes)
        state.full.set(registry.journal.full_since is not None)
        state.ready.set(readiness.ready)
        cached = cache.stats()
        state.entries.set(cached.entries)
        state.cached.set(cached.bytes)
        state.hits.inc(cached.hits - state.counted_hits)
        state.misses.inc(cached.misses - state.counted_misses)
        state.counted_hits, state.counted_misses = cached.hits, cached.misses

    def _mirror_formats(self, counts: dict[str, int]) -> None:
        """The most frequent formats under their names, all others together: callers choose these names."""
        self._state.formats.clear()
        ranked = sorted(counts, key=lambda name: (-counts[name], name))
        for name in ranked[:_FORMATS_MAX]:
            self._state.formats.labels(name).set(counts[name])
        self._state.formats.labels(OTHER).inc(sum(counts[name] for name in ranked[_FORMATS_MAX:]))

    def render(self) -> tuple[str, bytes]:
        """The content type and the body of a scrape."""
        self.amqp.count_blocked_time()
        for callback in self._callbacks:
            try:
                callback()
            except Exception:  # noqa: BLE001 - one broken disk must not hide all other numbers, now of all times
                self._scrape_errors.inc()
                _log.exception("metrics_not_collected")
        return prometheus_client.CONTENT_TYPE_PLAIN_0_0_4, prometheus_client.generate_latest(self._registry)
