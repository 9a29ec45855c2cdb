"""What is kept for all checkouts of one user: `$XDG_CACHE_HOME/model-manager`."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.local.console import working


def cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "model-manager"


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Held by one process of this user at a time; the others wait and say so."""
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with working(f"waiting for another run that holds {file.name}"):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
