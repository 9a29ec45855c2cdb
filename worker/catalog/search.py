"""Listing and searching: walks over the catalog's orders, page by page, yielding to the event loop as they go."""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from hashlib import sha256
from typing import Any, Protocol, TypeVar

import numpy as np
import orjson
from pydantic import ValidationError

from schemas.errors import ModelManagerError
from schemas.model import ListedVersion
from schemas.rpc import Criteria, ListReply
from schemas.wire import canonical
from worker.catalog.catalog import Catalog
from worker.catalog.entries import VersionEntry
from worker.catalog.order import Key, Order
from worker.catalog.sorting import MODEL_ID, make_order, sort_key, start_key
from worker.catalog.table import DELETED, FORGOTTEN, NO_ROW

TIME_LIMIT_S = 0.25
PAGE_BYTES = 2_000_000  # half of what a reply over RabbitMQ may have
_FEW = 500  # candidates that are sorted at once rather than looked for along the order
_READ_AT_ONCE = 64  # records between two turns of the event loop, well under a millisecond
_SETTLED_AT_ONCE = 200

T = TypeVar("T")
Predicate = Callable[[VersionEntry], bool]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


class Look(Protocol):
    """Runs what reads records, again if it has to wait for one."""

    async def __call__(self, look: Callable[[], T]) -> T: ...


@dataclass(frozen=True, slots=True)
class Range:
    """Inclusive; None is open."""

    low: int | None
    high: int | None


@dataclass(frozen=True, slots=True)
class Query:
    """A search. The catalog's columns tell `type`, `tags` and `ranges` (by column); `predicates` need the record."""

    type: str | None
    tags: tuple[str, ...]
    ranges: tuple[tuple[str, Range], ...]
    predicates: tuple[Predicate, ...]
    sort: str
    fingerprint: str  # ties a cursor to the query that made it


def list_query(model_type: str | None) -> Query:
    return Query(model_type, (), (), (), MODEL_ID, _fingerprint(["list", model_type]))


def search_query(criteria: dict[str, Any], sort: str) -> Query:
    """The query for the flat `criteria` of searchModels; ERR_INVALID_REQUEST where a member has the wrong form."""
    special = {name: value for name, value in criteria.items() if name in ("tags", "size", "createdAt", "text")}
    try:
        known = Criteria.model_validate(special)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in ("criteria", *first["loc"]))
        raise ModelManagerError("ERR_INVALID_REQUEST", f"{place}: {first['msg']}") from None
    equals = {name: value for name, value in criteria.items() if name not in special and name != "type"}
    model_type = criteria.get("type")
    if "type" in criteria and not isinstance(model_type, str):
        raise ModelManagerError("ERR_INVALID_REQUEST", "criteria.type: must be a string")
    predicates: list[Predicate] = []
    if equals:
        predicates.append(_members_equal(equals))
    ranges: list[tuple[str, Range]] = []
    if known.size is not None:
        ranges.append(("size", Range(known.size.min, known.size.max)))
    if known.created_at is not None:
        low, high = _milliseconds(known.created_at.from_), _milliseconds(known.created_at.to)
        ranges.append(("created", Range(low, high)))
    if known.text is not None:
        predicates.append(_has_words(known.text.casefold().split()))
    tags = tuple(known.tags or ())
    return Query(model_type, tags, tuple(ranges), tuple(predicates), sort, _fingerprint(["search", criteria, sort]))


def _fingerprint(query: list[Any]) -> str:
    return sha256(canonical(query)).hexdigest()[:16]


def _members_equal(members: dict[str, Any]) -> Predicate:
    missing = object()

    def holds(entry: VersionEntry) -> bool:
        return all(_same(entry.metadata.get(name, missing), value) for name, value in members.items())

    return holds


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON values: true is not 1, but 1.0 is."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _has_words(words: list[str]) -> Predicate:
    def holds(entry: VersionEntry) -> bool:
        tags = " ".join(entry.metadata.get("tags", ()))
        text = f"{entry.model} {entry.metadata.get('description', '')} {tags}".casefold()
        return all(word in text for word in words)

    return holds


def _milliseconds(moment: str | None) -> int | None:
    if moment is None:
        return None
    try:
        return round(datetime.fromisoformat(moment).timestamp() * 1000)
    except (ValueError, OverflowError):
        raise ModelManagerError("ERR_INVALID_REQUEST", "criteria.createdAt: not a date and time") from None


async def page(catalog: Catalog, query: Query, *, look: Look, limit: int, cursor: str | None) -> ListReply:
    """One page. It may end early, with `nextCursor`, when it took `TIME_LIMIT_S` or has `PAGE_BYTES` of JSON; only an
    order that is made, on a thread, is waited for.
    """
    last = start_key(query.sort) if cursor is None else _decode(cursor, query)
    deadline = time.monotonic() + TIME_LIMIT_S
    models: list[ListedVersion] = []
    size = 0
    async for rows in _candidates(catalog, query, last):
        for row in rows:
            entry = await look(partial(_entry, catalog, row))
            if entry is not None and _matches(entry, query):
                if len(models) == limit:
                    return _reply(models, query, last)
                models.append(entry.listed(catalog.aliases_of(entry)))
                size += len(orjson.dumps(models[-1]))
            last = sort_key(catalog.table, row, query.sort)
            if size >= PAGE_BYTES:
                return _reply(models, query, last)
        if time.monotonic() > deadline:
            return _reply(models, query, last)
        await asyncio.sleep(0)
    return _reply(models, query, None)


def _entry(catalog: Catalog, row: int) -> VersionEntry | None:
    """The version in the row, if it is still there to be seen."""
    return None if catalog.table.state[row] & (DELETED | FORGOTTEN) else catalog.entry(row)


def _matches(entry: VersionEntry, query: Query) -> bool:
    if query.tags and not set(query.tags) <= set(entry.metadata.get("tags", ())):
        return False
    return all(holds(entry) for holds in query.predicates)


def _reply(models: list[ListedVersion], query: Query, last: Key | None) -> ListReply:
    reply: ListReply = {"success": True, "models": models, "count": len(models)}
    if last is not None:
        reply["nextCursor"] = base64.urlsafe_b64encode(orjson.dumps([query.fingerprint, *last])).decode().rstrip("=")
    return reply


def _decode(cursor: str, query: Query) -> Key:
    try:
        fingerprint, *key = orjson.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (binascii.Error, ValueError, TypeError):
        fingerprint, key = None, []
    shape = (str, str) if query.sort.endswith("modelId") else (int, str, str)
    if fingerprint != query.fingerprint or tuple(type(part) for part in key) != shape:
        raise ModelManagerError("ERR_INVALID_REQUEST", "cursor: not one this query gave")
    return tuple(key)


async def _candidates(catalog: Catalog, query: Query, after: Key) -> AsyncIterator[list[int]]:
    """The rows beyond the key `after` that the columns cannot rule out, in order, a part at a time; an empty part after
    some work for which there are none yet."""
    mask = _mask(catalog, query)
    few = np.flatnonzero(mask)
    backwards = query.sort == "-modelId"  # the other descending orders have keys of their own
    if len(few) <= _FEW:
        keys = sorted(((sort_key(catalog.table, row, query.sort), row) for row in few.tolist()), reverse=backwards)
        for part in _parts([row for key, row in keys if (key < after if backwards else key > after)]):
            yield part
        return
    order = await _made(catalog, MODEL_ID if backwards else query.sort)
    while not order.settle(_SETTLED_AT_ONCE):
        yield []
    if not backwards:
        after = (*after, NO_ROW)  # behind all rows with that key
    while True:
        rows = order.beyond(after, backwards=backwards)
        if not len(rows):
            return
        after = order.place(int(rows[-1]))
        found = rows[rows < len(mask)]  # what came since the mask was made is for the next query
        for part in _parts(found[mask[found]].tolist()):
            yield part


def _parts(rows: list[int]) -> Iterator[list[int]]:
    return (rows[start : start + _READ_AT_ONCE] for start in range(0, len(rows), _READ_AT_ONCE))


def _mask(catalog: Catalog, query: Query) -> Mask:
    """Which rows the columns cannot rule out."""
    table = catalog.table
    mask: Mask = table.visible()
    for tag in query.tags:
        tagged = np.zeros(len(mask), bool)
        tagged[catalog.tagged(tag)] = True
        mask &= tagged
    if query.type is not None:
        code = table.type_code(query.type)
        mask &= False if code is None else table.column("type") == code
    for name, between in query.ranges:
        values = table.column(name)
        if between.low is not None:
            mask &= values >= max(0, between.low)
        if between.high is not None:
            mask &= (values <= between.high) if between.high >= 0 else False
    return mask


async def _made(catalog: Catalog, sort: str) -> Order:
    """The order, made when it is first asked for: and anew if that takes less than to sort in all that came since."""
    order = catalog.orders.get(sort)
    if order is not None and order.waiting <= len(catalog.table) // 4:
        return order
    made = await asyncio.to_thread(make_order, catalog.table, sort)
    if catalog.orders.get(sort) is order:  # else someone else's was ready first
        catalog.orders[sort] = made
        made.add(range(made.filled, len(catalog.table)))
    return catalog.orders[sort]
