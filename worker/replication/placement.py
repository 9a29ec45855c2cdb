"""Which racks hold a version: rendezvous hashing (highest random weight)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def place(digest: str, peers: Sequence[str], factor: int, origin: str) -> tuple[str, ...]:
    """The racks, besides the origin, that should hold a version, heaviest first; fewer where there are not enough.

    `factor` counts the origin, so 1 means no replica. The answer depends on nothing else than the arguments, and not on
    the order of `peers`; a peer that joins or leaves moves only its own share.
    """
    others = set(peers) - {origin}
    return tuple(sorted(others, key=lambda peer: _weight(peer, digest), reverse=True)[: max(0, factor - 1)])


def _weight(peer: str, digest: str) -> bytes:
    # The separator occurs in neither name, so no two pairs are hashed as the same bytes.
    return hashlib.sha256(f"{peer}\n{digest}".encode()).digest()
