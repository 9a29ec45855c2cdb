"""Hints on their way out: a bounded, ordered buffer, published with confirms, apart from the replies.

A hint may be lost (a `head` hint or the change feed repairs that), so the buffer drops its oldest when it is full, and
nothing ever waits for it. What failed is sent again in order; a listener may therefore see one twice.
"""

from __future__ import annotations

import asyncio
from collections import deque

from aiormq.exceptions import DeliveryError
from pamqp.commands import Basic

from schemas.hints import CONTENT_TYPE, Hint
from schemas.wire import dump
from worker.transport.amqp_observer import AmqpObserver
from worker.transport.connections import LinkLostError
from worker.transport.link import retry_delays
from worker.transport.replies import Publisher
from worker.transport.topology import HINT_EXCHANGE

MAX_HINTS = 10_000
BATCH = 64


class HintOutbox:
    """The buffer and its one publisher."""

    def __init__(self, publisher: Publisher, observer: AmqpObserver) -> None:
        self._publisher = publisher
        self._observer = observer
        self._waiting: deque[Hint] = deque()
        self._some = asyncio.Event()
        self._none = asyncio.Event()
        self._none.set()

    def add(self, hint: Hint) -> None:
        """Take a hint to be published after all others; at once, whatever the broker does."""
        self._waiting.append(hint)
        self._drop_oldest()
        self._none.clear()
        self._some.set()

    async def wait_empty(self) -> None:
        """Return when every hint taken so far is confirmed or dropped."""
        await self._none.wait()

    async def run(self) -> None:
        """Publish, until cancelled."""
        delays = retry_delays()
        while True:
            await self._some.wait()
            await self._publisher.wait_usable()
            batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            unconfirmed = await self._publish(batch)
            if unconfirmed:
                self._waiting.extendleft(reversed(unconfirmed))
                self._drop_oldest()
                await asyncio.sleep(next(delays))
                continue
            delays = retry_delays()
            if not self._waiting:
                self._some.clear()
                self._none.set()

    async def _publish(self, batch: list[Hint]) -> list[Hint]:
        """Publish all, in order and without waiting for each; return those from the first that failed."""
        sent = await asyncio.gather(*map(self._publish_one, batch))
        return batch[sent.index(False) :] if False in sent else []

    async def _publish_one(self, hint: Hint) -> bool:
        properties = Basic.Properties(
            content_type=CONTENT_TYPE, message_id=hint["id"], message_type=hint["type"], delivery_mode=1
        )
        try:
            # Not mandatory: with no listener there is nobody to miss it.
            await self._publisher.confirmed(
                self._publisher.hints,
                dump(hint),
                exchange=HINT_EXCHANGE,
                key="",
                properties=properties,
                mandatory=False,
            )
        except (LinkLostError, DeliveryError):
            return False
        self._observer.hint_published(hint["type"])
        return True

    def _drop_oldest(self) -> None:
        while len(self._waiting) > MAX_HINTS:
            self._waiting.popleft()
            self._observer.hint_dropped()
