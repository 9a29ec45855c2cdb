"""Whether requests should be sent to this worker: one flag with a reason for each thing it needs."""

from __future__ import annotations


class Readiness:
    """Ready while there are checks and every one is good.

    `checks` gives (good, reason) by name, in the order in which they were first set.
    """

    def __init__(self) -> None:
        self.checks: dict[str, tuple[bool, str]] = {}

    @property
    def ready(self) -> bool:
        return bool(self.checks) and all(good for good, _ in self.checks.values())

    def set(self, name: str, good: bool, reason: str = "") -> None:
        """State how `name` is now; `reason` is for people and may be read by anyone."""
        self.checks[name] = (good, reason)
