"""What a request line asks for: the path and the query, decoded once and strictly.

The decoded path names the resource, so `%2F` is the same as `/`. Nothing is normalised: a `..` stays a `..`, which no
grammar of ours lets pass.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from worker.transport.http_replies import HttpFault

_PARAMETERS_MAX = 100
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ABSOLUTE = re.compile(r"https?://[^/?#]+", re.IGNORECASE)


class Query:
    """The parameters of a query. Each is asked for by name; `finish` refuses what nobody has asked for."""

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        self._pairs = pairs
        self._known: set[str] = set()

    def one(self, name: str) -> str | None:
        """The value, or None if it is absent; 400 if it is given twice."""
        values = self.every(name)
        if len(values) > 1:
            raise HttpFault(400, f"The parameter {name} is given more than once.", parameter=name)
        return values[0] if values else None

    def every(self, name: str) -> list[str]:
        """All values, in their order."""
        self._known.add(name)
        return [value for key, value in self._pairs if key == name]

    def finish(self) -> None:
        """400 if there is a parameter that this route does not have."""
        unknown = sorted({name[:64] for name, _ in self._pairs if name not in self._known})
        if unknown:
            raise HttpFault(400, f"Unknown parameter {unknown[0]!r}.", parameters=unknown[:10])


@dataclass(frozen=True, slots=True)
class Target:
    """The decoded path of a request and its query."""

    path: str
    query: Query


def parse_target(raw: str) -> Target:
    """The target in origin form or absolute form, or a fault with status 400."""
    absolute = _ABSOLUTE.match(raw)
    if absolute is not None:
        raw = raw[absolute.end() :] or "/"
    if "#" in raw:
        raise HttpFault(400, "The request target has a fragment.")
    path, _, query = raw.partition("?")
    decoded = _decode(path, "path")
    if _CONTROL.search(decoded):
        raise HttpFault(400, "The path has a control character.")
    return Target(decoded, Query(_pairs(query)))


def _pairs(query: str) -> list[tuple[str, str]]:
    fields = [field for field in query.split("&") if field]
    if len(fields) > _PARAMETERS_MAX:
        raise HttpFault(400, f"The query has more than {_PARAMETERS_MAX} parameters.")
    pairs = []
    for field in fields:
        name, _, value = field.replace("+", " ").partition("=")
        pairs.append((_decode(name, "query"), _decode(value, "query")))
    return pairs


def _decode(text: str, where: str) -> str:
    if _BAD_ESCAPE.search(text):
        raise HttpFault(400, f"The {where} has a '%' without two hexadecimal digits.")
    try:
        decoded = unquote_to_bytes(text).decode("utf-8")
    except UnicodeDecodeError:
        raise HttpFault(400, f"The {where} is not UTF-8.") from None
    if "\x00" in decoded:
        raise HttpFault(400, f"The {where} has a NUL.")
    return decoded
