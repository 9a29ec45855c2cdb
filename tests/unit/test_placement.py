"""Replicas are placed by rendezvous hashing: everywhere the same, evenly, and moved as little as can be."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from worker.replication.placement import place

PEERS = [f"rack-{i}" for i in range(8)]
DIGESTS = [f"sha256:{i:064x}" for i in range(2000)]

racks = st.lists(st.sampled_from(PEERS), unique=True)


def test_the_placement_of_a_digest_is_fixed_for_ever() -> None:
    """Racks of different releases must agree, so a change here is a change of the contract."""
    assert place("sha256:" + "ab" * 32, ["rack-a", "rack-b", "rack-c", "rack-d"], 3, "rack-a") == ("rack-c", "rack-d")


@given(racks, st.integers(-1, 12), st.sampled_from(PEERS), st.sampled_from(DIGESTS))
def test_the_origin_counts_and_is_never_named(peers: list[str], factor: int, origin: str, digest: str) -> None:
    placed = place(digest, peers, factor, origin)
    others = set(peers) - {origin}
    assert set(placed) <= others
    assert len(placed) == len(set(placed)) == min(max(0, factor - 1), len(others))


@given(racks, st.integers(1, 9), st.sampled_from(DIGESTS), st.randoms())
def test_neither_the_order_of_peers_nor_repeats_matter(
    peers: list[str], factor: int, digest: str, shuffler: random.Random
) -> None:
    shuffled = [*peers, *peers]
    shuffler.shuffle(shuffled)
    assert place(digest, shuffled, factor, "rack-0") == place(digest, peers, factor, "rack-0")


def test_a_higher_factor_adds_racks_behind_the_same_ones() -> None:
    for digest in DIGESTS[:50]:
        placed = [place(digest, PEERS, factor, "origin") for factor in range(1, 10)]
        assert all(more[: len(fewer)] == fewer for fewer, more in pairwise(placed))


def test_a_peer_that_leaves_moves_only_its_own_share() -> None:
    moved = 0
    for digest in DIGESTS:
        before = place(digest, PEERS, 3, "origin")
        after = place(digest, PEERS[:-1], 3, "origin")
        kept = tuple(peer for peer in before if peer != PEERS[-1])
        assert after[: len(kept)] == kept
        moved += before != after
    assert 0.2 < moved / len(DIGESTS) < 0.3


def test_every_peer_gets_an_even_share() -> None:
    shares = Counter(peer for digest in DIGESTS for peer in place(digest, PEERS, 2, "origin"))
    assert set(shares) == set(PEERS)
    assert all(200 < share < 300 for share in shares.values())
