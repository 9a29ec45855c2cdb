"""Every Prometheus object in one place: names, labels, buckets, and a short method for each thing that happens.

All names begin with `model_manager_`. A label only ever has values of a table, or the first few of an open set, so that
no caller can make the number of series grow. Series whose labels are known are there from the start, at 0. What mirrors
a state (models, cache, journal) is read when Prometheus asks: nothing polls. All methods are quick, never raise, and may
be called from any thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, get_args

import prometheus_client
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from schemas.errors import ERRORS
from schemas.hints import HINT_TYPES
from schemas.journal import RECORDS
from schemas.json_schemas import CONTRACT
from schemas.routes import CONTENT, FILE, ROUTES, UPLOAD_FILE
from schemas.rpc import METHODS, JobState
from worker import __version__
from worker.journal.observer import JournalObserver

if TYPE_CHECKING:
    from worker.cache import ModelCache
    from worker.jobs.runner import Jobs
    from worker.readiness import Readiness
    from worker.registry import Registry

_log = structlog.get_logger()

PREFIX = "model_manager_"
OTHER = "other"

# What the error budget counts, so that their first occurrence is seen as an increase.
_CODES_FROM_THE_START = ("ok", "ERR_INTERNAL", *(code for code, kind in ERRORS.items() if kind.retryable))
_ROUTES = {route.path for route in ROUTES} | {CONTENT, FILE, UPLOAD_FILE}
_PROBES = {"/livez", "/readyz", "/health", "/metrics", "/version", "/openapi.json"}
_VERBS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"}

_REQUEST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_WAIT_S = (0.01, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60)
_SYNC_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_TRANSFER_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
_LAG_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)


class _Values:
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


class _Objects:
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


class Metrics:
    """All there is to scrape of one worker. The parts `amqp`, `http`, `journal` and `storage()` are for who they name."""

    def __init__(self, rack: str, registry: CollectorRegistry | None = None, *, revision: str = "unknown") -> None:
        prometheus_client.disable_created_metrics()  # a second series for each counter and histogram, read by nobody
        self._registry = registry or CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self._registry)
        prometheus_client.PlatformCollector(registry=self._registry)
        prometheus_client.GCCollector(registry=self._registry)
        objects = _Objects(self._registry)
        objects.info("build", "The build.", version=__version__, revision=revision, schema=CONTRACT)
        objects.info("rack", "The rack.", rack=rack)
        self._lag = objects.histogram("event_loop_lag_seconds", "How late the event loop wakes up.", _LAG_S)
        self._scrape_errors = objects.counter("scrape_errors_total", "States that could not be read for a scrape.")
        self._collecting: list[Callable[[Metrics], None]] = []
        self._requests = _Requests(objects)
        self._state = _State(objects)
        self._store = _Store(objects)
        self.amqp = AmqpMetrics(objects)
        self.http = HttpMetrics(objects)
        self.journal = JournalMetrics(objects)
        # What Prometheus reads of a request is under the names that the dispatcher tells it by.
        self.request_started = self._requests.started
        self.request_ended = self._requests.ended
        self.request_repeated = self._requests.repeated
