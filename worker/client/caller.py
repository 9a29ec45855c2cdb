"""One call to a worker: the contract that every way to reach one keeps, and its retries."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_before_delay

from schemas.errors import ERRORS, ModelManagerError
from schemas.ids import new_ulid
from schemas.rpc import METHODS
from schemas.wire import dump_given

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 3.0


class Caller(Protocol):
    """Calls the methods of one rack. Any number of calls may be in flight at once."""

    async def call(
        self, method: str, params: Mapping[str, Any], *, timeout_s: float, idempotency_key: str | None = None
    ) -> dict[str, Any]:
        """The reply body of a success.

        Raises ModelManagerError: the worker's own error, or ERR_DEADLINE_EXCEEDED when none came within `timeout_s`.
        What is retryable is tried again until then, with the same idempotency key, so an effect happens once at most. A
        key of the caller's own extends that to calls he repeats himself.
        """
        ...

    def headers_for(self, url: str) -> dict[str, str]:
        """The headers that a transfer of bytes to or from `url` needs besides its own."""
        ...

    async def close(self) -> None:
        """End the connection. Calls in flight end with an error. Closing twice is harmless."""
        ...


class Unreachable(ModelManagerError):
    """No worker could be asked. `passing`: one was reached before, so it is worth to wait for it."""

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__("ERR_SHUTTING_DOWN", message)
        self.passing = passing


def error_of(body: Mapping[str, Any]) -> ModelManagerError:
    """The error that an error reply stands for. A code that this program does not know becomes ERR_INTERNAL."""
    error = body.get("error")
    error = error if isinstance(error, dict) else {}
    code, message, details = error.get("code"), error.get("message"), error.get("details")
    known = code if isinstance(code, str) and code in ERRORS else "ERR_INTERNAL"
    rebuilt = ModelManagerError(known, message if isinstance(message, str) else "")
    rebuilt.details = dict(details) if isinstance(details, dict) else {}
    if known != code:
        rebuilt.details["code"] = code
    return rebuilt


def encoded(params: Mapping[str, Any]) -> bytes:
    """The JSON of a request. What JSON cannot hold is the error that a worker has for it."""
    try:
        return dump_given(params)
    except (TypeError, ValueError) as error:
        reason = str(error)
    try:
        dump_given({name: value for name, value in params.items() if name != "metadata"})
    except (TypeError, ValueError):
        raise ModelManagerError("ERR_INVALID_REQUEST", f"The request cannot be sent: {reason}.") from None
    raise ModelManagerError("ERR_INVALID_METADATA", f"metadata cannot be sent: {reason}.")


async def until_answered(
    method: str, attempt: Callable[[float, str | None], Awaitable[dict[str, Any]]], *, timeout_s: float, key: str | None
) -> dict[str, Any]:
    """Await `attempt(seconds left, idempotency key)`; again after what is retryable, until `timeout_s` have passed.

    Raises the last error. An effect always gets a key, the same one for every attempt.
    """
    known = METHODS.get(method)
    if key is None and known is not None and known.effect:
        key = new_ulid()
    deadline = time.monotonic() + timeout_s
    retrying = AsyncRetrying(
        retry=retry_if_exception(_worth_another), stop=stop_before_delay(timeout_s), wait=_pause, reraise=True
    )

    async def timed() -> dict[str, Any]:
        return await attempt(deadline - time.monotonic(), key)

    return await retrying(timed)


def no_answer(timeout_s: float, *, taken: bool = True) -> ModelManagerError:
    """Nothing came in time. `taken`: the request was handed over, so the worker is slow, and not the way to it."""
    what = "No answer" if taken else "The broker did not take the request"
    return ModelManagerError("ERR_DEADLINE_EXCEEDED", f"{what} within {max(timeout_s, 0):.1f} seconds.")


def _worth_another(error: BaseException) -> bool:
    if isinstance(error, Unreachable):
        return error.passing
    return isinstance(error, ModelManagerError) and error.retryable


def _pause(state: RetryCallState) -> float:
    """Full jitter over a doubling ceiling, and never sooner than the worker asks for."""
    error = state.outcome.exception() if state.outcome else None
    asked_ms = error.details.get("retryAfterMs") if isinstance(error, ModelManagerError) else None
    ceiling_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(state.attempt_number, 10))
    floor_s = asked_ms / 1000 if isinstance(asked_ms, int | float) else 0.0
    return floor_s + random.uniform(0, ceiling_s)
