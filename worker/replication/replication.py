"""Replication: this rack holds copies of other racks' versions that name it, and keeps them what they are there.

A hint wakes the follower of its rack, the follower asks that rack what changed and begins pulls, the puller brings
bytes. Followed are the peers of the settings, those of which something is here, and whoever announces a version that
names this rack.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import structlog

from schemas.errors import ModelManagerError
from schemas.hints import Hint
from schemas.ids import RACK_PATTERN
from worker.cache import ModelCache
from worker.catalog.table import DISPUTED
from worker.journal import Entry
from worker.policy import Policy
from worker.registry import Registry
from worker.replication.download import PullObserver
from worker.replication.follower import Follower
from worker.replication.mirror import Mirror
from worker.replication.peers import Peers
from worker.replication.puller import Puller, Refuse
from worker.storage.blobstore import BlobStore

_log = structlog.get_logger()

_FOLLOWED_MOST = 256
_LONGEST_PAUSE_S = 30.0
# Hints that do not say which racks they concern.
_ABOUT_ANY = ("model-manager.head", "model-manager.alias.changed")
_rack = re.compile(RACK_PATTERN)

Hear = Callable[[], AbstractAsyncContextManager[AsyncIterator[Hint]]]


class Replication:
    """The parts, and who is followed. `hear` gives the hints of all racks until it breaks."""

    def __init__(
        self,
        registry: Registry,
        store: BlobStore,
        policy: Policy,
        cache: ModelCache,
        peers: Peers,
        *,
        hear: Hear,
        refuse: Refuse,
        places: int,
        observe: PullObserver,
    ) -> None:
        self._registry = registry
        self._policy = policy
        self._peers = peers
        self._hear = hear
        self.mirror = Mirror(registry, policy, cache)
        self.puller = Puller(registry, store, policy, self.mirror, peers, refuse=refuse, places=places, observe=observe)
        self.followers: dict[str, Follower] = {}
        registry.listen(self._on_entry)
        self._running: set[asyncio.Task[None]] = set()
        self._over = asyncio.Event()
        self._over.set()

    async def run(self) -> None:
        """Replicate until cancelled. An end of a part is an end of all."""
        replicas = self._registry.catalog.replicas
        self._over.clear()
        try:
            self._begin(self.puller.run(), "puller")
            self._begin(self._listen(), "hints")
            for rack in dict.fromkeys((*self._policy.peers, *replicas.cursors, *replicas.rows)):
                self._follow(rack)
            while True:
                done, _ = await asyncio.wait(self._running, timeout=1, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in self._running:
                task.cancel()
            try:
                await asyncio.wait(self._running)
                await self._peers.close()
            finally:
                self._over.set()

    async def stop(self) -> None:
        """Wait until a `run` that was cancelled is over: nothing is brought any more, and no half of a file is left."""
        await self._over.wait()

    def state(self) -> dict[str, Any]:
        """For the statistics: what is awaited, and how far each rack is followed."""
        replicas, table = self._registry.catalog.replicas, self._registry.catalog.table
        return {
            "copies": sum(table.count_visible_of(rows) for rows in replicas.rows.values()),
            "pending": replicas.awaited.total(),
            "failing": self.puller.failing,
            "conflicts": len(table.rows_with(DISPUTED)),
            "following": [_state_of(follower) for follower in self.followers.values()],
        }

    def _begin(self, work: Any, name: str) -> None:
        self._running.add(asyncio.create_task(work, name=name))

    def _follow(self, rack: str) -> Follower | None:
        follower = self.followers.get(rack)
        if follower is None and rack != self._policy.rack and len(self.followers) < _FOLLOWED_MOST:
            follower = Follower(
                rack,
                self._policy.rack,
                self._registry,
                self.mirror,
                self._peers,
                changed=self.puller.hurry,
                hopeful=self.puller.hopeful,
            )
            self.followers[rack] = follower
            self._begin(follower.run(), f"follower of {rack}")
        return follower

    def _on_entry(self, entry: Entry) -> None:
        """What takes away a model whose id another rack's model has, makes room for a copy of that."""
        if entry.op in ("delete", "purge"):
            rack = self.mirror.refused.pop(entry.record["model"].lower(), None)
            if rack is not None and rack in self.followers:
                self.followers[rack].compare()

    async def _listen(self) -> None:
        """Hear hints, again after each loss; until then the followers ask by themselves."""
        pause, told = 0.5, False
        while True:
            try:
                async with self._hear() as heard:
                    pause, told = 0.5, False
                    for follower in self.followers.values():
                        follower.wake()
                    async for hint in heard:
                        self._take(hint)
            except ModelManagerError as error:
                if not told:
                    _log.warning("hints_not_heard", code=error.code, reason=error.message)
                told = True
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _take(self, hint: Hint) -> None:
        """Wake the follower of the rack that tells. What is no hint of a rack is passed over."""
        try:
            rack, kind = hint["source"].removeprefix("/racks/"), hint["type"]
            epoch, sequence = int(hint["rackepoch"]), int(hint["rackseq"])
            named = self._policy.rack in hint["data"].get("replicas", ())
        except (KeyError, TypeError, ValueError, AttributeError):
            return
        if _rack.fullmatch(rack) is None:
            return
        follower = self._follow(rack) if named else self.followers.get(rack)
        # What a busy rack tells of its other models can wait until it tells its head.
        if follower is not None and (named or kind in _ABOUT_ANY):
            follower.hear(epoch, sequence)


def _state_of(follower: Follower) -> dict[str, Any]:
    state: dict[str, Any] = {
        "rack": follower.origin,
        "epoch": follower.epoch,
        "after": follower.after,
        "head": follower.head,
        "lagSeconds": round(follower.lag_s, 3),
    }
    if follower.error is not None:
        state["error"] = {"code": follower.error.code, "message": follower.error.message}
    return state
