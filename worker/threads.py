"""Threads for the bytes of models: as many as there are processors, and behind the event loop in the queue for them."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache

_THREADS = max(2, min(8, os.cpu_count() or 2))
_NICENESS = 10


def byte_threads(name: str, count: int = _THREADS) -> ThreadPoolExecutor:
    """A pool whose threads make way for the event loop: with eight stores at once the median of lookups was seen to be
    eight times as long without that. Linux alone knows a priority of threads; elsewhere they have that of the process.
    """
    return ThreadPoolExecutor(count, thread_name_prefix=name, initializer=_make_way)


@cache
def processor_threads() -> ThreadPoolExecutor:
    """The pool of the whole process for short work that only a processor is needed for: to hash bytes, and to take them
    from a socket. One for all, and never shut down: where processors are shared among sessions or containers first,
    niceness ranks our threads among themselves alone, and the event loop pays for every one of them that wants to run.
    """
    return byte_threads("bytes")


def _make_way() -> None:
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
