"""Listing and searching: walks over the catalog's orders, page by page, yielding to the event loop as they go."""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any, cast

import orjson
from pydantic import ValidationError

from schemas.errors import ModelManagerError
from schemas.model import ListedVersion
from schemas.rpc import Criteria, ListReply
from schemas.wire import canonical
from worker.catalog.catalog import Catalog, sort_key
from worker.catalog.entries import VersionEntry

TIME_LIMIT_S = 0.25
_BLOCK = 512  # entries looked at between two turns of the event loop, well under a millisecond
_FEW = 20_000  # candidates from a type or tag index that are sorted at once rather than walked past

Predicate = Callable[[VersionEntry], bool]


@dataclass(frozen=True, slots=True)
class Query:
    """A search: every predicate holds; `type` and `tags` are given apart since the catalog has indexes of them."""

    type: str | None
    tags: tuple[str, ...]
    predicates: tuple[Predicate, ...]
    sort: str
    fingerprint: str  # ties a cursor to the query that made it


def list_query(model_type: str | None) -> Query:
    return Query(model_type, (), (), "modelId", _fingerprint(["list", model_type]))


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
    if known.size is not None:
        predicates.append(_between(lambda entry: entry.size, known.size.min, known.size.max))
    if known.created_at is not None:
        low, high = _milliseconds(known.created_at.from_), _milliseconds(known.created_at.to)
        predicates.append(_between(lambda entry: entry.created, low, high))
    if known.text is not None:
        predicates.append(_has_words(known.text.casefold().split()))
    tags = tuple(known.tags or ())
    return Query(model_type, tags, tuple(predicates), sort, _fingerprint(["search", criteria, sort]))


def _fingerprint(query: list[Any]) -> str:
    return sha256(canonical(query)).hexdigest()[:16]


def _members_equal(members: dict[str, Any]) -> Predicate:
    missing = object()

    def holds(entry: VersionEntry) -> bool:
        return all(_same(entry.metadata.get(name, missing), value) for name, value in members.items())

    return holds


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON values: true is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _between(member: Callable[[VersionEntry], int], low: int | None, high: int | None) -> Predicate:
    def holds(entry: VersionEntry) -> bool:
        value = member(entry)
        return (low is None or value >= low) and (high is None or value <= high)

    return holds


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


async def page(catalog: Catalog, query: Query, *, limit: int, cursor: str | None) -> ListReply:
    """One page. It may end early, with `nextCursor`, when it took `TIME_LIMIT_S`."""
    after = None if cursor is None else _decode(cursor, query)
    deadline = time.monotonic() + TIME_LIMIT_S
    models: list[ListedVersion] = []
    last: tuple[Any, ...] | None = None
    for seen, key in enumerate(_candidates(catalog, query, after), 1):
        entry = catalog.entry(cast(tuple[str, str], key[-2:]))
        if entry is not None and _matches(entry, query):
            if len(models) == limit:
                return _reply(models, query, last)
            models.append(entry.listed(catalog.aliases_of(entry)))
        last = key
        if seen % _BLOCK == 0:
            if time.monotonic() > deadline:
                return _reply(models, query, last)
            await asyncio.sleep(0)
    return _reply(models, query, None)


def _matches(entry: VersionEntry, query: Query) -> bool:
    if query.type is not None and entry.type != query.type:
        return False
    if query.tags and not set(query.tags) <= set(entry.metadata.get("tags", ())):
        return False
    return all(holds(entry) for holds in query.predicates)


def _reply(models: list[ListedVersion], query: Query, last: tuple[Any, ...] | None) -> ListReply:
    reply: ListReply = {"success": True, "models": models, "count": len(models)}
    if last is not None:
        reply["nextCursor"] = base64.urlsafe_b64encode(orjson.dumps([query.fingerprint, *last])).decode().rstrip("=")
    return reply


def _decode(cursor: str, query: Query) -> tuple[Any, ...]:
    try:
        fingerprint, *key = orjson.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (binascii.Error, ValueError, TypeError):
        fingerprint, key = None, []
    shape = (str, str) if query.sort.endswith("modelId") else (int, str, str)
    if fingerprint != query.fingerprint or tuple(type(part) for part in key) != shape:
        raise ModelManagerError("ERR_INVALID_REQUEST", "cursor: not one this query gave")
    return tuple(key)


def _candidates(catalog: Catalog, query: Query, after: tuple[Any, ...] | None) -> Iterator[tuple[Any, ...]]:
    backwards = query.sort == "-modelId"  # the other descending orders have keys of their own
    few = _smallest_index(catalog, query)
    if few is None:
        return catalog.order(query.sort.replace("-modelId", "modelId")).walk(after, backwards=backwards)
    entries = (catalog.entry(key) for key in few)
    keys = sorted((sort_key(entry, query.sort) for entry in entries if entry is not None), reverse=backwards)
    if after is not None:
        keys = [key for key in keys if (key < after if backwards else key > after)]
    return iter(keys)


def _smallest_index(catalog: Catalog, query: Query) -> set[tuple[str, str]] | None:
    """The smallest index set that holds every match, if it is small enough to sort at once."""
    sets = [catalog.by_tag.get(tag, set()) for tag in query.tags]
    if query.type is not None:
        sets.append(catalog.by_type.get(query.type, set()))
    smallest = min(sets, key=len, default=None)
    return smallest if smallest is not None and len(smallest) <= _FEW else None
