"""What Prometheus reads: clean names, labels that cannot grow without bound, and numbers that follow what happened."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from schemas.errors import ERRORS
from schemas.journal_examples import METADATA, RECORD_EXAMPLES
from schemas.rpc import METHODS
from worker.cache import ModelCache
from worker.jobs.runner import Jobs
from worker.journal.observer import JournalObserver
from worker.metrics import Metrics
from worker.readiness import Readiness
from worker.registry import Change, Registry
from worker.transport.amqp_observer import AmqpObserver

PROMETHEUS_YML = Path(__file__).parents[2] / "deploy" / "prometheus" / "prometheus.yml"
SERIES_MAX = 2500

promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (package prometheus)")


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("rack-1")


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """The value of one series as a scrape tells it; None if there is no such series."""
    for family in text_string_to_metric_families(metrics.render()[1].decode()):
        for sample in family.samples:
            if sample.name == f"model_manager_{name}" and sample.labels == labels:
                return sample.value
    return None


def series(metrics: Metrics) -> int:
    return sum(not line.startswith(b"#") for line in metrics.render()[1].splitlines())


def everything_happens(metrics: Metrics, name: Callable[[int], str], times: int) -> None:
    """Every report that takes a name, each with many names."""
    storage = metrics.storage("disk")
    for i in range(times):
        word = name(i)
        metrics.request_started(word)
        metrics.request_ended(word, word, 0.1)
        metrics.request_repeated()
        metrics.blob_removed(word)
        metrics.checksum_mismatch(word)
        metrics.amqp.dead_lettered(word)
        metrics.amqp.hint_published(word)
        metrics.journal.recorded(word)
        metrics.journal.compaction_ended(word, 0.1)
        metrics.http.answered(word, word, i, 0.1)
        storage.operation(word, 0.1, word)
        storage.retried(word)
        storage.bytes_moved(word, 1)


# --- form ------------------------------------------------------------------------------------------------------------


@promtool
def test_promtool_has_nothing_to_say_about_the_metrics(metrics: Metrics) -> None:
    everything_happens(metrics, lambda i: f"name{i}", 3)
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=metrics.render()[1], capture_output=True, timeout=60
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


@promtool
def test_promtool_accepts_the_configuration_that_scrapes_a_worker() -> None:
    checked = subprocess.run(
        ["promtool", "check", "config", PROMETHEUS_YML], capture_output=True, text=True, timeout=60
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    text = PROMETHEUS_YML.read_text()
    assert "job_name: model-manager" in text
    assert "metrics_path: /metrics" in text
    assert '["127.0.0.1:8002"]' in text


def test_every_name_is_ours_or_of_the_process(metrics: Metrics) -> None:
    for family in text_string_to_metric_families(metrics.render()[1].decode()):
        assert family.name.startswith(("model_manager_", "process_", "python_"))
        assert family.documentation


def test_the_scrape_has_the_plain_text_format(metrics: Metrics) -> None:
    assert metrics.render()[0] == "text/plain; version=0.0.4; charset=utf-8"


def test_two_workers_in_one_process_do_not_share_numbers() -> None:
    one, other = Metrics("rack-1"), Metrics("rack-2")
    one.request_repeated()
    assert (value(one, "rpc_duplicate_total"), value(other, "rpc_duplicate_total")) == (1, 0)
    assert value(other, "rack_info", rack="rack-2") == 1


# --- labels ----------------------------------------------------------------------------------------------------------


def test_no_caller_can_make_the_number_of_series_grow(metrics: Metrics) -> None:
    for method in METHODS:
        for code in ERRORS:
            metrics.request_ended(method, code, 0.1)
    everything_happens(metrics, lambda i: f"name{i}", 1000)
    flooded = series(metrics)
    everything_happens(metrics, lambda i: f"another{i}", 1000)
    assert series(metrics) == flooded < SERIES_MAX


def test_an_unknown_method_or_route_counts_as_other(metrics: Metrics) -> None:
    metrics.request_ended("dropTables", "ok", 0.1)
    metrics.http.answered("/wp-admin", "PROPFIND", 404, 0.1)
    assert value(metrics, "rpc_requests_total", op="other", code="ok") == 1
    assert value(metrics, "http_requests_total", route="other", method="other", status="404") == 1


def test_what_alerts_look_at_is_there_from_the_start_at_zero(metrics: Metrics) -> None:
    for method in METHODS:
        for code in ("ok", "ERR_INTERNAL", "ERR_OVERLOADED"):
            assert value(metrics, "rpc_requests_total", op=method, code=code) == 0
    for code in ERRORS:
        assert value(metrics, "rpc_dead_lettered_total", reason=code) == 0
    for name in ("journal_fsync_failures_total", "hints_dropped_total", "amqp_connected", "ready"):
        assert value(metrics, name) == 0


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_a_request_is_in_flight_until_it_ends_and_is_counted_by_its_code(metrics: Metrics) -> None:
    metrics.request_started("storeModel")
    assert value(metrics, "rpc_in_flight", op="storeModel") == 1
    metrics.request_ended("storeModel", "ERR_CONFLICT", 0.2)
    assert value(metrics, "rpc_in_flight", op="storeModel") == 0
    assert value(metrics, "rpc_requests_total", op="storeModel", code="ERR_CONFLICT") == 1
    assert value(metrics, "rpc_request_duration_seconds_sum", op="storeModel") == 0.2


def test_what_happens_on_rabbitmq_is_counted(metrics: Metrics) -> None:
    amqp: AmqpObserver = metrics.amqp
    amqp.connected(True)
    amqp.delivered(True)
    amqp.delivered(False)
    amqp.dead_lettered("ERR_INVALID_REQUEST")
    amqp.hint_published("model-manager.head")
    amqp.queue_wait(2)
    assert value(metrics, "amqp_connected") == 1
    assert value(metrics, "rpc_redelivered_total") == 1
    assert value(metrics, "rpc_dead_lettered_total", reason="ERR_INVALID_REQUEST") == 1
    assert value(metrics, "hints_published_total", kind="model-manager.head") == 1
    assert value(metrics, "rpc_queue_wait_seconds_sum") == 2
    assert (value(metrics, "amqp_last_delivery_timestamp_seconds") or 0) > 1.7e9
    amqp.connected(False)
    assert value(metrics, "amqp_connected") == 0


def test_the_time_blocked_by_the_broker_counts_while_it_goes_on_and_stops_with_it(metrics: Metrics) -> None:
    metrics.amqp.blocked(True)
    first = value(metrics, "amqp_blocked_seconds_total")
    second = value(metrics, "amqp_blocked_seconds_total")
    metrics.amqp.blocked(False)
    ended = value(metrics, "amqp_blocked_seconds_total")
    assert first is not None and second is not None
    assert 0 < first < second
    assert value(metrics, "amqp_blocked_seconds_total") == ended


def test_what_the_journal_does_is_counted(metrics: Metrics) -> None:
    observer: JournalObserver = metrics.journal
    observer.append_seconds(0.25)
    observer.fsync_seconds(0.5)
    observer.fsync_failed()
    observer.torn_tail(17)
    metrics.replayed(1.5)
    metrics.journal.compaction_ended("ok", 2.5)
    metrics.journal.compacted(1000, 100)
    assert value(metrics, "journal_append_seconds_sum") == 0.25
    assert value(metrics, "journal_fsync_seconds_sum") == 0.5
    assert value(metrics, "journal_fsync_failures_total") == 1
    assert value(metrics, "journal_torn_tail_repaired_total") == 1
    assert value(metrics, "journal_torn_tail_bytes_total") == 17
    assert value(metrics, "journal_replay_seconds") == 1.5
    assert value(metrics, "journal_compactions_total", result="ok") == 1
    assert value(metrics, "journal_compactions_total", result="no_room") == 0
    assert value(metrics, "journal_compaction_seconds_sum") == 2.5
    assert value(metrics, "journal_compaction_bytes", side="before") == 1000
    assert value(metrics, "journal_compaction_bytes", side="after") == 100


def test_a_failed_attempt_at_the_store_counts_as_an_operation_and_as_an_error(metrics: Metrics) -> None:
    storage = metrics.storage("s3")
    storage.operation("open", 0.5, None)
    storage.operation("open", 0.5, "ERR_STORAGE_UNAVAILABLE")
    storage.retried("open")
    storage.bytes_moved("in", 1000)
    assert value(metrics, "store_operation_seconds_count", op="open", backend="s3") == 2
    assert value(metrics, "store_errors_total", op="open", code="ERR_STORAGE_UNAVAILABLE") == 1
    assert value(metrics, "store_retries_total", op="open") == 1
    assert value(metrics, "store_bytes_total", direction="in") == 1000


# --- state -----------------------------------------------------------------------------------------------------------


def test_a_state_is_read_for_each_scrape(metrics: Metrics, tmp_path: Path) -> None:
    asked: list[str] = []

    def look() -> None:
        asked.append("disk")
        metrics.disk_free("blobs", shutil.disk_usage(tmp_path).free)

    metrics.collect(look)
    assert asked == []
    assert (value(metrics, "disk_free_bytes", disk="blobs") or 0) > 0
    metrics.render()
    assert asked == ["disk", "disk"]


def test_a_state_that_cannot_be_read_is_counted_and_hides_nothing_else(metrics: Metrics, tmp_path: Path) -> None:
    metrics.collect(lambda: metrics.disk_free("blobs", shutil.disk_usage(tmp_path / "gone").free))
    metrics.request_repeated()
    assert value(metrics, "rpc_duplicate_total") == 1
    assert value(metrics, "scrape_errors_total") == 2


async def test_the_gauges_follow_the_registry_and_the_cache(metrics: Metrics, tmp_path: Path) -> None:
    registry, cache, readiness = Registry(tmp_path / "registry"), ModelCache(8, 1000), Readiness()
    jobs = Jobs(registry, {}, places=1)
    registry.open()
    registry.start()
    metrics.collect(lambda: metrics.mirror(registry, cache, jobs, readiness))
    store: dict[str, Any] = {name: member for name, member in RECORD_EXAMPLES["store"].items() if name != "idem"}
    try:
        await registry.transact("model", lambda: Change("store", store))
        cache.put(store["model"], store["version"], {"0": b"1234"})
        cache.bytes_of(store["model"], store["version"], "0")
        assert value(metrics, "models", state="live") == 1
        assert value(metrics, "model_versions", state="live") == 1
        assert value(metrics, "model_bytes", state="live") == store["size"]
        assert value(metrics, "model_formats", format=METADATA["type"]) == 1
        assert value(metrics, "journal_last_sequence") == registry.journal.head
        assert (value(metrics, "journal_bytes") or 0) > 0
        assert value(metrics, "registry_full") == 0
        assert value(metrics, "cache_bytes") == 4
        assert value(metrics, "cache_hits_total") == 1
        await registry.transact("model", lambda: Change("delete", RECORD_EXAMPLES["delete"]))
        assert value(metrics, "models", state="live") == 0
        assert value(metrics, "models", state="deleted") == 1
        assert value(metrics, "model_bytes", state="deleted") == store["size"]
        assert value(metrics, "cache_hits_total") == 1
    finally:
        await registry.close()
