"""The orders versions can be listed in."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np

from worker.catalog.order import Key, Order, Rows
from worker.catalog.table import VersionTable

MODEL_ID = "modelId"

_CHUNK_ROWS = 50_000


def sort_key(table: VersionTable, row: int, sort: str) -> Key:
    """A tuple that ends in (model, version) and orders as `sort` says, with ties by id and version either way."""
    match sort:
        case "size":
            return (table.size[row], table.model[row], table.version[row])
        case "-size":
            return (-table.size[row], table.model[row], table.version[row])
        case "createdAt":
            return (table.created[row], table.model[row], table.version[row])
        case "-createdAt":
            return (-table.created[row], table.model[row], table.version[row])
        case _:
            return (table.model[row], table.version[row])


def start_key(sort: str) -> Key:
    """A key before all others, in the order walked."""
    if sort == "-modelId":  # which is the order by id, walked backwards
        return (chr(0x10FFFF), "")
    return ("", "") if sort == MODEL_ID else (-(2**63), "", "")


def make_order(table: VersionTable, sort: str, *, rows: Rows | None = None) -> Order:
    """The order of all rows by `sort`; `rows` if they are sorted already. Later rows are the caller's to add.

    May run on a thread of its own while the table grows: rows that are added meanwhile are not in it.
    """
    order = Order(lambda row: sort_key(table, row, sort))
    order.fill(_sorted_rows(table, sort) if rows is None else rows)
    return order


def _sorted_rows(table: VersionTable, sort: str) -> Rows:
    by_id = _by_id(table)
    if sort == MODEL_ID:
        return by_id
    column = "size" if sort.endswith("size") else "created"
    values = np.frombuffer(getattr(table, column)[: len(by_id)].tobytes(), np.uint64).astype(np.int64)
    ranked = values[by_id]
    # Stable, so that ties stay as they are by id.
    order = np.argsort(-ranked if sort.startswith("-") else ranked, kind="stable")
    rows: Rows = by_id[order]
    return rows


def _by_id(table: VersionTable) -> Rows:
    """All rows by model and version. In pieces, for whoever waits for the interpreter meanwhile."""
    count = len(table)
    pieces: list[np.ndarray[Any, Any]] = []
    for start in range(0, count, _CHUNK_ROWS):
        end = min(count, start + _CHUNK_ROWS)
        pairs = zip(table.model[start:end], table.version[start:end], strict=True)
        # NUL sorts before every character of an id, as the end of a tuple's first text does.
        pieces.append(np.array([f"{model}\0{version}".encode() for model, version in pairs]))
    if not pieces:
        return np.frombuffer(array("I"), np.uint32)
    return np.argsort(np.concatenate(pieces), kind="stable").astype(np.uint32)
