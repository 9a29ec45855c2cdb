"""RabbitMQ as a process of our own: found or installed as a Debian package, apart from any broker of the system.

With `RABBITMQ_SUITE` it is the one of that Debian suite, whatever this machine is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.local import debian
from deploy.local.cache import lock
from deploy.local.console import working
from deploy.local.process import Process
from deploy.local.quietly import run_quietly
from deploy.local.server import Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

# Debian's commands in /usr/sbin insist on being root or the user rabbitmq; what they wrap runs as anybody.
DEBIAN = Path("/usr/lib/rabbitmq/bin")
SUITE_VARIABLE = "RABBITMQ_SUITE"
POLICY = Path("/usr/sbin/policy-rc.d")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
STOP_S = 30.0
CTL_S = 60.0


@dataclass(frozen=True)
class Programs:
    """The commands of a broker, its name for people, and that of the folder for its data."""

    server: tuple[str, ...]
    ctl: tuple[str, ...]
    name: str = "RabbitMQ"
    data: str = "data"


def programs(*, allow_install: bool) -> Programs:
    """The broker's programs, its Debian package installed if they are missing. Raises `Unavailable`."""
    if suite := os.environ.get(SUITE_VARIABLE):
        return of_suite(suite)
    if found := find():
        return found
    by_hand = f"install the package {debian.PACKAGE}, or start Docker"
    if not allow_install:
        raise Unavailable("RabbitMQ is not installed", by_hand)
    if shutil.which("apt-get") is None:
        raise Unavailable("RabbitMQ is not installed, and this is no Debian", "install RabbitMQ, or start Docker")
    if os.geteuid() != 0:
        raise Unavailable("RabbitMQ is not installed, and only root may install it", by_hand)
    with lock("apt"):
        if found := find():
            return found
        install()
    if found := find():
        return found
    raise Unavailable(f"the package {debian.PACKAGE} holds no {DEBIAN / 'rabbitmq-server'}", by_hand)


def of_suite(suite: str) -> Programs:
    root = debian.root(suite)
    return Programs(
        debian.inside(root, DEBIAN / "rabbitmq-server"),
        debian.inside(root, DEBIAN / "rabbitmqctl"),
        f"RabbitMQ {debian.version(root)} of Debian {suite}",
        f"data-{suite}",  # which another version could not read
    )


def find() -> Programs | None:
    if (DEBIAN / "rabbitmq-server").exists():
        name = f"RabbitMQ {debian.version(Path('/'))}"
        return Programs((str(DEBIAN / "rabbitmq-server"),), (str(DEBIAN / "rabbitmqctl"),), name)
    server, ctl = shutil.which("rabbitmq-server"), shutil.which("rabbitmqctl")
    return Programs((server,), (ctl,)) if server and ctl else None


def install() -> None:
    wait = "DPkg::Lock::Timeout=300"
    with no_services(), working(f"installing {debian.PACKAGE} with apt-get"):
        for command in (
            ["apt-get", "-o", wait, "update", "-qq"],
            ["apt-get", "-o", wait, "install", "-qq", "--yes", "--no-install-recommends", debian.PACKAGE],
        ):
            by_hand = f"install {debian.PACKAGE} by hand, or start Docker"
            run_quietly(command, " ".join(command), by_hand, env={"DEBIAN_FRONTEND": "noninteractive"})


@contextmanager
def no_services() -> Iterator[None]:
    """While it lasts, an installed package does not start its service. A policy that stands already is respected."""
    if POLICY.exists():
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()


def server(
    programs: Programs, folder: Path, node: str, ports: Mapping[str, int]
) -> tuple[Process, Callable[[Sequence[str]], str]]:
    """The broker as a process, and what runs `rabbitmqctl` on it.

    Its configuration and plugins are what `rabbitmq.conf` and `enabled_plugins` in the folder say, if they are there.
    """
    folder = folder.resolve()
    env = environment(folder, node, ports, data=programs.data)
    (folder / "home").mkdir(parents=True, exist_ok=True)
    plugins = folder / "enabled_plugins"
    if not plugins.exists():
        plugins.write_text("[].\n")
    (folder / "rabbitmq.conf").touch()
    broker = Process(programs.server, env=env, folder=folder, log=folder / "log" / "rabbitmq.log", stop_s=STOP_S)

    def control(arguments: Sequence[str]) -> str:
        done = subprocess.run(
            [*programs.ctl, *arguments],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CTL_S,
        )
        if done.returncode:
            raise RuntimeError(f"rabbitmqctl {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    return broker, control


def environment(folder: Path, node: str, ports: Mapping[str, int], *, data: str) -> dict[str, str]:
    """Nothing of the caller's environment or of /etc/rabbitmq reaches the broker, and it listens on loopback only."""
    loopback = "-kernel inet_dist_use_interface {127,0,0,1}"
    return {
        "PATH": PATH,
        "LANG": "C.UTF-8",
        "HOME": str(folder / "home"),  # of the Erlang cookie
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(ports["epmd"]),
        "RABBITMQ_NODENAME": node,
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(ports["amqp"]),
        "RABBITMQ_DIST_PORT": str(ports["distribution"]),
        "RABBITMQ_MNESIA_BASE": str(folder / data),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_CONF_ENV_FILE": str(folder / "rabbitmq-env.conf"),
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": loopback,
        "RABBITMQ_CTL_ERL_ARGS": loopback,
    }
