"""Credentials that change while the worker runs: certificates, keys, and the file with the broker's address.

Nothing is lost and nothing is done twice by a change: a connection takes over from another when it is made, the old
one ends what was begun on it, and one link follows the other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from worker.transport.connections import LinkLostError
from worker.transport.link import Link

WATCH_INTERVAL_S = 2.0

log = logging.getLogger(__name__)

_FileState = tuple[int, int, int]
_State = tuple[_FileState | None, ...]


class Rotation:
    """Watches `files`, through symbolic links too, and renews `links` when they have changed."""

    def __init__(self, files: Sequence[Path], links: Sequence[Link]) -> None:
        self._files = files
        self._links = links

    async def run(self) -> None:
        """Watch, until cancelled. Files that do not work change nothing, and are tried again."""
        if not self._files:
            return
        refused = await asyncio.to_thread(self._state)
        used = dict.fromkeys(self._links, refused)
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            found = await asyncio.to_thread(self._state)
            # Each by itself: one that cannot be renewed would have those before it renewed again and again.
            stale = [link for link in self._links if used[link] != found]
            if not stale:
                continue
            try:
                for link in stale:
                    await link.renew()
                    used[link] = found
            except LinkLostError as error:
                if found != refused:
                    log.warning("The broker's new credentials do not work, the old ones stay in use: %s", error)
                refused = found
                continue
            log.info("The connections to the broker use its new credentials")

    def _state(self) -> _State:
        return tuple(map(_state_of, self._files))


def _state_of(file: Path) -> _FileState | None:
    """What changes when a file is written or replaced; None while there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
