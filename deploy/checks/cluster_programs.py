"""etcd and kube-apiserver, built with Go.

`go install` takes neither, since their modules name others by the place where these lie in the same repository: each is
built from a module of ours that asks for it.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from deploy.checks.schemas import KUBERNETES
from deploy.local.cache import cache, lock
from deploy.local.console import working
from deploy.local.golang import go_of_machine, kept, run
from deploy.local.server import Unavailable

ETCD = "go.etcd.io/etcd/server/v3@v3.6.8"
_ETCD_MAIN = """\
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() { etcdmain.Main(os.Args) }
"""
_SERVER_MAIN = """\
package main

import (
	"os"

	"k8s.io/component-base/cli"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
)

func main() { os.Exit(cli.Run(app.NewAPIServerCommand())) }
"""


def etcd() -> Path:
    """The program; built if the cache has none. Raises `Unavailable`."""
    return _program("etcd", ETCD, _ETCD_MAIN)


def kube_apiserver() -> Path:
    """The program; built if the cache has none, which takes some minutes. Raises `Unavailable`."""
    version = KUBERNETES.partition("@")[2]
    flags = f"-X k8s.io/component-base/version.gitVersion={version}"
    return _program("kube-apiserver", KUBERNETES, _SERVER_MAIN, flags)


def _program(name: str, module: str, main: str, flags: str = "") -> Path:
    program = kept(name, module.partition("@")[2])
    with lock(name):
        if not program.exists():
            program.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="build-", dir=cache()) as made, working(f"building {name}, once"):
                _build(Path(made), module, main, flags)
                (Path(made) / "program").replace(program)
    return program


def _build(folder: Path, module: str, main: str, flags: str) -> None:
    go = go_of_machine()
    if go is None:
        raise Unavailable("there is no Go on this machine", "install Go 1.24 or later")
    env = {"GOPATH": str(folder / "path"), "GOCACHE": str(folder / "cache"), "GOTOOLCHAIN": "local", "CGO_ENABLED": "0"}
    source = folder / "source"

    def call(verb: str, *words: str) -> None:
        run([str(go), *verb.split(), *words], folder=source, **env, GOFLAGS="-modcacherw")

    source.mkdir()
    (source / "main.go").write_text(main)
    (source / "go.mod").write_text("module program\n\ngo 1.24.0\n")
    call("mod download", module)
    call("mod edit", f"-require={module}", *_neighbours(folder / "path", module))
    call("mod tidy")
    call("build", "-trimpath", "-buildvcs=false", f"-ldflags={flags}", "-o", "../program", ".")


def _neighbours(path: Path, module: str) -> list[str]:
    """What the module asks for as v0.0.0, since it lies beside it: pinned to what was published with it."""
    name, _, version = module.partition("@")
    asked = (path / f"pkg/mod/cache/download/{name}/@v/{version}.mod").read_text()
    published = version.replace("v1.", "v0.")
    return [f"-replace={each}={each}@{published}" for each in re.findall(r"^\s+(\S+) v0\.0\.0$", asked, re.MULTILINE)]
