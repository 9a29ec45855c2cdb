"""Commands that bring what is missing: quiet unless they fail, and then with their last word."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.local.server import Unavailable


def run_quietly(
    command: Sequence[str],
    what: str,
    what_to_do: str,
    *,
    env: Mapping[str, str] | None = None,
    folder: Path | None = None,
    timeout_s: float | None = None,
) -> None:
    """Run it, with `env` beside the environment. Raises `Unavailable` with the last line of its output if it fails."""
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **(env or {})},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{what} took more than {timeout_s:.0f} s", what_to_do) from None
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        raise Unavailable(f"{what} failed: {last}", what_to_do)
