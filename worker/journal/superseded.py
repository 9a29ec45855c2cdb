"""Files that a base stands for: they go, but a reader may have segments held until it has seen them."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from worker.journal.base_index import index_name
from worker.journal.files import Files
from worker.journal.manifest import SealedFile, is_base


class Superseded:
    """Belongs to the event loop. A boot removes what is left, held or not."""

    def __init__(self, files: Files, folder: Path) -> None:
        self._files = files
        self._folder = folder
        self.holding = False
        """Whether segments stay until `let_go`, or until the next base."""
        self.held: tuple[SealedFile, ...] = ()

    async def take(self, left: list[SealedFile]) -> None:
        """A new base stands for these, and for all that were held."""
        over = [*self.held, *left]
        self.held = tuple(file for file in left if self.holding and not is_base(file.name))
        names = [file.name for file in over if file not in self.held]
        await self.remove(*names, *(index_name(name) for name in names if is_base(name)))

    async def let_go(self, file: SealedFile) -> None:
        """Remove a file that was held."""
        if file in self.held:
            self.held = tuple(each for each in self.held if each != file)
            await self.remove(file.name)

    async def remove(self, *names: str) -> None:
        """Remove these files; the next boot removes what is left."""

        def unlink() -> None:
            for name in names:
                with contextlib.suppress(OSError):
                    self._files.unlink(self._folder / name)

        await asyncio.to_thread(unlink)
