"""What an operator's command begins with: its output, and the settings it works on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
