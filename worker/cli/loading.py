"""What an operator's command begins with: its output, the settings it works on, and a yes to what destroys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from schemas.errors import ModelManagerError
from worker.cli.asking import ask
from worker.cli.output import Format, Output

if TYPE_CHECKING:
    from worker.settings import Loaded

Rack = Annotated[str | None, typer.Option("--rack", help="Whose settings.")]
AmqpUrl = Annotated[str | None, typer.Option("--amqp-url", help="The broker.")]
RegistryPath = Annotated[Path | None, typer.Option("--registry-path", help="Folder of the journal.")]
Form = Annotated[Format, typer.Option("--output", "-o", help="Table, or one JSON document.")]


def started(ctx: typer.Context, form: Format = Format.TABLE) -> Output:
    output = ctx.find_root().obj = Output(form)
    return output


def loaded_settings(
    output: Output, *, rack: str | None = None, amqp_url: str | None = None, registry_path: Path | None = None
) -> Loaded:
    from worker.settings import load_settings

    registry = None if registry_path is None else str(registry_path)
    loaded = load_settings({"rack": rack, "amqp.url": amqp_url, "registry.path": registry})
    for warning in loaded.warnings:
        output.remark(f"warning: {warning}")
    return loaded


@contextmanager
def broker_failures() -> Iterator[None]:
    """Tell of a broker that cannot be reached, or is lost, as ERR_SHUTTING_DOWN."""
    from worker.transport.connections import LinkLostError

    try:
        yield
    except LinkLostError as error:
        reason = str(error)
        raise ModelManagerError("ERR_SHUTTING_DOWN", f"{reason[0].upper()}{reason[1:]}.") from None


def confirm(what: str, yes: bool) -> None:
    """Return if it was said with `--yes`, or is said now; ERR_INVALID_REQUEST otherwise."""
    ask(f"{what[0].upper()}{what[1:]}?", otherwise=f"This would {what}.", yes=yes)
