"""The requests that had an effect, so that a repeat of one is answered from the record of its effect."""

from __future__ import annotations

from collections import OrderedDict

import msgspec

REMEMBERED_REQUESTS = 200_000
REMEMBERED_MS = 24 * 3600 * 1000


class RememberedRequest(msgspec.Struct, frozen=True, gc=False):
    """`hash` of the request, `sequence` and time (unix ms) of the record of its effect."""

    hash: str
    sequence: int
    time_ms: int


class RememberedRequests:
    """The last 200,000 of the last 24 hours, by their key."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, RememberedRequest] = OrderedDict()

    def __len__(self) -> int:
        return len(self._requests)

    def get(self, key: str) -> RememberedRequest | None:
        return self._requests.get(key)

    def add(self, key: str, request: RememberedRequest) -> None:
        self._requests[key] = request
        self._requests.move_to_end(key)
        since = request.time_ms - REMEMBERED_MS
        while len(self._requests) > REMEMBERED_REQUESTS or next(iter(self._requests.values())).time_ms < since:
            self._requests.popitem(last=False)

    def records(self) -> list[tuple[int, int]]:
        """Sequence and time (unix ms) of the record of each."""
        return [(request.sequence, request.time_ms) for request in self._requests.values()]

    def dumped(self) -> list[list[str | int]]:
        return [[key, known.hash, known.sequence, known.time_ms] for key, known in self._requests.items()]

    def load(self, requests: list[tuple[str, str, int, int]]) -> None:
        self._requests = OrderedDict(
            (key, RememberedRequest(request_hash, sequence, time_ms))
            for key, request_hash, sequence, time_ms in requests
        )
