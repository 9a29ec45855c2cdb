"""The journal's commands."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schemas.errors import ModelManagerError
from worker.cli.asking import ask
from worker.cli.loading import Form, Rack, RegistryPath, loaded_settings, started
from worker.cli.output import Format, Output, pairs, plain, size_text

if TYPE_CHECKING:
    from worker.journal.repair import RepairReport
    from worker.settings import Settings

journal = typer.Typer(help="The journal; a worker may be running.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    app.add_typer(journal, name="journal")


@journal.command("verify")
def verify_journal(
    ctx: typer.Context, registry_path: RegistryPath = None, rack: Rack = None, output: Form = Format.TABLE
) -> None:
    """Check every byte of the journal. The exit status is 5 if it is damaged."""
    out = started(ctx, output)
    report = journal_report(loaded_settings(out, rack=rack, registry_path=registry_path).settings)
    facts = {name: value for name, value in report.items() if name != "damage"}
    out.result(report, lambda: pairs(facts))
    if report["damage"] is not None:
        raise damaged(report["damage"])


@journal.command("dump")
def dump_journal(
    ctx: typer.Context,
    registry_path: RegistryPath = None,
    rack: Rack = None,
    after: Annotated[int, typer.Option("--after", min=0, help="Only records beyond this sequence.")] = 0,
) -> None:
    """Print the journal's records, one JSON object a line."""
    from msgspec import structs

    from worker.cli.output import json_line
    from worker.journal import dump

    folder = loaded_settings(started(ctx), rack=rack, registry_path=registry_path).settings.registry.path
    with refusals():
        for entry in dump(folder):
            if entry.sequence > after:
                print(json_line(structs.asdict(entry)))


@journal.command("compact")
def compact_journal(
    ctx: typer.Context, registry_path: RegistryPath = None, rack: Rack = None, output: Form = Format.TABLE
) -> None:
    """Rewrite the journal without the records that nothing needs any more. A worker that runs does it by itself."""
    from worker.upkeep.compaction import CompactionFailed, NothingToCompact, compact_folder

    out = started(ctx, output)
    folder = loaded_settings(out, rack=rack, registry_path=registry_path).settings.registry.path
    if not (folder / "MANIFEST").exists():
        raise _no_journal()
    try:
        with refusals(in_use="The worker that runs compacts it by itself."):
            done = asyncio.run(compact_folder(folder))
    except NothingToCompact:
        unchanged = {"success": True, "bytesBefore": 0, "bytes": 0, "records": 0, "seconds": 0}
        out.result(unchanged, lambda: ["there is nothing to compact yet"])
        return
    except CompactionFailed as error:
        raise ModelManagerError("ERR_INTERNAL", f"Not compacted, and nothing has changed: {error}.") from None
    facts = {"bytesBefore": done.bytes_before, "bytes": done.bytes, "records": done.records, "seconds": done.seconds}
    out.result({"success": True, **facts}, lambda: pairs(facts))


@journal.command("stats")
def show_stats(
    ctx: typer.Context, registry_path: RegistryPath = None, rack: Rack = None, output: Form = Format.TABLE
) -> None:
    """Tell what the journal is made of, from its first and last lines; nothing is read through."""
    from schemas.wire import timestamp
    from worker.journal.overview import overview

    out = started(ctx, output)
    with refusals():
        found = overview(loaded_settings(out, rack=rack, registry_path=registry_path).settings.registry.path)
    written = None if found.written_ms is None else timestamp(found.written_ms)
    facts = {
        "registryId": found.registry_id,
        "epoch": found.epoch,
        "generation": found.generation,
        "head": found.head,
        "changesFrom": found.changes_from,
        "lastWritten": written,
        "inUse": found.owned,
    }
    document = {
        **facts,
        "base": asdict(found.base),
        "segments": asdict(found.segments),
        "compactableBytes": found.compactable_bytes,
    }

    def lines() -> Iterator[str]:
        parts = {"base": found.base, "segments": found.segments}
        texts = {name: f"{part.count} with {size_text(part.bytes)}, {part.lines} lines" for name, part in parts.items()}
        shown = {**facts, "lastWritten": written or "never", "inUse": "yes" if found.owned else "no"}
        return pairs({**shown, **texts, "compactable": size_text(found.compactable_bytes)})

    out.result(document, lines)


@journal.command("backup")
def backup_journal(
    ctx: typer.Context,
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="A folder that is not there yet.")],
    registry_path: RegistryPath = None,
    rack: Rack = None,
    output: Form = Format.TABLE,
) -> None:
    """Copy the journal to a new folder, verified; a worker may be running. DEST is complete, or not there."""
    from worker.journal.backup import backup

    out = started(ctx, output)
    folder = loaded_settings(out, rack=rack, registry_path=registry_path).settings.registry.path
    with refusals(in_use="Another backup goes to the same place."), out.progress() as report:
        done = backup(folder, destination.absolute(), progress=partial(report, "copied"))
    facts = {
        "registryId": done.registry_id,
        "epoch": done.epoch,
        "generation": done.generation,
        "files": done.files,
        "records": done.records,
        "bytes": done.bytes,
        "head": done.head,
        "leftOutBytes": done.left_out_bytes,
    }
    out.result({"success": True, **facts}, lambda: pairs(facts))


@journal.command("repair")
def repair_journal(
    ctx: typer.Context,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Go on without what is damaged, in a new epoch.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    registry_path: RegistryPath = None,
    rack: Rack = None,
    output: Form = Format.TABLE,
) -> None:
    """List what a damaged journal has lost; with --accept-loss make a journal of the rest.

    No worker may be running. Without --accept-loss nothing is changed, and the exit status is 5 if there is damage.
    """
    from worker.journal.repair import JournalBeyondRepair, repair

    out = started(ctx, output)
    folder = loaded_settings(out, rack=rack, registry_path=registry_path).settings.registry.path
    try:
        with refusals(in_use="Stop the worker first."):
            report = repair(folder, accept_loss=False)
            if accept_loss and report.damage is not None:
                _confirm(out, report, yes=yes)
                report = repair(folder, accept_loss=True)
    except JournalBeyondRepair as error:
        text = f"The journal cannot be repaired: {error}. Nothing was changed."
        hint = "put back a backup, or rebuild from the archive"
        raise ModelManagerError("ERR_CHECKSUM_MISMATCH", text, hint=hint) from None
    out.result(_repair_document(report), lambda: _repair_lines(report))
    if report.damage is not None and not report.repaired:
        raise damaged(asdict(report.damage))


def _confirm(out: Output, report: RepairReport, *, yes: bool) -> None:
    if not yes and sys.stdin.isatty():
        for line in _repair_lines(report):
            out.remark(line)
    what = f"This gives up {_lost_text(report)}, and the worker then removes the bytes of models that only those name."
    ask(f"{what} Go on?", otherwise=what, yes=yes)


def _repair_document(report: RepairReport) -> dict[str, Any]:
    return {
        "success": report.damage is None or report.repaired,
        "registryId": report.registry_id,
        "epoch": report.epoch,
        "head": report.head,
        "records": report.records,
        "damage": None if report.damage is None else asdict(report.damage),
        "stretches": [asdict(stretch) for stretch in report.stretches],
        "lost": [asdict(lost) for lost in report.lost],
        "repaired": report.repaired,
        "kept": report.kept,
    }


def _repair_lines(report: RepairReport) -> Iterator[str]:
    if report.damage is None:
        yield "the journal is sound; nothing was changed"
        return
    for stretch in report.stretches:
        what = f"{stretch.bytes} bytes do not check" if stretch.bytes else "lines are missing"
        yield plain(f"{stretch.path} at byte {stretch.offset}: {what}")
    for lost in report.lost:
        yield f"lost: sequence {lost.first}" + (f" to {lost.last}" if lost.last > lost.first else "")
    yield f"{_lost_text(report)} lost, {report.records} records still check"
    if report.kept is not None:
        yield f"repaired: epoch {report.epoch}; the files as they were are in {report.kept}"


def _lost_text(report: RepairReport) -> str:
    count = sum(lost.last - lost.first + 1 for lost in report.lost)
    return f"at most {count} records" if count else "no record"


def journal_report(settings: Settings) -> dict[str, Any]:
    """What `verify` finds. Raises ModelManagerError if that cannot even begin."""
    from worker.journal import verify

    with refusals():
        return asdict(verify(settings.registry.path))


def damaged(damage: dict[str, Any]) -> ModelManagerError:
    text = f"The journal is damaged: {damage['path']} at byte {damage['offset']}: {damage['reason']}."
    return ModelManagerError("ERR_CHECKSUM_MISMATCH", text, **damage)


@contextmanager
def refusals(*, in_use: str = "") -> Iterator[None]:
    """What a journal refuses with, as errors of the command line; `in_use` says what to do about a worker that runs."""
    from worker.journal import JournalDamaged, JournalLocked
    from worker.journal.files import SyncFailed

    try:
        yield
    except JournalLocked as locked:
        raise ModelManagerError("ERR_CONFLICT", f"The journal is in use: {locked}. {in_use}".strip()) from None
    except JournalDamaged as error:
        raise ModelManagerError("ERR_CHECKSUM_MISMATCH", str(error), hint="") from None
    except SyncFailed as error:
        text = f"An fsync failed, so it is not known what the disk holds: {error}."
        raise ModelManagerError("ERR_STORAGE_UNAVAILABLE", text, hint="") from None
    except FileNotFoundError:
        raise _no_journal() from None


def _no_journal() -> ModelManagerError:
    text = "There is no journal in that folder."
    return ModelManagerError("ERR_NOT_FOUND", text, hint="registry.path or --registry-path names the folder")
