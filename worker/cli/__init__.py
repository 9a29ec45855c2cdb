"""The command line, `model-manager`: two services, the client's commands, and the operator's."""

from __future__ import annotations

import errno
import logging
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from schemas.errors import EXIT_CONFIG_INVALID, EXIT_INTERRUPTED, ModelManagerError
from worker.cli import dead, journal, models, operate, recovery, services, topology
from worker.cli.output import Output


class _CommandLine(TyperGroup):
    """Turns every failure into its line on stderr and its exit status: the only place that does."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ModelManagerError as error:
            _output(ctx).error(error)
            raise typer.Exit(error.kind.exit_code) from error
        except KeyboardInterrupt as interrupt:
            _output(ctx).remark("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from interrupt
        except BrokenPipeError:
            raise  # whoever read our output has gone; typer ends quietly
        except OSError as error:
            code = "ERR_STORAGE_FULL" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "ERR_INVALID_REQUEST"
            failure = ModelManagerError(code, f"{error.filename or 'a file'}: {error.strerror or error}")
            _output(ctx).error(failure)
            raise typer.Exit(failure.kind.exit_code) from error
        except Exception as error:
            problems = _settings_problems(error)
            if problems is None:
                raise
            _output(ctx).unusable(problems)
            raise typer.Exit(EXIT_CONFIG_INVALID) from error


def _output(ctx: Any) -> Output:
    output = ctx.find_root().obj
    return output if isinstance(output, Output) else Output()


def _settings_problems(error: Exception) -> list[str] | None:
    from worker.settings import SettingsError

    return error.problems if isinstance(error, SettingsError) else None


app = typer.Typer(
    name="model-manager",
    cls=_CommandLine,
    help="A rack's AI-model catalog: run it, use it, look after it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
services.add_to(app)
models.add_to(app)
operate.add_to(app)
topology.add_to(app)
dead.add_to(app)
journal.add_to(app)
recovery.add_to(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        from worker import __version__

        typer.echo(f"model-manager {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None: ...


def main() -> None:
    """The entry of the console script."""
    # Without a handler, the warnings of libraries would end up among our lines on stderr.
    logging.getLogger().addHandler(logging.NullHandler())
    app()
