"""What the tool says while it works: single lines on stderr."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

REMINDER_S = 10.0


def say(line: str) -> None:
    print(f"local: {line}", file=sys.stderr, flush=True)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Says `what` at once, and again every 10 s with the seconds gone, for as long as the block runs."""
    began = time.monotonic()
    done = threading.Event()

    def remind() -> None:
        while not done.wait(REMINDER_S):
            say(f"still {what}, {time.monotonic() - began:.0f} s")

    say(what)
    reminder = threading.Thread(target=remind, name="reminder", daemon=True)
    reminder.start()
    try:
        yield
    finally:
        done.set()
        reminder.join()
