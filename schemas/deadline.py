"""The deadline of the work in progress, carried with it into every task it starts."""

from __future__ import annotations

import time
from contextvars import ContextVar

deadline: ContextVar[float | None] = ContextVar("deadline", default=None)
"""When the caller stops waiting, in seconds of `time.monotonic`; None if it waits for ever."""


def remaining() -> float | None:
    """Seconds until the deadline, negative once it has passed; None without one."""
    limit = deadline.get()
    return None if limit is None else limit - time.monotonic()
