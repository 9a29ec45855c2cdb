"""Keeping blobs from being removed while a version is stored that no record names yet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from worker.registry import Registry


class Pins:
    """The storage keys that one store keeps until its commit."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.keys: list[str] = []

    def new(self, key: str) -> str:
        self._registry.pin([key])
        self.keys.append(key)
        return key

    async def stored(self, sha256: str) -> str | None:
        """The key under which the rack has these bytes, if it has them."""
        key = await self._registry.pin_stored(sha256)
        if key is not None:
            self.keys.append(key)
        return key


@contextlib.contextmanager
def pinned(registry: Registry) -> Iterator[Pins]:
    """Pins that end with the block."""
    pins = Pins(registry)
    try:
        yield pins
    finally:
        registry.unpin(pins.keys)
