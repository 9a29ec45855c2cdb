"""The RabbitMQ of another Debian than this machine's, beside it: `RABBITMQ_SUITE=trixie`.

Its packages lie in a folder of the cache, a whole Debian made once by `debootstrap`; its programs run there by
`chroot`, on the files of this machine. `sid` moves on: remove its folder to have the newest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from deploy.local.cache import cache, lock
from deploy.local.console import working
from deploy.local.quietly import run_quietly
from deploy.local.server import Unavailable

MAKE = Path(__file__).parents[1] / "images" / "debian-root.sh"
IN_ROOT = Path(__file__).with_name("in-root.sh")
PACKAGE = "rabbitmq-server"
MAKE_S = 600


def root(suite: str) -> Path:
    """The folder of a Debian with RabbitMQ; made if the cache has none, which takes a minute. Raises `Unavailable`."""
    for program in ("debootstrap", "unshare"):
        if shutil.which(program) is None:
            raise Unavailable(f"{program} is missing", f"apt-get install {program}, or unset RABBITMQ_SUITE")
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        raise Unavailable(f"only root may run the RabbitMQ of Debian {suite}", "unset RABBITMQ_SUITE, or be root")
    made = cache() / f"debian-{suite}"
    with lock(made.name):
        if not made.exists():
            make(suite, made)
    return made


def make(suite: str, made: Path) -> None:
    by_hand = f"try by hand: {MAKE} {suite} FOLDER {PACKAGE}"
    # Beside its destination, so that the last step is a rename.
    with (
        tempfile.TemporaryDirectory(prefix="build-", dir=cache()) as folder,
        working(f"making a Debian {suite} with {PACKAGE}, once"),
    ):
        run_quietly(
            [str(MAKE), suite, f"{folder}/root", PACKAGE], f"making a Debian {suite}", by_hand, timeout_s=MAKE_S
        )
        Path(folder, "root").rename(made)


def inside(made: Path, program: Path) -> tuple[str, ...]:
    """The command that runs a program of the folder."""
    return ("unshare", "--mount", str(IN_ROOT), str(made), str(program))


def version(root: Path) -> str:
    """That of the RabbitMQ in a Debian, for people; empty if it has none."""
    found = sorted(root.glob("usr/lib/rabbitmq/lib/rabbitmq_server-*"))
    return found[-1].name.rpartition("-")[2] if found else ""
