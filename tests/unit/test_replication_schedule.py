"""Which pull is next: fair to all racks, patient with those that are away and with what fails."""

from __future__ import annotations

import time

from schemas.errors import ModelManagerError
from worker.catalog.replicas import Pull
from worker.replication.schedule import Schedule, Trial

AWAY = ModelManagerError("ERR_DEADLINE_EXCEEDED")
REFUSED = ModelManagerError("ERR_UNSAFE_MODEL")


def pull(origin: str, model: str, version: str = "1", sequence: int = 0) -> Pull:
    return Pull(model, version, origin, "0" * 64, 1, 0, (), sequence or hash((origin, model, version)) % 10**6)


def begun(schedule: Schedule, now: float | None = None) -> Trial:
    trial = schedule.start(time.monotonic() if now is None else now)
    assert trial is not None
    return trial


def nothing(schedule: Schedule) -> bool:
    return schedule.start(time.monotonic()) is None


def test_pulls_run_in_their_order_and_one_of_a_model_at_a_time() -> None:
    schedule = Schedule([pull("r1", "b", sequence=2), pull("r1", "a", sequence=1), pull("r1", "A", "2", sequence=3)])
    first, second = begun(schedule), begun(schedule)
    assert [trial.pull.model for trial in (first, second)] == ["a", "b"]
    assert nothing(schedule)
    schedule.end("a", "1")
    schedule.done(first, None, away=False)
    assert begun(schedule).pull.version == "2"


def test_the_rack_of_which_the_fewest_run_is_next() -> None:
    schedule = Schedule([pull("r1", f"m{n}", sequence=n + 1) for n in range(5)] + [pull("r2", "x", sequence=9)])
    assert [begun(schedule).pull.origin for _ in range(3)] == ["r1", "r2", "r1"]


def test_a_rack_that_is_away_is_tried_once_in_a_while_whatever_is_awaited_from_it() -> None:
    schedule = Schedule([pull("r1", f"m{n}", sequence=n + 1) for n in range(100)] + [pull("r2", "x", sequence=900)])
    first = begun(schedule)
    assert first.pull.origin == "r1"
    schedule.done(first, AWAY, away=True)
    assert begun(schedule).pull.origin == "r2"
    assert nothing(schedule)
    wait = schedule.wait_s(time.monotonic())
    assert wait is not None and 0 < wait <= 1.0
    later = time.monotonic() + 1.1
    assert begun(schedule, later).pull.origin == "r1"
    assert schedule.start(later) is None, "one probe of it at a time"


def test_what_failed_is_due_after_its_pause_unless_it_is_over_by_then() -> None:
    schedule = Schedule([pull("r1", "a", sequence=1), pull("r1", "b", sequence=2)])
    for trial in (begun(schedule), begun(schedule)):
        schedule.done(trial, ModelManagerError("ERR_STORAGE_UNAVAILABLE"), away=False)
    wait = schedule.wait_s(time.monotonic())
    assert wait is not None and 0 < wait <= 1.0
    schedule.end("a", "1")
    later = time.monotonic() + 1.1
    assert begun(schedule, later).pull.model == "b"
    assert schedule.start(later) is None


def test_what_is_refused_waits_long_and_is_hurried_when_it_changes() -> None:
    schedule = Schedule([pull("r1", "m")])
    trial = begun(schedule)
    assert schedule.done(trial, REFUSED, away=False) >= 300
    assert schedule.failing == {"r1": 1}
    assert nothing(schedule)
    assert schedule.hurry("m", "1") and not schedule.hurry("other", "1")
    again = begun(schedule)
    assert again is trial
    schedule.end("m", "1")
    schedule.done(again, None, away=False)
    assert +schedule.failing == {}
    assert nothing(schedule) and schedule.wait_s(time.monotonic()) is None


def test_a_pull_that_was_begun_anew_takes_the_place_of_the_one_before() -> None:
    schedule = Schedule([pull("r1", "m", sequence=1)])
    old = begun(schedule)
    schedule.add(pull("r1", "m", sequence=2))
    assert schedule.done(old, AWAY, away=False) == 0.0
    assert begun(schedule).pull.sequence == 2


def test_a_try_that_came_to_nothing_without_an_error_is_repeated() -> None:
    schedule = Schedule([pull("r1", "m")])
    assert schedule.done(begun(schedule), None, away=False) > 0
    assert nothing(schedule)
    assert begun(schedule, time.monotonic() + 1.1).failures == 1
