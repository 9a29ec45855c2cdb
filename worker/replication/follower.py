"""Following: the changes of one other rack, so that a lost hint is missed for a minute at most.

How far they were taken in is recorded now and then, behind their effects; what is read again after a crash changes
nothing. A rack whose feed does not reach back to there, or has begun anew, is compared as a whole.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import structlog

from schemas.errors import ModelManagerError
from schemas.hints import HINT_TYPES
from schemas.ids import LATEST
from schemas.model import ListedVersion
from schemas.rpc import ListReply
from worker.catalog.table import DISPUTED, NO_ROW
from worker.client.transfer import in_lanes
from worker.journal import JournalDamaged
from worker.registry import Change, Registry
from worker.replication.mirror import Mirror
from worker.replication.peers import Changes, Gone, Head, Peers, Told, ask

_log = structlog.get_logger()

_CHANGES_AT_ONCE = 500
_LISTED_AT_ONCE = 200
_MODELS_AT_ONCE = 16
_PULLS_MOST = 10_000  # awaited from one rack: each takes memory
_POLL_S = 60.0
_RECORD_S = 30.0
_RECORDED_APART = 10_000  # sequences that concern nothing here
_PASSED_OVER_MOST = 100
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0


class _Place(NamedTuple):
    """Up to where changes were taken in: a sequence, in a life of the journal of a registry."""

    registry: str
    epoch: int
    after: int


class Follower:
    """Runs for the life of the process; wakes for the hints of `origin`, and every minute. `changed` is told model and
    version of each change it has looked at; `hopeful` tells how many versions of a rack are on their way."""

    def __init__(
        self,
        origin: str,
        rack: str,
        registry: Registry,
        mirror: Mirror,
        peers: Peers,
        *,
        changed: Callable[[str, str], None],
        hopeful: Callable[[str], int],
    ) -> None:
        self.origin = origin
        self.head = 0
        """The last sequence of that rack's journal that we know of."""
        self.error: ModelManagerError | None = None
        """Why it cannot be followed just now."""
        self._rack = rack
        self._registry = registry
        self._mirror = mirror
        self._peers = peers
        self._changed = changed
        self._hopeful = hopeful
        self._peer = peers.rack(origin)
        self._wake = asyncio.Event()
        cursor = registry.catalog.replicas.cursors.get(origin)
        self._place = None if cursor is None else _Place(cursor.registry, cursor.epoch, cursor.after)
        self._stale = False  # to be compared, whatever the place
        self._recorded = self._place
        self._recorded_at = time.monotonic()
        self._level_at = time.monotonic()
        self._concerned_since = False  # whether anything was written since the cursor was recorded
        self._passed_over: dict[tuple[str, str], bool] = {}  # by model and version: whether it was purged

    @property
    def epoch(self) -> int:
        return 0 if self._place is None else self._place.epoch

    @property
    def after(self) -> int:
        """The sequence up to which its changes are taken in."""
        return 0 if self._place is None else self._place.after

    @property
    def lag_s(self) -> float:
        """Seconds since all its changes were taken in, as far as it could tell them."""
        return time.monotonic() - self._level_at

    def hear(self, epoch: int, sequence: int) -> None:
        """A hint told of this sequence."""
        if (epoch, sequence) > (self.epoch, self.after):
            self._wake.set()

    def wake(self) -> None:
        """Hints may have been lost."""
        self._wake.set()

    def compare(self) -> None:
        """Compare all: something here stood in the way of its models, and is gone."""
        self._stale = True
        self._wake.set()

    async def run(self) -> None:
        """Follow until cancelled."""
        pause = _FIRST_PAUSE_S
        while True:
            self._wake.clear()
            try:
                await self._catch_up()
                await self._look_again()
            except Exception as error:  # noqa: BLE001 - a stranger's answer must not end the worker
                self._fail(error)
                await asyncio.sleep(pause * random.uniform(0.5, 1))
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                continue
            if self.error is not None:
                _log.info("rack_followed_again", origin=self.origin)
            self.error, pause = None, _FIRST_PAUSE_S
            await self._rest()

    def _fail(self, error: Exception) -> None:
        known = error if isinstance(error, ModelManagerError) else ModelManagerError("ERR_INTERNAL")
        if known is not error:
            _log.error("rack_not_understood", origin=self.origin, exc_info=error)
        elif self.error is None or self.error.code != known.code:
            _log.warning("rack_not_followed", origin=self.origin, code=known.code, reason=known.message)
        self.error = known

    async def _rest(self) -> None:
        """Until something is heard, the next poll, or the cursor is due to be recorded."""
        left = _POLL_S
        if self._place is not None and self._is_worth(self._place):
            left = min(left, max(0.0, self._recorded_at + _RECORD_S - time.monotonic()))
        try:
            async with asyncio.timeout(left):
                await self._wake.wait()
        except TimeoutError:
            await self._record(due=time.monotonic() - _RECORD_S)

    async def _catch_up(self) -> None:
        compared = False
        while True:
            if self._stale or self._place is None:
                if compared and not self._stale:
                    raise ModelManagerError("ERR_INTERNAL", "The rack's changes do not begin where it said.")
                self._stale, compared = False, True
                self._place = await self._compare()
                await self._record(due=time.monotonic())  # it was dear
            place = self._place
            page = await self._changes_after(place)
            if page is None:
                self._place = None
                continue
            self.head = page.head
            await self._take(page.changes)
            self._place = place._replace(after=page.next)
            await self._record(due=time.monotonic() - _RECORD_S)
            if page.next >= page.head:
                self._level_at = time.monotonic()
                return

    async def _changes_after(self, place: _Place) -> Changes | None:
        """A page of changes; None if the feed does not reach back to there, or has begun anew."""
        try:
            page = Changes.of(await self._peer.get_changes(place.epoch, place.after, limit=_CHANGES_AT_ONCE))
        except ModelManagerError as error:
            if error.code != "ERR_CHANGES_GONE":
                raise
            return None
        if page.registry_id != place.registry:  # from nothing, with an epoch that we know from before
            return None
        if page.next < min(place.after + 1, page.head):
            raise ModelManagerError("ERR_INTERNAL", "The rack's changes lead nowhere.")
        return page

    async def _record(self, *, due: float) -> None:
        """Record the cursor, unless that was done since `due` (seconds of `time.monotonic`), or what it stands for is
        little: a record of ours moves the cursors of others."""
        place = self._place
        if place is None or self._recorded_at > due or self._passed_over or not self._is_worth(place):
            return
        record = {"origin": self.origin, "registry": place.registry, "epoch": place.epoch, "after": place.after}
        self._recorded_at = time.monotonic()
        try:
            await self._registry.transact(f"follow {self.origin}", lambda: Change("follow", record))
        except ModelManagerError as error:  # as on a full disk, where deletes go on
            _log.info("cursor_not_recorded", origin=self.origin, code=error.code)
            return
        self._recorded, self._concerned_since = place, False

    def _is_worth(self, place: _Place) -> bool:
        recorded = self._recorded
        if recorded is None or recorded[:2] != place[:2]:
            return True
        return place.after - recorded.after >= (1 if self._concerned_since else _RECORDED_APART)

    # --- one change after the other ---

    async def _take(self, changes: Iterable[Mapping[str, Any]]) -> None:
        """Look at the versions that the changes name, as they are at their origin now."""
        named: dict[str, dict[str, bool]] = {}  # by model and version: whether it was purged
        for change in changes:
            model, versions, purged = self._concerned(change)
            for version in versions:
                # The last change of a version decides, in the order of the last ones.
                known = named.setdefault(model, {})
                known.pop(version, None)
                known[version] = purged
        await in_lanes(list(named.items()), self._look_at, lanes=_MODELS_AT_ONCE)

    def _concerned(self, change: Mapping[str, Any]) -> tuple[str, list[str], bool]:
        """The model, those of its named versions that are or should be here, and whether they were purged."""
        model, data, kind = change["subject"], change["data"], change["type"]
        if kind not in HINT_TYPES:  # of a later program: what else it tells of the version, it tells when it is asked
            return model, [], False
        if kind == "model-manager.alias.changed":
            named = [data["previous"], data["version"]] if self._mirror.holds(self.origin, model) else []
            return model, [version for version in reversed(named) if version is not None], False
        named = data.get("versions") or [data["version"]]
        if self._rack not in data.get("replicas", ()) and not self._mirror.owns(model):
            named = [version for version in named if self._mirror.concerns(self.origin, model, version)]
        return model, named, kind == "model-manager.version.deleted" and "restorableUntil" not in data

    async def _look_at(self, named: tuple[str, dict[str, bool]]) -> None:
        model, versions = named
        async with self._mirror.turn(model):
            for version, purged in versions.items():
                try:
                    await self._look_at_one(model, version, purged=purged)
                except (ModelManagerError, JournalDamaged, KeyError) as error:
                    self._pass_over(error, model, version, purged=purged)
        await self._room()

    async def _look_at_one(self, model: str, version: str, *, purged: bool) -> None:
        """Make the copy what the origin tells now. In the model's turn."""
        self._concerned_since = True
        told = await ask(self._peers, self.origin, model, version)
        if isinstance(told, Gone):
            await self._mirror.drop(self.origin, model, version, replace(told, purged=purged))
            await self._settle(model)
        else:
            await self._mirror.match(told)
        self._passed_over.pop((model, version), None)
        self._changed(model, version)

    async def _look_again(self) -> None:
        """At what was passed over."""
        for (model, version), purged in list(self._passed_over.items()):
            await self._look_at((model, {version: purged}))

    async def _settle(self, model: str) -> None:
        """End a conflict about one of our models, if that rack has none with its id any more. In the model's turn."""
        newest = await self._registry.look(lambda: self._registry.catalog.newest(model))
        if newest is None or newest.conflict != self.origin:
            return
        if isinstance(await ask(self._peers, self.origin, model, LATEST), Gone):
            await self._mirror.settle(self.origin, model)
            _log.info("model_conflict_over", model=newest.model, rack=self.origin)

    def _pass_over(self, error: Exception, model: str, version: str, *, purged: bool = False) -> None:
        """One version that cannot be told or not be understood does not hold up the others. It is looked at again, and
        until then the cursor is not recorded. Raises other errors, and if there are too many such versions."""
        if isinstance(error, ModelManagerError) and error.code != "ERR_INTERNAL":
            raise error
        if (model, version) not in self._passed_over:
            _log.error("version_not_followed", origin=self.origin, model=model, version=version, reason=str(error))
        self._passed_over[model, version] = purged
        if len(self._passed_over) > _PASSED_OVER_MOST:
            raise ModelManagerError("ERR_INTERNAL", f"{len(self._passed_over)} versions are not understood.")

    async def _room(self) -> None:
        """Wait while too many versions of that rack are on their way; those that failed do not count."""
        while self._hopeful(self.origin) >= _PULLS_MOST:  # noqa: ASYNC110 - each end of a pull gives room
            await asyncio.sleep(1)

    # --- all at once ---

    async def _compare(self) -> _Place:
        """Make all copies what that rack lists; the place in its feed from which on that may have changed.

        What is not listed any more is deleted here with an undo window, so that a registry that was lost there does not
        take the last copies along.
        """
        catalog = self._registry.catalog
        self._passed_over.clear()
        begun = Head.of(await self._peer.ping())
        _log.info("rack_compared", origin=self.origin, epoch=begun.epoch, head=begun.head)
        seen = bytearray(len(catalog.table))
        awaited = {pull.sequence: pull for pull in catalog.replicas.pulls() if pull.origin == self.origin}
        cursor: str | None = None
        while True:
            page = await self._peer.list_models(limit=_LISTED_AT_ONCE, cursor=cursor)
            await in_lanes(self._listed(page, seen, awaited), self._match, lanes=_MODELS_AT_ONCE)
            cursor = page.get("nextCursor")
            if cursor is None:
                break
        table = catalog.table
        copies = np.frombuffer(catalog.replicas.rows[self.origin].tobytes(), np.uint32)
        copies = copies[copies < len(seen)]
        gone = copies[(np.frombuffer(seen, np.uint8)[copies] == 0) & table.visible()[copies]].tolist()
        left = [(table.model[row], table.version[row]) for row in gone]
        left += [(pull.model, pull.version) for pull in awaited.values()]
        left += await self._disputed()
        unlisted = [(model, {version: False}) for model, version in left]
        await in_lanes(unlisted, self._look_at, lanes=_MODELS_AT_ONCE)
        self.head = begun.head
        self._concerned_since, self._recorded = True, None
        return _Place(begun.registry_id, begun.epoch, begun.head)

    async def _disputed(self) -> list[tuple[str, str]]:
        """Model and version of ours that this rack disputes, or has disputed."""
        catalog = self._registry.catalog
        found = []
        for row in catalog.table.rows_with(DISPUTED):
            entry = await self._registry.look(partial(catalog.entry, row))
            if entry.conflict == self.origin:
                found.append((entry.model, entry.version))
        return found

    def _listed(self, page: ListReply, seen: bytearray, awaited: dict[int, Any]) -> list[ListedVersion]:
        """What of a page concerns this rack; it is noted in `seen` by row, and taken out of `awaited`."""
        catalog = self._registry.catalog
        concerned: list[ListedVersion] = []
        for entry in page["models"]:
            if entry.get("origin") != self.origin:
                continue
            model, version = entry["modelId"], entry["version"]
            row = catalog.table.find(model, version)
            if row != NO_ROW and row < len(seen):
                seen[row] = True
            pull = catalog.replicas.pull_of(model, version)
            if pull is not None:
                awaited.pop(pull.sequence, None)
            named = self._rack in entry["replicas"] or self._mirror.owns(model)
            if named or self._mirror.concerns(self.origin, model, version):
                concerned.append(entry)
        return concerned

    async def _match(self, entry: ListedVersion) -> None:
        model, version = entry["modelId"], entry["version"]
        async with self._mirror.turn(model):
            try:
                await self._mirror.match(Told.of(entry))
            except (ModelManagerError, JournalDamaged, KeyError) as error:
                self._pass_over(error, model, version)
        await self._room()
