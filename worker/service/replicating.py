"""replicateModel: racks are named in the record of a version; the job awaits their copies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from schemas.errors import ERRORS, ModelManagerError
from schemas.ids import digest_of
from schemas.rpc import ReplicateReply, ReplicationResult
from worker.catalog.entries import VersionEntry
from worker.catalog.updates import update_record
from worker.jobs.runner import Commit
from worker.policy import Policy
from worker.registry import Change, Registry
from worker.replication.peers import Peers

Progress = Callable[[str, int], None]

_QUIET_S = 60.0  # that nothing has moved anywhere: what is not there by then is not waited for
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_COUNTED = ("succeeded", "failed")


@dataclass(frozen=True, slots=True)
class _Copy:
    """What is known of one rack's copy. `settled`: waiting would not change it; `received` in bytes."""

    result: ReplicationResult
    settled: bool = False
    received: int = 0


class Replicating:
    """`peers` is set where other racks can be asked; else nobody's copy is waited for."""

    def __init__(self, registry: Registry, policy: Policy) -> None:
        self._registry = registry
        self._policy = policy
        self.peers: Peers | None = None

    async def name(self, model: str, version: str, peers: Sequence[str] | None) -> list[str]:
        """Record that these racks, or without any those of the settings, should hold the version; which they are. One
        that is away now pulls the version when it is back."""
        wanted = self._policy.peers if peers is None else peers
        named = [peer for peer in dict.fromkeys(wanted) if peer != self._policy.rack]
        await self._registry.transact(model.lower(), lambda: self._named(model, version, named))
        return named

    async def watch(self, params: dict[str, Any], progress: Progress) -> Commit:
        """Wait while the copies that were named come nearer."""
        model, version = params["modelId"], params["version"]
        peers = await self.name(model, version, params.get("peers"))  # mostly done; not so by an earlier program
        entry = await self._registry.look(lambda: self._registry.catalog.resolve(model, version))
        copies = await self._awaited(entry, peers, progress)
        results = [copies[peer].result for peer in peers]
        succeeded, failed = (sum(result["state"] == state for result in results) for state in _COUNTED)
        reply = ReplicateReply(
            success=True,
            modelId=entry.model,
            version=entry.version,
            totalPeers=len(peers),
            successfulReplications=succeeded,
            failedReplications=failed,
            results=results,
        )

        async def commit() -> dict[str, Any]:
            return cast(dict[str, Any], reply)

        return commit

    def _named(self, model: str, version: str, peers: list[str]) -> Change | None:
        self._registry.catalog.check_own(model)
        entry = self._registry.catalog.resolve(model, version)
        replicas = sorted({*entry.replicas, *peers})
        if replicas == sorted(entry.replicas):
            return None
        return Change("update", update_record(self._registry.catalog, entry, replicas=replicas))

    async def _awaited(self, entry: VersionEntry, wanted: list[str], progress: Progress) -> dict[str, _Copy]:
        """The copies by rack, once all are settled or nothing has moved for a minute."""
        copies = {peer: _Copy(_result(peer, "pending", "Recorded and announced.")) for peer in wanted}
        if self.peers is None:
            return copies
        pause, moved_at, seen = _FIRST_PAUSE_S, time.monotonic(), -1
        progress("totalBytes", entry.size * len(wanted))
        while waiting := [peer for peer, copy in copies.items() if not copy.settled]:
            found = await asyncio.gather(*(self._ask(self.peers, peer, entry) for peer in waiting))
            copies.update(zip(waiting, found, strict=True))
            received = sum(copy.received for copy in copies.values())
            progress("bytes", received)
            if received != seen:
                moved_at, seen = time.monotonic(), received
            elif time.monotonic() - moved_at > _QUIET_S:
                break
            await asyncio.sleep(0 if all(copy.settled for copy in found) else pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        return copies

    async def _ask(self, peers: Peers, peer: str, entry: VersionEntry) -> _Copy:
        try:
            reply = await peers.rack(peer).get_model_metadata(entry.model, entry.version)
        except ModelManagerError as error:
            return _not_there(peer, error)
        if reply["checksum"] != digest_of(entry.checksum):
            return _Copy(_result(peer, "failed", "That rack has other bytes under that name."), settled=True)
        if reply["state"] != "available":
            return _Copy(_result(peer, "pending", f"The copy there is {reply['state']}."))
        return _Copy(_result(peer, "succeeded", "That rack holds a copy."), settled=True, received=entry.size)


def _not_there(peer: str, error: ModelManagerError) -> _Copy:
    details = error.details
    if error.code != "ERR_MODEL_NOT_FOUND":
        return _Copy(_result(peer, "failed", f"That rack does not answer: {error.message}"))
    if details.get("state") != "pending":
        return _Copy(_result(peer, "pending", "Recorded and announced. That rack has not begun a copy."))
    failure = details.get("error")
    received = details["received"] if isinstance(details.get("received"), int) else 0
    if not isinstance(failure, dict):
        return _Copy(_result(peer, "pending", "The copy is on its way."), received=received)
    kind = ERRORS.get(str(failure.get("code")))
    settled = kind is not None and not kind.retryable
    return _Copy(_result(peer, "failed", str(failure.get("message", ""))), settled=settled, received=received)


def _result(peer: str, state: Any, message: str) -> ReplicationResult:
    return {"peer": peer, "state": state, "message": message}
