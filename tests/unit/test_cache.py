"""The cache of recently stored models: bounded by entries and by bytes, the least recently used goes first."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from worker.cache import CacheStats, ModelCache


def test_what_was_stored_is_found_by_version_and_digest() -> None:
    cache = ModelCache(10, 1000)
    cache.put("m", "1", {"aa": b"bytes", "bb": b""})
    assert cache.bytes_of("m", "1", "aa") == b"bytes"
    assert cache.bytes_of("m", "1", "bb") == b""


def test_what_was_not_stored_is_none() -> None:
    cache = ModelCache(10, 1000)
    cache.put("m", "1", {"aa": b"bytes"})
    assert cache.bytes_of("m", "1", "bb") is cache.bytes_of("m", "2", "aa") is cache.bytes_of("n", "1", "aa") is None


def test_the_least_recently_used_entry_goes_first() -> None:
    cache = ModelCache(2, 1000)
    cache.put("a", "1", {"aa": b"a"})
    cache.put("b", "1", {"bb": b"b"})
    assert cache.bytes_of("a", "1", "aa") == b"a"
    cache.put("c", "1", {"cc": b"c"})
    assert cache.bytes_of("b", "1", "bb") is None
    assert (cache.bytes_of("a", "1", "aa"), cache.bytes_of("c", "1", "cc")) == (b"a", b"c")
    assert cache.stats().evictions == 1


def test_a_lookup_that_finds_nothing_does_not_make_an_entry_recent() -> None:
    cache = ModelCache(2, 1000)
    cache.put("a", "1", {"aa": b"a"})
    cache.put("b", "1", {"bb": b"b"})
    assert cache.bytes_of("a", "1", "bb") is None
    cache.put("c", "1", {"cc": b"c"})
    assert cache.bytes_of("a", "1", "aa") is None


def test_entries_go_until_the_bytes_fit() -> None:
    cache = ModelCache(10, 10)
    for name in "abc":
        cache.put(name, "1", {"aa": bytes(4)})
    assert cache.stats() == CacheStats(entries=2, bytes=8, hits=0, misses=0, evictions=1)
    cache.put("d", "1", {"aa": bytes(10)})
    assert cache.stats() == CacheStats(entries=1, bytes=10, hits=0, misses=0, evictions=3)


def test_a_version_above_all_room_is_not_kept() -> None:
    cache = ModelCache(10, 10)
    cache.put("small", "1", {"aa": bytes(10)})
    cache.put("large", "1", {"aa": bytes(6), "bb": bytes(5)})
    assert cache.bytes_of("large", "1", "aa") is None
    assert cache.bytes_of("small", "1", "aa") == bytes(10)


def test_a_second_put_replaces_the_first() -> None:
    cache = ModelCache(10, 100)
    cache.put("m", "1", {"aa": bytes(60)})
    cache.put("m", "1", {"bb": bytes(70)})
    assert cache.bytes_of("m", "1", "aa") is None
    assert cache.bytes_of("m", "1", "bb") == bytes(70)
    assert cache.stats().bytes == 70 and cache.stats().evictions == 0


def test_a_version_or_all_versions_of_a_model_are_forgotten() -> None:
    cache = ModelCache(10, 100)
    for model_id, version in (("m", "1"), ("m", "2"), ("m", "3"), ("m/n", "1")):
        cache.put(model_id, version, {"aa": b"x"})
    cache.forget("m", "1")
    assert cache.bytes_of("m", "1", "aa") is None and cache.bytes_of("m", "2", "aa") == b"x"
    cache.forget("m", None)
    cache.forget("absent", None)
    cache.forget("absent", "1")
    assert cache.bytes_of("m", "2", "aa") is cache.bytes_of("m", "3", "aa") is None
    assert cache.bytes_of("m/n", "1", "aa") == b"x"
    assert cache.stats().entries == cache.stats().bytes == 1 and cache.stats().evictions == 0


def test_no_entries_or_no_bytes_turn_the_cache_off() -> None:
    for off in (ModelCache(0, 100), ModelCache(10, 0)):
        off.put("m", "1", {"aa": b"x"})
        assert off.bytes_of("m", "1", "aa") is None and off.stats().entries == 0


def test_lookups_are_counted() -> None:
    cache = ModelCache(10, 100)
    cache.put("m", "1", {"aa": b"x"})
    cache.bytes_of("m", "1", "aa")
    cache.bytes_of("m", "1", "bb")
    cache.bytes_of("n", "1", "aa")
    assert (cache.stats().hits, cache.stats().misses) == (1, 2)


def test_a_later_change_of_what_was_put_does_not_reach_the_cache() -> None:
    cache = ModelCache(10, 100)
    contents = {"aa": b"x"}
    cache.put("m", "1", contents)
    contents["bb"] = b"y"
    assert cache.bytes_of("m", "1", "bb") is None


keys = st.tuples(st.sampled_from("abc"), st.sampled_from("12"))


class CacheMachine(RuleBasedStateMachine):
    """Any sequence of calls stays within both bounds, and what is found is what was put last."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = ModelCache(3, 20)
        self.latest: dict[tuple[str, str], bytes] = {}

    @rule(key=keys, data=st.binary(max_size=25))
    def put(self, key: tuple[str, str], data: bytes) -> None:
        self.cache.put(*key, {"aa": data})
        self.latest[key] = data

    @rule(key=keys)
    def look(self, key: tuple[str, str]) -> None:
        assert self.cache.bytes_of(*key, "aa") in (None, self.latest.get(key))

    @rule(key=keys, every=st.booleans())
    def forget(self, key: tuple[str, str], every: bool) -> None:
        self.cache.forget(key[0], None if every else key[1])
        self.latest = {k: v for k, v in self.latest.items() if k[0] != key[0] or (not every and k != key)}
        assert self.cache.bytes_of(*key, "aa") is None

    @invariant()
    def bounded(self) -> None:
        stats = self.cache.stats()
        kept = [data for k in self.latest if (data := self.cache.bytes_of(*k, "aa")) is not None]
        assert stats.entries <= 3 and stats.bytes == sum(map(len, kept)) <= 20


TestCacheKeepsItsBounds = CacheMachine.TestCase
TestCacheKeepsItsBounds.settings = settings(max_examples=50)
