"""What every kind of service has in common: its life, its readiness, and the errors on the way there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeVar

POLL_S = 0.1


class Source(StrEnum):
    """Where a service may come from; `AUTO` takes the first of the others that can be had."""

    AUTO = "auto"
    GIVEN = "given"
    DOCKER = "docker"
    NATIVE = "native"


class Unavailable(Exception):
    """A service cannot be had here. `what_to_do` is a sentence for the person at the keyboard."""

    def __init__(self, reason: str, what_to_do: str) -> None:
        super().__init__(f"{reason}; {what_to_do}")
        self.reason = reason
        self.what_to_do = what_to_do


Service = TypeVar("Service")


def choose(
    source: Source,
    *,
    variable: str,
    given: Callable[[str], Service],
    in_container: Callable[[], Service],
    native: Callable[[str], Service],
) -> Service:
    """The first that can be had, in the order of `Source`: at the address in the environment's `variable`, or ours.

    `native` is told why there is no container. Raises `Unavailable` if none can be had, or none from `source`.
    """
    if source in (Source.AUTO, Source.GIVEN):
        if url := os.environ.get(variable):
            return given(url)
        if source is Source.GIVEN:
            raise Unavailable(f"{variable} is not set", "set it to the address of a server")
    no_docker = ""
    if source in (Source.AUTO, Source.DOCKER):
        try:
            return in_container()
        except Unavailable as error:
            if source is Source.DOCKER:
                raise
            no_docker = f" ({error.reason})"
    return native(no_docker)


class NotStarted(Exception):
    """A service was started and did not become ready; the message ends with the last lines of its log."""


class Server(Protocol):
    """One server that can be ended and started again at the same address with the same data."""

    def start(self) -> None:
        """Starts it; it may answer only later. No effect while it runs. Raises `NotStarted`."""

    def stop(self) -> None:
        """Asks it to end in order and returns when it has; what does not end in time is killed."""

    def kill(self) -> None:
        """Ends it at once, as a crash would, and returns when nothing of it is left."""

    def close(self) -> None:
        """Ends it for good and gives back what it holds. May be called twice."""

    def failure(self) -> str | None:
        """Why it does not run, with the end of its log; None while it runs."""


@dataclass(frozen=True)
class Given:
    """A server that somebody else runs. It is used, never ended."""

    address: str

    def start(self) -> None:
        return

    def stop(self) -> None:
        raise Unavailable(f"{self.address} is not ours to end", "unset its address to have one started here")

    def kill(self) -> None:
        self.stop()

    def close(self) -> None:
        return

    def failure(self) -> str | None:
        return None


def wait_until_ready(server: Server, name: str, answers: Callable[[], bool], *, timeout_s: float) -> None:
    """Returns once `answers()` is true. Raises `NotStarted` if the server ends first or the time is over."""
    deadline = time.monotonic() + timeout_s
    while not answers():
        if failure := server.failure():
            raise NotStarted(f"{name} ended while it was starting: {failure}")
        if time.monotonic() > deadline:
            raise NotStarted(f"{name} did not answer within {timeout_s:.0f} s")
        time.sleep(POLL_S)
