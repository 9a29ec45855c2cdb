"""From a verb and a decoded path to a route."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Generic, TypeVar

from schemas.ids import RESERVED_SECOND_PARTS
from worker.transport.http_replies import HttpFault

_PART = r"[^/]+"
_RESERVED = "|".join(sorted(RESERVED_SECOND_PARTS))
_PATTERNS = {
    # A second part that a route uses itself belongs to the route, never to the name.
    "model": rf"{_PART}(?:/(?!(?:{_RESERVED})(?:/|$)){_PART})?",
    "path": ".+",
}
_VARIABLE = re.compile(r"{(\w+)}")

Endpoint = TypeVar("Endpoint")


@dataclass(frozen=True, slots=True)
class Found(Generic[Endpoint]):
    """A route: its template, the decoded variables of the path, and what answers it."""

    template: str
    variables: dict[str, str]
    endpoint: Endpoint


class Router(Generic[Endpoint]):
    """Routes by template. HEAD goes where GET goes, unless it has a route of its own."""

    def __init__(self) -> None:
        self._templates: dict[str, tuple[re.Pattern[str], dict[str, Endpoint]]] = {}

    def add(self, verb: str, template: str, endpoint: Endpoint) -> None:
        """Serve `template` with `endpoint`; a template without variables goes before one with them."""
        pattern = _compile(template)
        self._templates.setdefault(template, (pattern, {}))[1][verb] = endpoint
        self._templates = dict(sorted(self._templates.items(), key=lambda item: "{" in item[0]))

    def find(self, verb: str, path: str) -> Found[Endpoint]:
        """The route, or a fault: 404 for an unknown path, 405 with `Allow` for a verb the path does not have."""
        allowed: set[str] = set()
        for template, (pattern, verbs) in self._templates.items():
            match = pattern.fullmatch(path)
            if match is None:
                continue
            endpoint = verbs.get(verb) or (verbs.get("GET") if verb == "HEAD" else None)
            if endpoint is not None:
                return Found(template, match.groupdict(), endpoint)
            allowed |= verbs.keys() | ({"HEAD"} if "GET" in verbs else set())
        if not allowed:
            raise HttpFault(404, "There is no such route.", code="ERR_UNKNOWN_METHOD")
        allow = ", ".join(sorted(allowed))
        raise HttpFault(405, f"This route takes {allow} only.", code="ERR_UNKNOWN_METHOD", headers={"Allow": allow})


def _compile(template: str) -> re.Pattern[str]:
    parts = _VARIABLE.split(template)
    pattern = "".join(
        re.escape(part) if index % 2 == 0 else f"(?P<{part}>{_PATTERNS.get(part, _PART)})"
        for index, part in enumerate(parts)
    )
    return re.compile(pattern, re.DOTALL)
