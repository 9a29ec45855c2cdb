"""The movable names of versions, by model: the fold of `alias` records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class Aliases:
    """Models are found by their id in any case."""

    def __init__(self) -> None:
        self._named: dict[
            str, dict[str, tuple[str, int]]
        ] = {}  # by model in lower case: version, sequence of its record

    def __len__(self) -> int:
        return sum(map(len, self._named.values()))

    def of(self, model: str) -> dict[str, str]:
        """The version that each alias of the model names."""
        return {alias: version for alias, (version, _) in self._named.get(model.lower(), {}).items()}

    def version(self, model: str, alias: str) -> str | None:
        named = self._named.get(model.lower())
        return None if named is None or alias not in named else named[alias][0]

    def naming(self, model: str, version: str) -> list[str]:
        """The aliases of a version, sorted."""
        named = self._named.get(model.lower())
        if named is None:
            return []
        return sorted(alias for alias, (target, _) in named.items() if target == version)

    def set(self, model: str, alias: str, version: str, sequence: int) -> None:
        self._named.setdefault(model.lower(), {})[alias] = (version, sequence)

    def drop(self, model: str, aliases: Iterable[str]) -> None:
        named = self._named.get(model.lower())
        if named is None:
            return
        for alias in aliases:
            named.pop(alias, None)
        if not named:
            del self._named[model.lower()]

    def items(self) -> Iterator[tuple[str, str, str, int]]:
        """Model in lower case, alias, version, and the sequence of the record that says so."""
        for model, named in self._named.items():
            for alias, (version, sequence) in named.items():
                yield model, alias, version, sequence
