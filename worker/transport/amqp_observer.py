"""What the RabbitMQ transport tells whoever counts."""

from __future__ import annotations

from typing import Protocol


class AmqpObserver(Protocol):
    """Called on the event loop, so each method must return at once and never raise."""

    def connected(self, up: bool) -> None:
        """Both connections are up, or no longer."""

    def reconnected(self) -> None:
        """A connection was made again after one was lost."""

    def blocked(self, blocked: bool) -> None:
        """The broker has stopped reading what we publish, or reads again."""

    def delivered(self, redelivered: bool) -> None:
        """A request arrived."""

    def queue_wait(self, seconds: float) -> None:
        """Time from the sender's timestamp to the start of work; only for requests that carry one (whole seconds)."""

    def expired(self) -> None:
        """A request's deadline had passed before its work began."""

    def dead_lettered(self, reason: str) -> None:
        """A request was dead-lettered by the worker; `reason` is the error code."""

    def requeued(self) -> None:
        """A request was handed back to the broker."""

    def ack_lost(self) -> None:
        """An acknowledgement came too late: its channel is gone, the broker delivers the request again."""

    def reply_unroutable(self) -> None:
        """The requester is gone, or its queue refused the reply."""

    def publish_confirmed(self, seconds: float) -> None:
        """The broker confirmed a publish."""

    def publish_failed(self) -> None:
        """A publish was not confirmed in time, or its channel was lost."""

    def hint_published(self, kind: str) -> None:
        """The broker confirmed a hint; `kind` is its CloudEvents type."""

    def hint_dropped(self) -> None:
        """The buffer was full, so the oldest hint was dropped."""


class SilentObserver:
    """Counts nothing."""

    def connected(self, up: bool) -> None: ...
    def reconnected(self) -> None: ...
    def blocked(self, blocked: bool) -> None: ...
    def delivered(self, redelivered: bool) -> None: ...
    def queue_wait(self, seconds: float) -> None: ...
    def expired(self) -> None: ...
    def dead_lettered(self, reason: str) -> None: ...
    def requeued(self) -> None: ...
    def ack_lost(self) -> None: ...
    def reply_unroutable(self) -> None: ...
    def publish_confirmed(self, seconds: float) -> None: ...
    def publish_failed(self) -> None: ...
    def hint_published(self, kind: str) -> None: ...
    def hint_dropped(self) -> None: ...
