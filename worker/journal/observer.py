"""What a journal tells about itself while it works, for metrics."""

from __future__ import annotations


class JournalObserver:
    """Does nothing; override what is of interest. Calls are short and never raise.

    `append_seconds` is called on the event loop, the others on the journal's own thread or during the boot.
    """

    def append_seconds(self, seconds: float) -> None:
        """One record was acknowledged, this long after it was handed over."""

    def fsync_seconds(self, seconds: float) -> None:
        """One batch was synced."""

    def fsync_failed(self) -> None:
        """An fsync returned an error; the journal has stopped."""

    def torn_tail(self, size: int) -> None:
        """A boot cut this many bytes of an unfinished write."""
