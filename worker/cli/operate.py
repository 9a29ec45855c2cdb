"""The operator's commands: settings, and the doctor."""

from __future__ import annotations

import asyncio
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit, urlunsplit

import typer

from schemas.errors import ModelManagerError
from worker.cli.arguments import json_value
from worker.cli.journal import damaged, journal_report
from worker.cli.loading import AmqpUrl, Form, Rack, RegistryPath, loaded_settings, started
from worker.cli.output import Format, table
from worker.cli.topology import on_broker
from worker.http_address import flaw_of

if TYPE_CHECKING:
    from pydantic import BaseModel

    from worker.settings import HttpSettings, Loaded, Settings

_EXIT_SOME_FAILED = 1
_MASK = "********"
_PROBE_TIMEOUT_S = 4.0

config = typer.Typer(help="The settings and where they come from.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    app.add_typer(config, name="config")
    app.command("doctor")(doctor)
    app.command("probe")(probe)


# --- config ---


@config.command("show")
def show_config(ctx: typer.Context, rack: Rack = None, output: Form = Format.TABLE) -> None:
    """Print every setting, its value (secrets masked) and where it comes from."""
    out = started(ctx, output)
    loaded = loaded_settings(out, rack=rack)
    values = dict(_masked(loaded.settings))
    origins = {key: loaded.origins.get(key, "built-in") for key in values}
    if loaded.settings.amqp.url_file is not None:
        values["amqp.url"], origins["amqp.url"] = _mask(loaded.amqp_url), "amqp.urlFile"
    document = {key: {"value": value, "origin": origins[key]} for key, value in values.items()}
    rows = ((key, "" if value is None else json_value(value), origins[key]) for key, value in values.items())
    out.result(document, lambda: table(("KEY", "VALUE", "ORIGIN"), rows))


@config.command("check")
def check_config(ctx: typer.Context, rack: Rack = None) -> None:
    """Check the settings; the exit status is 8 if a worker would refuse them."""
    out = started(ctx)
    loaded_settings(out, rack=rack)
    out.result({"success": True}, lambda: ["the settings are usable"])


@config.command("schema")
def config_schema(ctx: typer.Context) -> None:
    """Print the JSON Schema of the settings' files."""
    from worker.settings import Settings

    started(ctx, Format.JSON).result(Settings.model_json_schema(by_alias=True), tuple)


def _masked(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its key path, as a JSON value."""
    from pydantic import BaseModel, SecretStr

    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), prefix + (field.alias or name)
        if isinstance(value, BaseModel):
            yield from _masked(value, key + ".")
        elif isinstance(value, SecretStr):
            yield key, _mask(value.get_secret_value())
        elif isinstance(value, Path):
            yield key, str(value)
        else:
            yield key, list(value) if isinstance(value, tuple) else value


def _mask(secret: str) -> str:
    """An address without its password; of any other secret nothing."""
    parts = urlsplit(secret)
    if not parts.hostname:
        return _MASK
    login, at, host = parts.netloc.rpartition("@")
    login = f"{login.partition(':')[0]}:{_MASK}" if ":" in login else login
    return urlunsplit((parts.scheme, f"{login}{at}{host}", parts.path, "", ""))


# --- doctor ---


@dataclass(frozen=True, slots=True)
class _Finding:
    """One line of the doctor."""

    name: str
    good: bool
    text: str
    seconds: float


def doctor(
    ctx: typer.Context,
    rack: Rack = None,
    amqp_url: AmqpUrl = None,
    registry_path: RegistryPath = None,
    output: Form = Format.TABLE,
) -> None:
    """Check broker and topology, storage, and journal: a line each. The exit status is 1 if one is bad."""
    out = started(ctx, output)
    loaded = loaded_settings(out, rack=rack, amqp_url=amqp_url, registry_path=registry_path)
    findings = [
        _examined("broker", lambda: _examine_broker(loaded)),
        _examined("storage", lambda: asyncio.run(_examine_storage(loaded.settings))),
        _examined("journal", lambda: _examine_journal(loaded.settings)),
    ]
    document = {"success": all(finding.good for finding in findings), "checks": [asdict(each) for each in findings]}
    rows: Iterable[tuple[str, str, str]] = [(each.name, "ok" if each.good else "BAD", each.text) for each in findings]
    out.result(document, lambda: table(("PART", "RESULT", "WHAT"), rows))
    if not document["success"]:
        raise typer.Exit(_EXIT_SOME_FAILED)


def _examined(name: str, examine: Callable[[], str]) -> _Finding:
    """The outcome of one examination; what it raises is its finding."""
    started = time.monotonic()
    try:
        text, good = examine(), True
    except ModelManagerError as error:
        text, good = error.message, False
    except OSError as error:
        text, good = error.strerror or str(error), False
    return _Finding(name, good, text, round(time.monotonic() - started, 3))


def _examine_broker(loaded: Loaded) -> str:
    from worker.transport.topology import check

    problems = asyncio.run(on_broker(loaded, check))
    if problems:
        raise ModelManagerError("ERR_NOT_FOUND", "; ".join(str(problem) for problem in problems))
    return f"reachable, and the topology of {loaded.settings.rack} is good"


async def _examine_storage(settings: Settings) -> str:
    from worker.build import build_store

    store = build_store(settings)
    try:
        await store.probe()
    finally:
        await store.close()
    return f"{store.backend} answers"


def _examine_journal(settings: Settings) -> str:
    report = journal_report(settings)
    if report["damage"] is not None:
        raise damaged(report["damage"])
    return f"{report['records']} records up to sequence {report['head']}, epoch {report['epoch']}, all good"


# --- probe ---


def probe(
    ctx: typer.Context,
    url: Annotated[str | None, typer.Option("--url", help="The worker's HTTP; else the one on this machine.")] = None,
    ready: Annotated[bool, typer.Option("--ready", help="Whether requests should be sent to it.")] = False,
) -> None:
    """Ask a worker whether it lives: for the health checks of containers. The exit status is 7 if it does not."""
    out = started(ctx)
    base = url or _own_address(loaded_settings(out).settings.http)
    if (flaw := flaw_of(base)) is not None:
        raise ModelManagerError("ERR_INVALID_REQUEST", f"The address {flaw}.")
    path = "/readyz" if ready else "/livez"
    # A proxy of the environment is for what is outside.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{base.rstrip('/')}{path}", timeout=_PROBE_TIMEOUT_S) as answer:
            body = answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        raise ModelManagerError("ERR_STORAGE_UNAVAILABLE", f"{path} says {error.code}.", hint="") from None
    except (OSError, HTTPException) as error:
        raise ModelManagerError("ERR_STORAGE_UNAVAILABLE", f"Nobody answers: {error}.", hint="") from None
    out.result({"success": True}, lambda: [body.strip()])


def _own_address(http: HttpSettings) -> str:
    """Where the worker of this machine listens; on all addresses, that is also on loopback."""
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(http.host, http.host)
    return f"http://[{host}]:{http.port}" if ":" in host else f"http://{host}:{http.port}"
