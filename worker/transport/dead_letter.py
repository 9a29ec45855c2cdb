"""One dead letter: why it is one, and the request that it was.

Of why it is here there are two witnesses. The broker (`x-death`): expired, delivered too often, rejected. The worker
(`x-error-*` on the copy it made): it refused the request, and there was nobody to tell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pamqp.commands import Basic

from worker.transport.deliveries import read_request
from worker.transport.hot_channel import Message
from worker.transport.replies import DEATH_HEADERS, REASON_PREFIX, ROUTING_HEADERS, encodable, kept_properties

ID_CHARACTERS = 16
KEY_HEADER = "x-idempotency-key"
# The broker's count of deliveries; it changes with each reading.
_COUNTERS = ("x-delivery-count", "x-acquired-count")
# What must not go back with a letter. A deadline that has passed would make it a dead letter again.
_LEFT_BEHIND = (REASON_PREFIX, *DEATH_HEADERS, *_COUNTERS, "x-deadline")
_DEATHS = {
    "expired": "It expired: no worker took it within its time.",
    "delivery_limit": "It was delivered too often without an end; it may be what ends the worker.",
    "rejected": "The worker rejected it, and could not say why.",
    "maxlen": "The queue was full.",
}


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One dead letter, and why it is one.

    `id` is a digest of the message: the same at each reading, and for letters that are the same in everything.
    `method` is empty if nothing names one; `caller` is the broker's user, empty if unknown. `code` is one of ours, or
    the broker's word for its reason. The texts may hold surrogates, for bytes that are not UTF-8.
    """

    id: str
    died_at: datetime | None
    method: str
    caller: str
    message_id: str
    code: str
    reason: str
    message: Message

    @property
    def body(self) -> bytes:
        return self.message.body

    @property
    def properties(self) -> Basic.Properties:
        return self.message.properties


def read_letter(message: Message) -> DeadLetter:
    """What a message from a queue of dead letters tells; whatever it holds, it never raises."""
    properties = message.properties
    headers: Mapping[str, Any] = properties.headers or {}
    death = _last_death(headers.get("x-death"))
    if death is not None:
        code = str(death.get("reason", "unknown"))
        reason = _DEATHS.get(code, f"The broker dead-lettered it: {code}.")
        died_at, routing_key = death.get("time"), _first(death.get("routing-keys")) if death.get("exchange") else ""
        caller = properties.user_id
    else:
        code = str(headers.get("x-error-code", "unknown"))
        reason = str(headers.get("x-error-message", "Nothing on it tells why."))
        died_at, routing_key = _moment(headers.get("x-error-time")), headers.get("x-error-routing-key", "")
        caller = headers.get("x-error-user-id", "")
    return DeadLetter(
        id=_digest(message),
        died_at=died_at if isinstance(died_at, datetime) else None,
        method=str(routing_key).rpartition(".")[2] or properties.message_type or "",
        caller=str(caller or ""),
        message_id=properties.message_id or "",
        code=code,
        reason=reason,
        message=message,
    )


def _last_death(deaths: Any) -> Mapping[str, Any] | None:
    last = deaths[0] if isinstance(deaths, list) and deaths else None
    return last if isinstance(last, dict) else None


def _first(values: Any) -> str:
    return str(values[0]) if isinstance(values, list) and values else ""


def _moment(unix_ms: Any) -> datetime | None:
    try:
        return datetime.fromtimestamp(unix_ms / 1000, UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def _digest(message: Message) -> str:
    properties = message.properties
    told = {name: value for name, value in properties if name != "headers"}
    headers = {name: value for name, value in (properties.headers or {}).items() if name not in _COUNTERS}
    digest = hashlib.sha256(repr((message.routing_key, sorted(told.items()), headers)).encode("utf-8", "replace"))
    digest.update(message.body)
    return digest.hexdigest()[:ID_CHARACTERS]


def request_properties(letter: DeadLetter) -> Basic.Properties:
    """The properties of the request as it was sent, without what has ended it. `expiration` is none of them."""
    original = letter.properties
    headers = {
        name: value
        for name, value in encodable(original.headers or {}).items()
        if name not in ROUTING_HEADERS and not name.startswith(_LEFT_BEHIND)
    }
    if KEY_HEADER not in headers and not original.message_id:
        # Publishing makes up a message_id, which would be a new key each time.
        headers[KEY_HEADER] = read_request(letter.message).context.idempotency_key or f"dead-{letter.id}"
    properties = kept_properties(original, headers)
    properties.user_id = original.user_id
    return properties
