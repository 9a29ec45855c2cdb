"""Who may ask: the bearer token, signed addresses, and what protects a worker without a token from web pages."""

from __future__ import annotations

import hmac
import ipaddress
import re

from aiohttp import web

from schemas.errors import ModelManagerError
from schemas.routes import CONTENT, FILE, UPLOAD_FILE
from worker.signing import UrlSigner
from worker.transport.http_replies import CLOSE, HttpFault
from worker.transport.http_target import Target

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/metrics", "/version", "/openapi.json"})
CALLER = "http"  # one identity: all callers share the token
_SIGNED = {(CONTENT, "GET"), (FILE, "GET"), (UPLOAD_FILE, "PUT")}
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~-]+)(?::\d{1,5})?")
_SAFE_VERBS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
_SIGNATURE_DIGITS = 20


class Access:
    """Everything but `OPEN_PATHS` is refused unless it shows the token, if there is one, or is a signed address."""

    def __init__(self, token: str | None, signer: UrlSigner, host: str) -> None:
        self._token = None if token is None else token.encode()
        self._signer = signer
        self._local_names = {"localhost", host.lower()}

    def check(self, request: web.BaseRequest, target: Target, template: str) -> None:
        """Raise unless this request may pass. `template` is the route's."""
        name = _host_name(request.headers.get("Host", ""))
        if target.path in OPEN_PATHS:
            return
        verb = "GET" if request.method == "HEAD" else request.method
        if (template, verb) in _SIGNED and self._signed(target, verb):
            return
        if self._token is None:
            self._check_local(request, name)
        elif not self._shown(request):
            raise ModelManagerError("ERR_UNAUTHORIZED")

    def _shown(self, request: web.BaseRequest) -> bool:
        given = request.headers.getall("Authorization", [])
        scheme, _, credentials = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        shown = hmac.compare_digest(credentials.strip().encode("utf-8", "surrogateescape"), self._token or b"")
        return shown and scheme.lower() == "bearer"

    def _signed(self, target: Target, verb: str) -> bool:
        """Whether the address is signed; a signature that is not good is refused, whatever else is shown."""
        expires, signature = target.query.one("expires"), target.query.one("signature")
        if expires is None and signature is None:
            return False
        known = expires is not None and expires.isascii() and expires.isdigit() and len(expires) <= _SIGNATURE_DIGITS
        if not known or not self._signer.verify(verb, target.path, int(expires or "0"), signature or ""):
            raise ModelManagerError("ERR_FORBIDDEN", "The signature of this address is not good, or is out of date.")
        return True

    def _check_local(self, request: web.BaseRequest, name: str) -> None:
        """Without a token being on this host is the credential, and a browser's pages must not borrow it."""
        if name not in self._local_names and not _is_loopback(name):
            raise ModelManagerError("ERR_FORBIDDEN", "Without a token this worker answers to localhost only.")
        if request.method not in _SAFE_VERBS and not _own_page(request):
            raise ModelManagerError("ERR_FORBIDDEN", "Another site's page may not change anything here.")


def _host_name(host: str) -> str:
    """The name in a Host header, in lower case; a fault if it is malformed. HTTP/1.0 may leave it out."""
    match = _HOST.fullmatch(host) if host else None
    if match is None:
        if host:
            raise HttpFault(400, "The Host header is malformed.", headers=CLOSE)
        return "localhost"
    return match[1].strip("[]").lower()


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _own_page(request: web.BaseRequest) -> bool:
    """False if a page asks that this worker has not served.

    Browsers leave Sec-Fetch-Site out for addresses that they do not trust, and old ones know only Origin.
    """
    site = request.headers.get("Sec-Fetch-Site", "none")
    host = request.headers.get("Host", "").lower()
    origins = request.headers.getall("Origin", [])
    return site in ("none", "same-origin") and all(origin.lower().partition("://")[2] == host for origin in origins)
