"""Which blobs the catalog needs, and under which key the bytes with some digest lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from schemas.journal import StoredFile


class BlobIndex:
    """Counted uses of storage keys. A blob nobody needs any more is told once, in `take_unneeded`."""

    def __init__(self) -> None:
        self.bytes = 0
        self._uses: dict[str, int] = {}
        self._content: dict[str, tuple[str, int]] = {}  # key -> (sha256, size), once the bytes are known to be there
        self._key_of: dict[str, str] = {}
        self._unneeded: set[str] = set()

    def __len__(self) -> int:
        return len(self._content)

    def __iter__(self) -> Iterator[str]:
        return iter(self._uses)

    def needs(self, key: str) -> bool:
        return key in self._uses

    def key_of(self, sha256: str) -> str | None:
        """The key of a stored, verified blob with these bytes."""
        return self._key_of.get(sha256)

    def use(self, files: Iterable[StoredFile]) -> None:
        """Count a use of each file's blob, whose bytes are there and verified."""
        for file in files:
            key, sha256 = file["key"], file["sha256"]
            self.hold([key])
            if key not in self._content:
                self._content[key] = (sha256, file["size"])
                self.bytes += file["size"]
            self._key_of.setdefault(sha256, key)

    def hold(self, keys: Iterable[str]) -> None:
        """Count a use of each key, whether its bytes are there or still to come."""
        for key in keys:
            self._uses[key] = self._uses.get(key, 0) + 1
            self._unneeded.discard(key)

    def release(self, keys: Iterable[str]) -> None:
        """Take back a use of each key."""
        for key in keys:
            self._uses[key] -= 1
            if self._uses[key] == 0:
                del self._uses[key]
                self._unneeded.add(key)
                sha256, size = self._content.pop(key, ("", 0))
                self.bytes -= size
                if self._key_of.get(sha256) == key:
                    del self._key_of[sha256]

    def take_unneeded(self) -> set[str]:
        """The keys that lost their last use since the last call."""
        unneeded, self._unneeded = self._unneeded, set()
        return unneeded
