"""The commands on the topology: make what is missing, and tell whether it is good."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schemas.errors import ModelManagerError
from worker.cli.definitions import print_definitions
from worker.cli.loading import AmqpUrl, Form, Rack, broker_failures, loaded_settings, started
from worker.cli.output import Format, Output, plain

if TYPE_CHECKING:
    from worker.settings import Loaded
    from worker.transport.topology import Problem

_EXIT_BAD = 1
_PERMISSIONS = "who may call what: name the broker's management with --management-url"
_PROBE = "the way of dead letters: leave out --no-probe"

topology = typer.Typer(help="Exchanges and queues on the broker.", no_args_is_help=True)

ManagementUrl = Annotated[
    str | None,
    typer.Option("--management-url", help="The broker's management; its login, else the broker's, an administrator's."),
]


def add_to(app: typer.Typer) -> None:
    app.add_typer(topology, name="topology")
    topology.command("definitions")(print_definitions)


@topology.command("provision")
def provision_topology(
    ctx: typer.Context, rack: Rack = None, amqp_url: AmqpUrl = None, output: Form = Format.TABLE
) -> None:
    """Create the exchanges, queues and bindings of a rack that are missing. Doing it again changes nothing."""
    from worker.transport.topology import provision

    out = started(ctx, output)
    loaded = loaded_settings(out, rack=rack, amqp_url=amqp_url)
    _tell(out, loaded, asyncio.run(on_broker(loaded, provision)))


@topology.command("check")
def check_topology(
    ctx: typer.Context,
    rack: Rack = None,
    amqp_url: AmqpUrl = None,
    management_url: ManagementUrl = None,
    probe: Annotated[bool, typer.Option(help="Send a probe the way of dead letters.")] = True,
    output: Form = Format.TABLE,
) -> None:
    """Tell what is missing, different or open to the wrong users on the broker. The exit status is then 1.

    A probe expires in a queue of its own, and is taken from the rack's dead letters. Nothing is changed.
    """
    from worker.transport.permissions import unmeant_callers
    from worker.transport.topology import Problem, check

    out = started(ctx, output)
    loaded = loaded_settings(out, rack=rack, amqp_url=amqp_url)
    problems = asyncio.run(on_broker(loaded, check))
    unchecked = []
    if not probe:
        unchecked.append(_PROBE)
    elif not any(problem.kind == "missing" for problem in problems):
        problems += asyncio.run(_probed(loaded))
    if management_url is None:
        unchecked.append(_PERMISSIONS)
    else:
        try:
            problems += unmeant_callers(loaded.amqp_url, management_url)
        except ModelManagerError as error:
            problems.append(Problem("unverified", "who may call what", error.message))
    _tell(out, loaded, problems, unchecked)


def _tell(out: Output, loaded: Loaded, problems: list[Problem], unchecked: Sequence[str] = ()) -> None:
    name = loaded.settings.rack
    good = f"the topology of {name} is good" + (", as far as it was checked" if unchecked else "")
    document = {
        "success": not problems,
        "rack": name,
        "problems": [asdict(problem) for problem in problems],
        "unchecked": list(unchecked),
    }
    out.result(document, lambda: [plain(problem) for problem in problems] or [good])
    for what in unchecked:
        out.remark(f"NOT CHECKED: {what}")
    if problems:
        raise typer.Exit(_EXIT_BAD)


async def on_broker(loaded: Loaded, work: Callable[[Any, str], Awaitable[list[Problem]]]) -> list[Problem]:
    """What `work` finds wrong with the rack on a connection of its own."""
    from worker.transport.connections import close_connection, open_connection

    with broker_failures():
        connection = await open_connection(loaded.amqp_url, "model-manager-cli")
        try:
            return await work(connection, loaded.settings.rack)
        finally:
            await close_connection(connection)


async def _probed(loaded: Loaded) -> list[Problem]:
    from worker.transport.dead_letter_probe import probe

    with broker_failures():
        problem = await probe(loaded.amqp_url, loaded.settings.rack)
    return [] if problem is None else [problem]
