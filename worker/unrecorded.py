"""Answers to requests that changed nothing: no record has them, and a repeat may find something to change by then."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from schemas.errors import ModelManagerError
from schemas.journal import Idempotency
from worker.catalog.requests import REMEMBERED_MS

_ENTRY_BYTES = 500  # of memory, besides the answer


@dataclass(frozen=True, slots=True)
class _Answer:
    request_hash: str
    reply: bytes
    at: float

    @property
    def size(self) -> int:
        return _ENTRY_BYTES + len(self.reply)


class UnrecordedAnswers:
    """The last `bytes_max` of them of the last 24 hours, while this process lives: a repeat mostly comes soon."""

    def __init__(self, bytes_max: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._answers: OrderedDict[str, _Answer] = OrderedDict()
        self._bytes_max = bytes_max
        self._bytes = 0
        self._clock = clock

    def put(self, idempotency: Idempotency, reply: dict[str, Any]) -> None:
        answer = _Answer(idempotency["hash"], orjson.dumps(reply), self._clock())
        self._answers[idempotency["key"]] = answer
        self._bytes += answer.size
        while self._bytes > self._bytes_max:
            self._bytes -= self._answers.popitem(last=False)[1].size

    def get(self, idempotency: Idempotency) -> dict[str, Any] | None:
        """The answer this request had; ERR_CONFLICT if the key belongs to another request."""
        answer = self._answers.get(idempotency["key"])
        if answer is None:
            return None
        if answer.at < self._clock() - REMEMBERED_MS / 1000:
            del self._answers[idempotency["key"]]
            self._bytes -= answer.size
            return None
        if answer.request_hash != idempotency["hash"]:
            raise ModelManagerError("ERR_CONFLICT", "This idempotency key was used for another request.")
        reply: dict[str, Any] = orjson.loads(answer.reply)
        return reply
