"""A fresh broker of a test's own that knows nobody but the users of the definitions, with passwords made up here."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from deploy.local import RabbitMQ
from tests.certificates import Authority
from tests.process import free_port
from worker.transport.definitions import VHOST
from worker.transport.roles import users

SHIPPED = Path(__file__).parents[1] / "deploy/rabbitmq"
RACKS = ("rack-1", "rack-2")


@dataclass(frozen=True)
class SecuredBroker:
    """`passwords` are by user; `definitions` is the file that is loaded, with their hashes."""

    server: RabbitMQ
    definitions: Path
    passwords: dict[str, str]
    tls_port: int = 0

    def url(self, user: str, password: str | None = None) -> str:
        parts = urlsplit(self.server.url)
        secret = self.passwords[user] if password is None else password
        return f"amqp://{user}:{secret}@{parts.hostname}:{parts.port}/{VHOST}"

    def tls_url(self, login: str, host: str = "127.0.0.1") -> str:
        return f"amqps://{login}@{host}:{self.tls_port}/{VHOST}"


def secured_broker(
    folder: Path, start: Callable[[Path], RabbitMQ], *, authority: Authority | None = None
) -> SecuredBroker:
    """As it is deployed: the shipped configuration, and definitions made by the command.

    With an authority it listens with TLS too, and asks for certificates of that authority.
    """
    passwords = {user.name: secrets.token_hex(12) for user in users(RACKS)}
    (folder / "passwords").mkdir()
    for name, password in passwords.items():
        (folder / "passwords" / name).touch(0o600)
        (folder / "passwords" / name).write_text(password + "\n")
    loaded = folder / "definitions.json"
    named = [word for rack in RACKS for word in ("--rack", rack)]
    loaded.write_text(run_topology("definitions", *named, "--passwords", str(folder / "passwords")))
    shipped = (SHIPPED / "rabbitmq.conf").read_text()
    assert shipped.count("/etc/rabbitmq/definitions.json") == 1
    shipped = shipped.replace("/etc/rabbitmq/definitions.json", str(loaded))
    port = free_port()
    if authority is not None:
        shipped += _tls(authority, port)
        (folder / "enabled_plugins").write_text("[rabbitmq_auth_mechanism_ssl].\n")
    (folder / "rabbitmq.conf").write_text(shipped)
    return SecuredBroker(start(folder), loaded, passwords, port)


def _tls(authority: Authority, port: int) -> str:
    """The shipped configuration of TLS, on our port and beside plain TCP, with a certificate of our authority."""
    broker = authority.issue("/CN=broker", "broker", "subjectAltName=IP:127.0.0.1")
    text = (SHIPPED / "tls.conf").read_text()
    for shipped, ours in {
        "listeners.tcp = none\n": "",
        "listeners.ssl.default = 5671": f"listeners.ssl.1 = 127.0.0.1:{port}",
        "/etc/rabbitmq/tls/ca.pem": str(authority.certificate),
        "/etc/rabbitmq/tls/broker.pem": str(broker.certificate),
        "/etc/rabbitmq/tls/broker.key": str(broker.key),
    }.items():
        assert text.count(shipped) == 1, shipped
        text = text.replace(shipped, ours)
    return text


def run_topology(*words: str, status: int = 0) -> str:
    """What `model-manager topology ...` prints."""
    command = [sys.executable, "-m", "worker", "topology", *words]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == status, ran.stderr
    return ran.stdout
