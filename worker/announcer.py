"""Announcing: a hint for every change, off the reply path, and the regular hint of how far the journal is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from schemas.hints import Hint, head_hint, hint_of
from worker.journal import Entry
from worker.registry import Registry

HEAD_PERIOD_S = 60.0


class Announcer:
    """Turns what is committed into hints for `publish`, which must not block. A hint that is lost costs a minute."""

    def __init__(self, rack: str, registry: Registry, publish: Callable[[Hint], None]) -> None:
        self._rack = rack
        self._registry = registry
        self._publish = publish
        registry.listen(self._announce)

    def _announce(self, entry: Entry) -> None:
        hint = hint_of(
            entry.op,
            entry.record,
            rack=self._rack,
            epoch=self._registry.journal.epoch,
            sequence=entry.sequence,
            time_ms=entry.time_ms,
        )
        if hint is not None:
            self._publish(hint)

    async def tell_head(self) -> None:
        """Tell the head now and every minute, for as long as it runs."""
        while True:
            journal = self._registry.journal
            now = time.time_ns() // 1_000_000
            self._publish(head_hint(rack=self._rack, epoch=journal.epoch, head=journal.head, time_ms=now))
            await asyncio.sleep(HEAD_PERIOD_S)
