"""The judge of the ledger lab: it sees each broken promise, and nothing in what is right."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ledger.book import Asked, Ledger, key_trace
from worker.journal import Entry


def entry(sequence: int, op: str, key: str, **record: Any) -> Entry:
    return Entry(sequence, 0, op, {"model": "net", "idem": {"key": key_trace("guest", key), "hash": ""}, **record})


def stored(sequence: int, key: str, version: str = "1") -> Entry:
    return entry(sequence, "store", key, version=version, metadata={"mark": key})


def updated(sequence: int, key: str, revision: int) -> Entry:
    return entry(sequence, "update", key, version="1", metadata={"mark": key}, revision=revision)


def asked(ledger: Ledger, key: str, outcome: str = "ok", **reply: Any) -> Asked:
    request = ledger.ask("me", "method", key_trace("guest", key), effect=True)
    ledger.settle(request, outcome, open_=outcome == "lost", reply={"modelId": "net", **reply})
    return request


def shown(mark: str, revision: int = 1) -> dict[tuple[str, str], dict[str, Any]]:
    return {("net", "1"): {"mark": mark, "revision": revision, "aliases": []}}


def test_what_is_right_is_not_broken() -> None:
    ledger = Ledger()
    asked(ledger, "a")
    asked(ledger, "b", revision=2)
    asked(ledger, "c", "ERR_CONFLICT")
    asked(ledger, "d", "lost")
    ledger.check([stored(1, "a"), updated(2, "b", 2)], shown("b", 2))
    assert ledger.broken == []


@pytest.mark.parametrize(
    ("requests", "journal", "catalog", "broken"),
    [
        ({"a": "ok"}, [], {}, "acknowledged and is lost"),
        ({"a": "ok"}, [stored(1, "a"), stored(2, "a")], shown("a"), "happened 2 times"),
        ({"a": "lost"}, [stored(1, "a"), stored(2, "a")], shown("a"), "happened 2 times"),
        ({"a": "ERR_CONFLICT"}, [stored(1, "a")], shown("a"), "refused (ERR_CONFLICT) and is there"),
        ({"a": ""}, [stored(1, "a")], shown("a"), "has no outcome"),
        ({}, [stored(1, "a")], shown("a"), "nobody asked for"),
        ({"a": "ok"}, [stored(1, "a")], {}, "not the same versions"),
        ({"a": "ok"}, [stored(1, "a")], shown("b"), "not as the journal has it"),
        ({"a": "ok", "b": "lost"}, [stored(1, "a"), updated(2, "b", 3)], shown("b", 3), "from revision 1 to 3"),
        (
            {"a": "ok", "b": "lost"},
            [stored(1, "a"), entry(2, "alias", "b", alias="x", version="1", previous="2")],
            {},
            "was None and not 2",
        ),
    ],
)
def test_each_broken_promise_is_seen(
    requests: dict[str, str], journal: list[Entry], catalog: dict[tuple[str, str], dict[str, Any]], broken: str
) -> None:
    ledger = Ledger()
    for key, outcome in requests.items():
        asked(ledger, key, outcome)
    ledger.check(journal, catalog)
    assert any(broken in text for text in ledger.broken), ledger.broken


def test_the_answer_of_another_and_a_second_outcome_are_seen() -> None:
    ledger = Ledger()
    asked(ledger, "a")
    request = asked(ledger, "b", revision=7)
    ledger.settle(request, "lost")
    request.outcome = "ok"
    request.reply = {"modelId": "net", "revision": 7}
    ledger.check([stored(1, "a"), updated(2, "b", 2)], shown("b", 2))
    assert [text.split(" of ")[0] for text in ledger.broken] == ["method", "method"]
    assert "ended twice" in ledger.broken[0]
    assert "another's answer" in ledger.broken[1]
