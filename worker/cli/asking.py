"""A question to whoever sits at the terminal."""

from __future__ import annotations

import signal
import sys

import typer

from schemas.errors import ModelManagerError


def ask(question: str, *, otherwise: str, hint: str = "say --yes", yes: bool, default: bool = False) -> None:
    """Return if `yes` was said before, or is said now; ERR_INVALID_REQUEST if not.

    Off a terminal the error is `otherwise`, with `hint`. Raises KeyboardInterrupt on Ctrl-C and at the end of input.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise ModelManagerError("ERR_INVALID_REQUEST", otherwise, hint=hint)
    # An event loop that runs would take a Ctrl-C for itself, and the question would go on waiting.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        agreed = typer.confirm(question, default=default, err=True)
    except typer.Abort:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)
    if not agreed:
        raise ModelManagerError("ERR_INVALID_REQUEST", "Nothing was done.")
