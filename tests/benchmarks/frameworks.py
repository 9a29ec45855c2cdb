"""The frameworks the design names, each installed once into a virtual environment of its own in the cache."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from deploy.local import Unavailable
from deploy.local.cache import cache, lock
from deploy.local.console import working

FRAMEWORKS = {"FastStream": "faststream[rabbit]==0.7.8", "Nameko": "nameko==2.14.1"}
_INSTALL_S = 300


def python_with(requirement: str) -> Path:
    """An interpreter that has the package; made now if the cache has none. Raises Unavailable."""
    name = "bench-" + re.sub(r"\[.*]", "", requirement).replace("==", "-")
    folder = cache() / name
    python, installed = folder / "bin" / "python", folder / "installed"
    with lock(name):
        if not installed.exists():
            shutil.rmtree(folder, ignore_errors=True)
            with working(f"installing {requirement} into {folder}"):
                _run([sys.executable, "-m", "venv", str(folder)], requirement)
                _run([str(python), "-m", "pip", "install", "--quiet", requirement], requirement)
            installed.touch()
    return python


def _run(command: list[str], requirement: str) -> None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=_INSTALL_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{requirement}: {type(error).__name__}", "see that packages can be installed") from None
    if done.returncode:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        raise Unavailable(f"{requirement}: {last}", "see that packages can be installed")
