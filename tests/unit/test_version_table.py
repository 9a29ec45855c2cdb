"""The columns of the versions: a change costs the same whatever the size of its model; a walk sees what is there."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.folded import Folded, store
from worker.catalog.extracts import Names, Run, extract
from worker.catalog.records import IndexedRecord
from worker.catalog.sorting import make_order
from worker.catalog.table import DELETED, NO_ROW, VersionTable
from worker.journal import Block, Line

VERSIONS = 3000


class Counted(array):  # type: ignore[type-arg]
    """Counts how often an item is looked at."""

    looks = 0

    def __getitem__(self, index: Any) -> Any:
        self.looks += 1
        return super().__getitem__(index)


class Stepped(Folded):
    """A catalog, and the steps that its walks along a model take."""

    def __init__(self) -> None:
        super().__init__()
        self._steps = self.catalog.table.older = Counted("I")

    def steps(self, op: str, *records: dict[str, Any]) -> int:
        """How many it takes to fold the records."""
        before = self._steps.looks
        self.fold(op, *records)
        return self._steps.looks - before


@pytest.fixture
def large() -> Stepped:
    folded = Stepped()
    folded.fold("store", *(store("acme/large", str(number)) for number in range(VERSIONS)))
    return folded


def all_of(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "versions": [str(number) for number in range(VERSIONS)], "deleted": 1, **more}


def test_a_purge_of_all_versions_takes_steps_in_proportion_to_their_number(large: Stepped) -> None:
    assert large.steps("delete", all_of("acme/large")) < 40 * VERSIONS
    assert large.catalog.model("acme/large") is None
    assert (large.catalog.totals.models, large.catalog.totals.versions) == (0, 0)


def test_a_delete_of_all_versions_and_its_undo_do_too(large: Stepped) -> None:
    assert large.steps("delete", all_of("acme/large", until=9)) < 40 * VERSIONS
    assert large.catalog.totals.models == 0
    assert large.steps("restore", all_of("acme/large")) < 40 * VERSIONS
    assert (large.catalog.totals.models, large.catalog.totals.versions) == (1, VERSIONS)


def test_the_end_of_each_undo_window_does_not_walk_the_other_versions(large: Stepped) -> None:
    large.fold("delete", all_of("acme/large", until=9))
    purges = [{"model": "acme/large", "versions": [str(number)]} for number in range(VERSIONS)]
    assert large.steps("purge", *purges) < 40 * VERSIONS


def test_a_purge_drops_the_aliases_of_its_versions_and_no_others() -> None:
    folded = Folded()
    folded.fold("store", *(store("m", version) for version in "123"))
    aliases = [{"model": "m", "alias": f"alias-{n}", "version": "123"[n % 3], "previous": None} for n in range(9)]
    folded.fold("alias", *aliases)
    folded.fold("purge", {"model": "m", "versions": ["1", "3"]})
    assert folded.catalog.aliases.of("m").keys() == {"alias-1", "alias-4", "alias-7"}
    folded.fold("purge", {"model": "m", "versions": ["2"]})
    assert not list(folded.catalog.aliases.items())


def run(models: list[str], version: str = "1") -> Run:
    """That version of each of these models, as a replay stores it."""
    lines = [Line(1, 1, 1, 0, "store", IndexedRecord(model=model, version=version)) for model in models]
    return extract(Block(b"", np.empty(0, np.uint64), lines)).runs[0]


def loaded(table: VersionTable) -> VersionTable:
    copy = VersionTable()
    copy.load({name: memoryview(bytes(part)) for name, part in table.dumped().items()})
    return copy


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_changes_leaves_what_a_dict_would_say(seed: int) -> None:
    chance, table = random.Random(seed), VersionTable()
    there: dict[str, dict[str, bool]] = {}  # model -> version, in the order stored -> whether it is visible
    for step in range(3000):
        model, version = f"Model-{chance.randrange(3)}", str(chance.randrange(40))
        versions = there.setdefault(model, {})
        row, seen = table.find(model, version), any(versions.values())
        assert (row != NO_ROW) == (version in versions)
        if row == NO_ROW:
            assert table.extend(run([model], version)) == (not seen)
            versions[version] = True
        elif not table.state[row] & DELETED:
            versions[version] = False
            assert table.hide(row) == (not any(versions.values()))
        elif chance.random() < 0.5:
            versions[version] = True
            assert table.show(row) == (not seen)
        else:
            table.forget(row)
            del versions[version]
        if step % 500 == 0:
            table = loaded(table)
        assert [table.version[row] for row in table.rows(model)] == list(reversed(versions))
    assert table.models == sum(bool(versions) for versions in there.values())


@pytest.mark.parametrize("sort", ["modelId", "size"])
def test_an_order_made_while_rows_are_added_has_the_rows_from_before(sort: str) -> None:
    table = VersionTable()
    table.extend(run([f"m{n}" for n in range(5)]))
    orders = []
    added = run([f"n{n}" for n in range(5)])

    class Watched(Names, frozen=True):
        def spread(self, values: Sequence[Any]) -> list[Any]:
            orders.append(make_order(table, sort).filled)
            return super().spread(values)

    table.extend(msgspec.structs.replace(added, types=Watched(added.types.texts, added.types.places)))
    assert set(orders) == {5}
    assert make_order(table, sort).filled == 10
