"""Pages of a listing together have each version that is there once, whatever the catalog's orders went through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from tests.folded import Folded, store
from worker.catalog import search
from worker.catalog.catalog import Catalog
from worker.catalog.order import BLOCK_ROWS
from worker.catalog.search import page, search_query

T = TypeVar("T")
SORTS = ["modelId", "-modelId", "size", "-size", "createdAt", "-createdAt"]


async def look(look: Callable[[], T]) -> T:
    return look()


async def listed(catalog: Catalog, sort: str, *, limit: int = 1000, **criteria: Any) -> list[str]:
    """The models of all pages, in order."""
    query, cursor, models = search_query(criteria, sort), None, []
    while True:
        reply = await page(catalog, query, look=look, limit=limit, cursor=cursor)
        models += [each["modelId"] for each in reply["models"]]
        if "nextCursor" not in reply:
            return models
        cursor = reply["nextCursor"]


@pytest.mark.parametrize("limit", [1000, BLOCK_ROWS])
@pytest.mark.parametrize("sort", SORTS)
async def test_a_version_stored_again_is_listed_though_a_block_ends_between_its_rows(sort: str, limit: int) -> None:
    names = [*(f"a{n:06d}" for n in range(BLOCK_ROWS - 1)), "b", *(f"c{n:06d}" for n in range(600))]
    folded = Folded()
    folded.fold("store", *map(store, names))
    folded.fold("purge", {"model": "b", "versions": ["1"]})
    folded.fold("store", store("b"))
    expected = names[::-1] if sort == "-modelId" else names
    assert await listed(folded.catalog, sort, limit=limit) == expected
    folded.fold("purge", {"model": "b", "versions": ["1"]})
    folded.fold("store", store("b"))
    assert await listed(folded.catalog, sort, limit=limit) == expected


@pytest.mark.parametrize(
    ("stored", "asked", "found"),
    [
        ([1], [True], False),
        ({"a": [{"b": 0}]}, {"a": [{"b": False}]}, False),
        ({"a": 1}, {"a": 1, "b": None}, False),
        ([1, [2, {"c": 3}]], [1.0, [2, {"c": 3.0}]], True),  # one number, though callers write it in two ways
        ({"a": 1, "b": [None, True]}, {"b": [None, True], "a": 1}, True),
    ],
)
async def test_a_member_is_equal_at_any_depth_if_its_json_values_are(stored: Any, asked: Any, found: bool) -> None:
    folded = Folded()
    folded.fold("store", store("m", note=stored))
    assert await listed(folded.catalog, "modelId", note=asked) == ["m"] * found


@pytest.mark.parametrize("sort", SORTS)
async def test_rows_that_are_still_to_be_sorted_in_end_a_page_early_and_none_is_missed(
    sort: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folded = Folded()
    folded.fold("store", *(store(f"m{n * 7919 % 3001:04d}", size=n % 10) for n in range(3001)))
    await listed(folded.catalog, sort)
    folded.fold("store", *(store(f"n{n:04d}", size=n % 10) for n in range(600)))
    whole = await listed(folded.catalog, sort)
    folded.fold("store", *(store(f"a{n:04d}", size=n % 10) for n in range(600)))
    monkeypatch.setattr(search, "TIME_LIMIT_S", 0.0)
    first = await page(folded.catalog, search_query({}, sort), look=look, limit=100, cursor=None)
    assert first["models"] == []
    pages = await listed(folded.catalog, sort)
    assert [model for model in pages if model[0] != "a"] == whole
    assert len(set(pages)) == len(pages) == 4201


@pytest.mark.parametrize("sort", SORTS)
async def test_an_order_that_most_rows_came_after_is_made_anew(sort: str) -> None:
    folded = Folded()
    folded.fold("store", *(store(f"m{n:04d}", size=n % 10) for n in range(600)))
    await listed(folded.catalog, sort)
    (made,) = folded.catalog.orders.values()
    folded.fold("store", *(store(f"a{n:04d}", size=n % 10) for n in range(600)))
    models = await listed(folded.catalog, sort)
    assert made not in folded.catalog.orders.values()
    assert len(set(models)) == len(models) == 1200
