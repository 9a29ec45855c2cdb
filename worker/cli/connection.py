"""Which worker a client command talks to, and the options every such command has."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schemas.errors import ModelManagerError
from worker.cli.output import Format, Output

if TYPE_CHECKING:
    from worker.client.caller import Caller
    from worker.client.client import ModelManagerClient

DEFAULT_URL = "http://127.0.0.1:8002"
_PANEL = "Which worker, and how to answer"


@dataclass(frozen=True, slots=True)
class Session:
    """What the body of a client command works with."""

    client: ModelManagerClient
    output: Output


@dataclass(frozen=True, slots=True)
class Address:
    """A worker over HTTP (`url`), or a rack behind a broker (`amqp_url` and `rack`)."""

    url: str | None = None
    amqp_url: str | None = None
    rack: str | None = None

    def caller(self, token_file: Path | None) -> Caller:
        if self.url is not None:
            from worker.client.http_caller import HttpCaller

            return HttpCaller(self.url, _token(token_file))
        from worker.client.amqp_caller import AmqpCaller

        assert self.amqp_url is not None and self.rack is not None
        return AmqpCaller(self.amqp_url, self.rack)


def address_of(
    *, url: str | None, amqp_url: str | None, rack: str | None, environment: Mapping[str, str] = os.environ
) -> Address:
    """The worker that flags and environment name; flags win.

    `--url`, or `--amqp-url` with `--rack`; then MODEL_MANAGER_URL; then MODEL_MANAGER_AMQP__URL and MODEL_MANAGER_RACK.
    Half of a broker's address is completed from the settings. If nothing is said, it is the local HTTP service.
    """
    if url is not None and (amqp_url is not None or rack is not None):
        raise ModelManagerError(
            "ERR_INVALID_REQUEST", "--url names one worker; it does not go with --rack, --amqp-url."
        )
    if amqp_url is None and rack is None:
        url = url or environment.get("MODEL_MANAGER_URL")
        if url is None and not environment.keys() & {"MODEL_MANAGER_AMQP__URL", "MODEL_MANAGER_RACK"}:
            url = DEFAULT_URL
    if url is not None:
        return Address(url=url)
    from worker.settings import load_settings

    loaded = load_settings({"rack": rack, "amqp.url": amqp_url}, environment=environment)
    return Address(amqp_url=loaded.amqp_url, rack=loaded.settings.rack)


def _token(token_file: Path | None) -> str | None:
    from worker.settings import read_secret

    named = token_file or os.environ.get("MODEL_MANAGER_TOKEN_FILE")
    return read_secret(Path(named), "--token-file") if named else None


def _option(name: str, *names: str, about: str, **more: Any) -> Any:
    return typer.Option(name, *names, help=about, rich_help_panel=_PANEL, **more)


# The options that `client_command` adds to every command: name, type, default.
_SHARED: tuple[tuple[str, Any, Any], ...] = (
    ("rack", Annotated[str | None, _option("--rack", about="Rack to ask over RabbitMQ [MODEL_MANAGER_RACK].")], None),
    (
        "amqp_url",
        Annotated[str | None, _option("--amqp-url", about="Broker to reach it by [MODEL_MANAGER_AMQP__URL].")],
        None,
    ),
    (
        "url",
        Annotated[
            str | None, _option("--url", about=f"HTTP service to ask instead [MODEL_MANAGER_URL], else {DEFAULT_URL}.")
        ],
        None,
    ),
    (
        "token_file",
        Annotated[Path | None, _option("--token-file", about="File with its bearer token [MODEL_MANAGER_TOKEN_FILE].")],
        None,
    ),
    ("timeout", Annotated[float, _option("--timeout", about="Seconds to wait for each answer.", min=0.1)], 30.0),
    ("output", Annotated[Format, _option("--output", "-o", about="Table, or one JSON document.")], Format.TABLE),
    ("quiet", Annotated[bool, _option("--quiet", about="No progress bars, no remarks.")], False),
)


def client_command(
    group: typer.Typer, name: str
) -> Callable[[Callable[..., Awaitable[None]]], Callable[..., Awaitable[None]]]:
    """Make a command of an async function whose first parameter is the `Session`.

    The options of `_SHARED` are added to its own parameters; its own docstring is the help.
    """

    def decorate(body: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        own = list(inspect.signature(body, eval_str=True).parameters.values())[1:]
        added = [
            inspect.Parameter(shared, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
            for shared, annotation, default in _SHARED
        ]

        def command(ctx: typer.Context, **given: Any) -> None:
            common = {shared: given.pop(shared) for shared, _, _ in _SHARED}
            output = ctx.find_root().obj = Output(common["output"], quiet=common["quiet"])
            asyncio.run(_run(body, given, common, output))

        context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        parameters = [context, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own), *added]
        # Typer reads both; the names in them are resolved here, where they can be.
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__doc__ = body.__doc__
        group.command(name)(command)
        return body

    return decorate


async def _run(
    body: Callable[..., Awaitable[None]], given: Mapping[str, Any], common: Mapping[str, Any], output: Output
) -> None:
    from worker.client.client import ModelManagerClient

    address = address_of(url=common["url"], amqp_url=common["amqp_url"], rack=common["rack"])
    caller = address.caller(common["token_file"])
    async with ModelManagerClient(caller, timeout_s=common["timeout"]) as client:
        await body(Session(client, output), **given)
