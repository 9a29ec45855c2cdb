"""What a service keeps in its folder to be the same one the next time: ports, names, credentials."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Mapping
from pathlib import Path

# Below the range that the kernel hands to outgoing connections: such a port cannot be lost to one of them
# between the death of a server and its next start.
PORTS = range(20_000, 32_000)


def recall(file: Path, fresh: Mapping[str, str]) -> dict[str, str]:
    """The values kept in `file`, completed and written back with those of `fresh` that it lacks."""
    kept: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    values = {name: kept.get(name, value) for name, value in fresh.items()}
    if values != kept:
        keep(file, json.dumps(values, indent=1) + "\n")
    return values


def recall_ports(file: Path, *names: str) -> dict[str, int]:
    """One loopback port for each name: those of the last time if all are free now, else new ones."""
    kept: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}
    if set(kept) == set(names) and all(is_free(port) for port in kept.values()):
        return kept
    free = (port for port in random.sample(PORTS, len(PORTS)) if is_free(port))
    ports = {name: next(free) for name in names}
    keep(file, json.dumps(ports, indent=1) + "\n")
    return ports


def keep(file: Path, text: str) -> None:
    """Replaces the file as a whole, so that a full disk or an end in between leaves what was there. Readable by the
    owner only."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    new.unlink(missing_ok=True)
    new.touch(mode=0o600)
    new.write_text(text)
    new.replace(file)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do it: a connection in TIME_WAIT does not make a port taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
