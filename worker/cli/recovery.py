"""The commands that bring a registry back: from its archive, or from a backup."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schemas.errors import ModelManagerError
from schemas.wire import timestamp
from worker.cli.journal import journal, refusals
from worker.cli.loading import Form, Rack, RegistryPath, confirm, loaded_settings, started
from worker.cli.models import Yes
from worker.cli.output import Format, pairs

if TYPE_CHECKING:
    from worker.client.progress import Report
    from worker.journal import Reconstructed, Until
    from worker.settings import Settings
    from worker.upkeep.rebuild import Rebuilt

ToSequence = Annotated[int | None, typer.Option("--to-sequence", min=1, help="Stop behind this record.")]
ToTime = Annotated[
    str | None,
    typer.Option("--to-time", metavar="TIME", help="Stop behind what was written by then: 2026-11-24T10:00:00Z."),
]


def add_to(app: typer.Typer) -> None:
    app.command("rebuild")(rebuild_registry)


def rebuild_registry(
    ctx: typer.Context,
    registry_path: RegistryPath = None,
    rack: Rack = None,
    to_sequence: ToSequence = None,
    to_time: ToTime = None,
    epoch: Annotated[int | None, typer.Option("--epoch", min=1, help="Whose archive; else the newest one.")] = None,
    patience: Annotated[
        float, typer.Option("--patience", min=0, help="Seconds an owner that lives gets to stop.")
    ] = 10,
    yes: Yes = False,
    output: Form = Format.TABLE,
) -> None:
    """Make the registry anew from its archive in the rack's storage, in a new epoch.

    A worker that still runs on the old registry stops by itself, and can never be started on it again.
    """
    out = started(ctx, output)
    settings = loaded_settings(out, rack=rack, registry_path=registry_path).settings
    until = _until(to_sequence, to_time)
    confirm(f"rebuild the registry of {settings.rack}; its present owner, if there is one, stops", yes)
    with refusals(in_use="Stop the worker that runs on it first."), _recovery_refusals(), out.progress() as progress:
        done = asyncio.run(_rebuild(settings, until, epoch, patience, progress))
    out.result({"success": True, **_rebuilt_document(done)}, lambda: pairs(_rebuilt_document(done)))
    if done.closed is None:
        out.remark("note: what was acknowledged later, and not archived, is not known; the archive's lag was its bound")
    if done.missing_versions:
        out.remark("note: versions without their bytes are looked into, and quarantined, when the worker starts")


async def _rebuild(settings: Settings, until: Until, epoch: int | None, patience_s: float, progress: Report) -> Rebuilt:
    from worker.build import build_store
    from worker.upkeep.rebuild import rebuild

    store = build_store(settings)
    try:
        await store.probe()
        return await rebuild(
            store,
            settings.registry.path,
            rack=settings.rack,
            until=until,
            epoch=epoch,
            patience_s=patience_s,
            progress=progress,
        )
    finally:
        await store.close()


@journal.command("restore")
def restore_journal(
    ctx: typer.Context,
    source: Annotated[Path, typer.Argument(help="Folder that `journal backup` made.")],
    registry_path: RegistryPath = None,
    rack: Rack = None,
    to_sequence: ToSequence = None,
    to_time: ToTime = None,
    yes: Yes = False,
    output: Form = Format.TABLE,
) -> None:
    """Put the registry back from a backup, in a new epoch. What was acknowledged after the backup is lost.

    `model-manager rebuild` loses less, if the rack's storage has the archive.
    """
    out = started(ctx, output)
    settings = loaded_settings(out, rack=rack, registry_path=registry_path).settings
    until = _until(to_sequence, to_time)
    confirm(f"restore the registry of {settings.rack} from {source.name}", yes)
    with refusals(in_use="Stop the worker that runs on it first."), _recovery_refusals(), out.progress() as progress:
        done = _restore(settings, source, until, progress)
    out.result({"success": True, **_document(done)}, lambda: pairs(_document(done)))
    out.remark("note: what was acknowledged after `until` is lost")


def _restore(settings: Settings, source: Path, until: Until, progress: Report) -> Reconstructed:
    from worker.build import build_store
    from worker.upkeep.restore import next_epoch, restore

    async def epoch() -> int:
        store = build_store(settings)
        try:
            return await next_epoch(store, source)
        finally:
            await store.close()

    return restore(source, settings.registry.path, epoch=asyncio.run(epoch()), until=until, progress=progress)


def _until(sequence: int | None, time: str | None) -> Until:
    from worker.journal import Until

    return Until(sequence, None if time is None else _unix_ms(time))


def _unix_ms(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise ModelManagerError("ERR_INVALID_REQUEST", f"--to-time {text}: must be like 2026-11-24T10:00:00Z.")
    return int(moment.timestamp() * 1000)


@contextmanager
def _recovery_refusals() -> Iterator[None]:
    from worker.journal import FolderTaken, PointUnreachable
    from worker.upkeep.ownership import NotOwner
    from worker.upkeep.rebuild import CannotRebuild

    try:
        yield
    except PointUnreachable as error:
        raise ModelManagerError("ERR_INVALID_REQUEST", f"It does not go back so far: {error}.") from None
    except (FolderTaken, NotOwner, CannotRebuild) as error:
        raise ModelManagerError("ERR_CONFLICT", f"Nothing was made: {error}.") from None


def _document(done: Reconstructed) -> dict[str, Any]:
    return {
        "registryId": done.registry_id,
        "epoch": done.epoch,
        "sequence": done.head,
        "until": timestamp(done.time_ms) if done.time_ms else None,
        "records": done.records,
        "bytes": done.bytes,
    }


def _rebuilt_document(done: Rebuilt) -> dict[str, Any]:
    counted = asdict(done)
    return {
        **_document(done.journal),
        "fromEpoch": done.from_epoch,
        "ownerClosedAt": done.closed,
        "otherEpochs": list(done.other_epochs),
        "models": done.models,
        "versions": done.versions,
        "openUploads": done.open_uploads,
        "openJobs": done.open_jobs,
        "versionsWithoutBytes": done.missing_versions,
        "withoutBytes": list(counted["missing"]),
        "unknownBlobs": done.unknown_blobs,
        "unknownBytes": done.unknown_bytes,
    }
