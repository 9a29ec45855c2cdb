"""`topology definitions`: what a broker is to be loaded with, and the passwords that go into it."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from schemas.errors import ModelManagerError
from worker.cli.loading import started
from worker.cli.output import Format

Racks = Annotated[list[str], typer.Option("--rack", help="A rack to set up; say it again for each other one.")]
Vhost = Annotated[str | None, typer.Option("--vhost", help="The vhost for it all [model-manager].")]
Passwords = Annotated[
    Path | None, typer.Option("--passwords", help="Folder with a file for each user that logs in by password.")
]


def print_definitions(ctx: typer.Context, rack: Racks, vhost: Vhost = None, passwords: Passwords = None) -> None:
    """Print RabbitMQ's definitions: the topology, a user for each role, their permissions.

    Without --passwords no user can log in by password. With it the output holds hashes of them: keep it to yourself.
    """
    from worker.transport.definitions import VHOST, definitions
    from worker.transport.roles import users

    output = started(ctx, Format.JSON)
    racks = _checked(rack)
    given = {} if passwords is None else _read(passwords, {user.name for user in users(racks)})
    output.result(definitions(racks, vhost=vhost or VHOST, passwords=given), tuple)


def _checked(racks: list[str]) -> list[str]:
    from schemas.ids import RACK_PATTERN

    for rack in racks:
        if not re.fullmatch(RACK_PATTERN, rack):
            raise ModelManagerError("ERR_INVALID_REQUEST", f"{rack!r} is no name of a rack.")
    return list(dict.fromkeys(racks))


def _read(folder: Path, names: Collection[str]) -> dict[str, str]:
    """The passwords by user. A file for nobody is a mistake; the dot files of mounted secrets are not."""
    from worker.settings import read_secret

    files = {path.name: path for path in sorted(folder.iterdir()) if not path.name.startswith(".")}
    unknown = sorted(files.keys() - names)
    if unknown:
        raise ModelManagerError(
            "ERR_INVALID_REQUEST", f"{', '.join(unknown)}: no such user.", hint=f"there are {', '.join(sorted(names))}"
        )
    return {name: read_secret(path, "--passwords") for name, path in files.items()}
