"""The address of an HTTP service, as people write it."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

_NAME = re.compile(r"(?:(?!-)[a-z0-9-]{1,63}(?<!-)\.)*(?!-)[a-z0-9-]{1,63}(?<!-)\.?")


def flaw_of(url: str) -> str | None:
    """Why no service can be there, None if one can."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:  # a port or an address in brackets that is none
        return "is not an address: http://HOST:PORT"
    if parts.scheme not in ("http", "https") or not host:
        return "must begin with http:// or https:// and a host"
    # urlsplit passes over tabs and line ends
    if any(character.isspace() or not character.isprintable() for character in url):
        return "must not contain blanks or control characters"
    return None


def flaw_for_s3(url: str) -> str | None:
    """The same for an object store; its client is strict about names, and takes no `_` in them."""
    flaw = flaw_of(url)
    host = "" if flaw else urlsplit(url).hostname or ""
    return "has a host that is no DNS name" if not flaw and ":" not in host and not _NAME.fullmatch(host) else flaw
