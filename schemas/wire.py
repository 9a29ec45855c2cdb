"""Bytes from outside to JSON values, strictly, and back.

JSON here is RFC 8259 without its loose ends: UTF-8 without a byte order mark, no duplicate keys, no NaN or Infinity,
at most 64 levels deep, no lone surrogates. Neither orjson nor pydantic refuses duplicate keys (both take the last), so
the standard library's decoder does the parsing, with a hook.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from time import gmtime
from typing import Any, NoReturn

import orjson

from schemas.errors import ModelManagerError

MAX_BODY_BYTES = 2 * 1000 * 1000
MAX_DEPTH = 64
_JSON_TYPE = re.compile(r'application/json(?:[ \t]*;[ \t]*charset=(?:utf-?8|"utf-?8"))?', re.IGNORECASE)


def is_json(content_type: str) -> bool:
    """Whether it is JSON in UTF-8, said or not. No other parameter is known.

    Not by the parser of the standard library: that one raises on some parameters (`a*=x; a*0=y`).
    """
    return _JSON_TYPE.fullmatch(content_type.strip()) is not None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {name[:64]!r} occurs twice")
            seen.add(name)
    return members


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:32]} is too large")
    return value


_decoder = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite)


def parse_value(text: str) -> Any:
    """The JSON value in `text`; ValueError or RecursionError if it is none."""
    return _decoder.decode(text)


def parse_object(body: bytes, *, limit: int = MAX_BODY_BYTES) -> dict[str, Any]:
    """The JSON object in `body`, or ERR_INVALID_REQUEST that says what is wrong with it."""
    if len(body) > limit:
        raise ModelManagerError("ERR_INVALID_REQUEST", f"The body is over {limit} bytes.", maxBodySize=limit)
    try:
        value = parse_value(body.decode("utf-8"))
        if body.count(b"{") + body.count(b"[") > MAX_DEPTH:
            walk(value, lambda _: None)
        if b"\\u" in body:
            orjson.dumps(value)  # refuses lone surrogates, which only an escape can bring in
    except UnicodeDecodeError:
        raise _invalid("not UTF-8") from None
    except RecursionError:
        raise _invalid(f"deeper than {MAX_DEPTH} levels") from None
    except (ValueError, TypeError) as error:  # JSONDecodeError and orjson's errors are ValueErrors or TypeErrors
        raise _invalid(str(error)) from None
    if not isinstance(value, dict):
        raise _invalid("not an object")
    return value


def _invalid(reason: str) -> ModelManagerError:
    return ModelManagerError("ERR_INVALID_REQUEST", f"The body is not a valid JSON object: {reason}.")


def walk(value: Any, check: Callable[[Any], None], depth: int = 1) -> None:
    """Call `check` on every scalar and key below `value`; ValueError when it is deeper than `MAX_DEPTH`."""
    if isinstance(value, dict | list | tuple):
        if depth > MAX_DEPTH:
            raise ValueError(f"deeper than {MAX_DEPTH} levels")
        if isinstance(value, dict):
            for key in value:
                check(key)
        for member in value.values() if isinstance(value, dict) else value:
            walk(member, check, depth + 1)
    else:
        check(value)


def dump(value: Any) -> bytes:
    """Compact JSON for the wire."""
    return orjson.dumps(value)


def dump_given(value: Any) -> bytes:
    """The same for a value that was not checked; ValueError or TypeError for what would not arrive as it is.

    Integers beyond 2^53, lone surrogates, what JSON has not; and NaN and Infinity, which orjson writes as null: in a
    merge patch that removes a member.
    """
    body = orjson.dumps(value, option=orjson.OPT_STRICT_INTEGER | orjson.OPT_PASSTHROUGH_DATACLASS)
    if b"null" in body:
        walk(value, _no_false_null)
    return body


def _no_false_null(value: Any) -> None:
    if value is not None and orjson.dumps(value) == b"null":
        raise ValueError(f"{value} is not JSON")


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no blanks, in UTF-8: what digests and request hashes are taken over."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def timestamp(unix_ms: int) -> str:
    """RFC 3339 in UTC with milliseconds."""
    seconds, ms = divmod(unix_ms, 1000)
    # In each reply about a version, and half the time of an f-string with seven fields.
    return "%04d-%02d-%02dT%02d:%02d:%02d.%03dZ" % (*gmtime(seconds)[:6], ms)  # noqa: UP031
