"""What is known of a request besides its method and parameters."""

from __future__ import annotations

from dataclasses import dataclass

from schemas.journal import Idempotency


@dataclass(frozen=True, slots=True)
class Context:
    """Who asks, and within what limits.

    `caller` is the identity the transport has verified, or "". `idempotency_key` is unique among the caller's requests.
    `deadline` is in `time.monotonic()` seconds. A request that `may_wait` not is answered as if its `waitMs` were 0: it
    would keep others waiting. The dispatcher fills in `idempotency`, for the record of the effect.
    """

    caller: str = ""
    idempotency_key: str | None = None
    deadline: float | None = None
    correlation_id: str = ""
    transport: str = "local"
    may_wait: bool = True
    idempotency: Idempotency | None = None
