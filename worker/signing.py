"""Addresses of ours that need no token: signed for one verb and one path, until a moment.

The signature is HMAC-SHA256 over the verb, the moment and the decoded path: a client may write an escape in another way
than we did, and the decoded path is what names the thing.
"""

from __future__ import annotations

import hmac
import time
from urllib.parse import unquote

SECRET_BYTES = 32


class UrlSigner:
    """Signs and checks with one secret of 32 bytes; what another secret has signed is refused."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"the secret must have {SECRET_BYTES} bytes")
        self._secret = secret

    def sign(self, verb: str, path: str, *, expires: int) -> str:
        """The query that makes `path`, as it stands in the address, good for `verb` until `expires` (Unix seconds)."""
        return f"expires={expires}&signature={self._signature(verb, unquote(path), expires)}"

    def verify(self, verb: str, path: str, expires: int, signature: str) -> bool:
        """Whether `signature` is good for `verb` and the decoded `path`, and the time is not over."""
        expected = self._signature(verb, path, expires)
        genuine = hmac.compare_digest(expected.encode(), signature.encode(errors="surrogatepass"))
        return genuine and time.time() < expires

    def _signature(self, verb: str, path: str, expires: int) -> str:
        # The path comes last: it is the only part that could hold a line break.
        return hmac.digest(self._secret, f"{verb}\n{expires}\n{path}".encode(), "sha256").hex()
