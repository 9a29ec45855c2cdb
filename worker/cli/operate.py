"""The operator's commands: settings, topology, journal, and the doctor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit, urlunsplit

import typer

from schemas.errors import ModelManagerError
from worker.cli.arguments import json_value
from worker.cli.output import Format, Output, pairs, plain, table

if TYPE_CHECKING:
    from pydantic import BaseModel

    from worker.settings import Loaded, Settings
    from worker.transport.topology import Problem

_EXIT_SOME_FAILED = 1
_MASK = "********"

Rack = Annotated[str | None, typer.Option("--rack", help="Whose settings.")]
AmqpUrl = Annotated[str | None, typer.Option("--amqp-url", help="The broker.")]
RegistryPath = Annotated[Path | None, typer.Option("--registry-path", help="Folder of the journal.")]
Form = Annotated[Format, typer.Option("--output", "-o", help="Table, or one JSON document.")]

config = typer.Typer(help="The settings and where they come from.", no_args_is_help=True)
topology = typer.Typer(help="Exchanges and queues on the broker.", no_args_is_help=True)
journal = typer.Typer(help="The journal; a worker may be running.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    app.add_typer(config, name="config")
    app.add_typer(topology, name="topology")
    app.add_typer(journal, name="journal")
    app.command("doctor")(doctor)


def _started(ctx: typer.Context, form: Format = Format.TABLE) -> Output:
    output = ctx.find_root().obj = Output(form)
    return output


def _loaded(
    output: Output, *, rack: str | None = None, amqp_url: str | None = None, registry_path: Path | None = None
) -> Loaded:
    from worker.settings import load_settings

    registry = None if registry_path is None else str(registry_path)
    loaded = load_settings({"rack": rack, "amqp.url": amqp_url, "registry.path": registry})
    for warning in loaded.warnings:
        output.remark(f"warning: {warning}")
    return loaded


# --- config ---


@config.command("show")
def show_config(ctx: typer.Context, rack: Rack = None, output: Form = Format.TABLE) -> None:
    """Print every setting, its value (secrets masked) and where it comes from."""
    out = _started(ctx, output)
    loaded = _loaded(out, rack=rack)
    values = dict(_masked(loaded.settings))
    origins = {key: loaded.origins.get(key, "built-in") for key in values}
    document = {key: {"value": value, "origin": origins[key]} for key, value in values.items()}
    rows = ((key, "" if value is None else json_value(value), origins[key]) for key, value in values.items())
    out.result(document, lambda: table(("KEY", "VALUE", "ORIGIN"), rows))


@config.command("check")
def check_config(ctx: typer.Context, rack: Rack = None) -> None:
    """Check the settings; the exit status is 8 if a worker would refuse them."""
    out = _started(ctx)
    _loaded(out, rack=rack)
    out.result({"success": True}, lambda: ["the settings are usable"])


@config.command("schema")
def config_schema(ctx: typer.Context) -> None:
    """Print the JSON Schema of the settings' files."""
    from worker.settings import Settings

    _started(ctx, Format.JSON).result(Settings.model_json_schema(by_alias=True), tuple)


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


# --- topology ---


@topology.command("provision")
def provision_topology(
    ctx: typer.Context, rack: Rack = None, amqp_url: AmqpUrl = None, output: Form = Format.TABLE
) -> None:
    """Create the exchanges, queues and bindings of a rack that are missing. Doing it again changes nothing."""
    from worker.transport.topology import provision

    _on_broker(_started(ctx, output), provision, rack, amqp_url)


@topology.command("check")
def check_topology(
    ctx: typer.Context, rack: Rack = None, amqp_url: AmqpUrl = None, output: Form = Format.TABLE
) -> None:
    """Tell what is missing or different on the broker, and change nothing. The exit status is then 1."""
    from worker.transport.topology import check

    _on_broker(_started(ctx, output), check, rack, amqp_url)


def _on_broker(
    output: Output, work: Callable[[Any, str], Awaitable[list[Problem]]], rack: str | None, amqp_url: str | None
) -> None:
    loaded = _loaded(output, rack=rack, amqp_url=amqp_url)
    name = loaded.settings.rack
    problems = asyncio.run(_broker_problems(loaded, work))
    document = {"rack": name, "problems": [asdict(problem) for problem in problems]}
    output.result(document, lambda: [plain(problem) for problem in problems] or [f"the topology of {name} is good"])
    if problems:
        raise typer.Exit(_EXIT_SOME_FAILED)


async def _broker_problems(loaded: Loaded, work: Callable[[Any, str], Awaitable[list[Problem]]]) -> list[Problem]:
    from worker.transport.connections import LinkLostError, close_connection, open_connection

    try:
        connection = await open_connection(loaded.amqp_url, "model-manager-cli")
        try:
            return await work(connection, loaded.settings.rack)
        finally:
            await close_connection(connection)
    except LinkLostError as error:
        raise ModelManagerError("ERR_SHUTTING_DOWN", f"The broker: {error}.") from None


# --- journal ---


@journal.command("verify")
def verify_journal(
    ctx: typer.Context, registry_path: RegistryPath = None, rack: Rack = None, output: Form = Format.TABLE
) -> None:
    """Check every byte of the journal. The exit status is 5 if it is damaged."""
    out = _started(ctx, output)
    report = _journal_report(_loaded(out, rack=rack, registry_path=registry_path).settings)
    facts = {name: value for name, value in report.items() if name != "damage"}
    out.result(report, lambda: pairs(facts))
    if report["damage"] is not None:
        raise _damaged(report["damage"])


@journal.command("dump")
def dump_journal(
    ctx: typer.Context,
    registry_path: RegistryPath = None,
    rack: Rack = None,
    after: Annotated[int, typer.Option("--after", min=0, help="Only records beyond this sequence.")] = 0,
) -> None:
    """Print the journal's records, one JSON object a line."""
    from worker.cli.output import json_line
    from worker.journal import JournalDamaged, dump

    folder = _loaded(_started(ctx), rack=rack, registry_path=registry_path).settings.registry.path
    try:
        for entry in dump(folder):
            if entry.sequence > after:
                print(json_line(asdict(entry)))
    except JournalDamaged as error:
        raise ModelManagerError("ERR_CHECKSUM_MISMATCH", str(error), hint="") from None
    except FileNotFoundError:
        raise _no_journal() from None


@journal.command("compact")
def compact_journal(
    ctx: typer.Context, registry_path: RegistryPath = None, rack: Rack = None, output: Form = Format.TABLE
) -> None:
    """Rewrite the journal without the records that nothing needs any more. A worker that runs does it by itself."""
    from worker.journal import JournalDamaged, JournalLocked
    from worker.upkeep.compaction import CompactionFailed, compact_folder

    out = _started(ctx, output)
    folder = _loaded(out, rack=rack, registry_path=registry_path).settings.registry.path
    if not (folder / "MANIFEST").exists():
        raise _no_journal()
    try:
        done = asyncio.run(compact_folder(folder))
    except JournalLocked as locked:
        text = f"The journal is in use: {locked}. The worker that runs compacts it by itself."
        raise ModelManagerError("ERR_CONFLICT", text) from None
    except JournalDamaged as error:
        raise ModelManagerError("ERR_CHECKSUM_MISMATCH", str(error), hint="") from None
    except CompactionFailed as error:
        raise ModelManagerError("ERR_INTERNAL", f"Not compacted, and nothing has changed: {error}.") from None
    facts = {"bytesBefore": done.bytes_before, "bytes": done.bytes, "records": done.records, "seconds": done.seconds}
    out.result({"success": True, **facts}, lambda: pairs(facts))


def _journal_report(settings: Settings) -> dict[str, Any]:
    from worker.journal import JournalDamaged, verify

    try:
        return asdict(verify(settings.registry.path))
    except JournalDamaged as error:
        raise ModelManagerError("ERR_CHECKSUM_MISMATCH", str(error), hint="") from None
    except FileNotFoundError:
        raise _no_journal() from None


def _no_journal() -> ModelManagerError:
    text = "There is no journal in that folder."
    return ModelManagerError("ERR_NOT_FOUND", text, hint="registry.path or --registry-path names the folder")


def _damaged(damage: dict[str, Any]) -> ModelManagerError:
    text = f"The journal is damaged: {damage['path']} at byte {damage['offset']}: {damage['reason']}."
    return ModelManagerError("ERR_CHECKSUM_MISMATCH", text, **damage)


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
    out = _started(ctx, output)
    loaded = _loaded(out, rack=rack, amqp_url=amqp_url, registry_path=registry_path)
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

    problems = asyncio.run(_broker_problems(loaded, check))
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
    report = _journal_report(settings)
    if report["damage"] is not None:
        raise _damaged(report["damage"])
    return f"{report['records']} records up to sequence {report['head']}, epoch {report['epoch']}, all good"
