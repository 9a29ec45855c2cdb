"""Callers in other languages, as programs: what they need is set up once and kept in the cache, outside the project.

Node's packages come by `npm ci` and Go's modules by `go build`, each as pinned by the lock file beside the program.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from deploy.local.cache import cache, lock
from deploy.local.console import working
from deploy.local.minio import go_of_machine, run
from deploy.local.server import Unavailable

HERE = Path(__file__).parent


class NoToolchain(Unavailable):
    """The language is not on this machine; the tests of its caller are left out."""


def node_program(name: str, folder: Path) -> list[str]:
    """The command that runs a program of `tests/callers/<name>`, whose sources are put into `folder`."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise NoToolchain("there is no node with npm on this machine", "install Node.js 18 or later")
    source = HERE / name
    packages = cache() / f"npm-{_digest(source / 'package-lock.json')}"
    with lock(packages.name):
        if not (packages / ".complete").exists():
            shutil.rmtree(packages, ignore_errors=True)
            packages.mkdir(parents=True)
            for file in ("package.json", "package-lock.json"):
                shutil.copy(source / file, packages)
            with working(f"fetching the packages of {name}, once"):
                _run(npm, "ci", "--prefix", str(packages), "--ignore-scripts", "--no-audit", "--no-fund")
            (packages / ".complete").touch()
    # Node looks for packages above the file that imports them.
    for file in (*source.glob("*.mjs"), source / "package.json"):
        shutil.copy(file, folder)
    (folder / "node_modules").symlink_to(packages / "node_modules")
    return [node]


def go_program(name: str) -> list[str]:
    """The command that runs the program of `tests/callers/<name>`, built if its sources have changed."""
    go = go_of_machine()
    if go is None:
        raise NoToolchain("there is no Go on this machine", "install Go 1.24 or later")
    source = HERE / name
    program = cache() / "bin" / f"caller-{_digest(*sorted(source.iterdir()))}"
    with lock(program.name):
        if not program.exists():
            program.parent.mkdir(parents=True, exist_ok=True)
            unfinished = program.with_suffix(f".{os.getpid()}")
            with working(f"building the caller in {name}, once"):
                _run(str(go), "build", "-C", str(source), "-o", str(unfinished), ".", GOTOOLCHAIN="local", GOFLAGS="")
            unfinished.replace(program)
    return [str(program)]


def _run(*command: str, **env: str) -> None:
    try:
        run(command, **env)
    except Unavailable as error:
        raise Unavailable(error.reason, "its packages come from the registry that it is set to") from None


def _digest(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
