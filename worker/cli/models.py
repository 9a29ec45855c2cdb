"""The client's commands: what people and scripts do with the models of a rack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from schemas.errors import ModelManagerError
from worker.cli.arguments import assignments, criteria_of, guess_type, json_value, reference_of
from worker.cli.asking import ask
from worker.cli.connection import Session, client_command
from worker.cli.output import pairs, plain, short, size_text, table
from worker.cli.versions import next_version, versions_of

_EXIT_SOME_FAILED = 1
_PAGE = 1000

Reference = Annotated[str, typer.Argument(metavar="MODEL[:VERSION]", help="A version, an alias, or the latest.")]
Model = Annotated[str, typer.Argument(metavar="MODEL")]
NewReference = Annotated[str, typer.Argument(metavar="MODEL[:VERSION]", help="Without a version: the next one.")]
ManyReference = Annotated[str, typer.Argument(metavar="MODEL[:VERSION]", help="Without a version: all of them.")]
OfType = Annotated[str | None, typer.Option("--type", help="Only this format.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Limit = Annotated[int, typer.Option("--limit", min=1, help="At most so many versions.")]
Tags = Annotated[list[str] | None, typer.Option("--tag", help="A tag; may be repeated.")]

models = typer.Typer()
alias = typer.Typer(help="Movable names for versions.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    app.add_typer(models)
    app.add_typer(alias, name="alias")


# --- bytes ---


@client_command(models, "push")
async def push(
    session: Session,
    path: Annotated[Path, typer.Argument(metavar="PATH", exists=True, help="A file, or a folder with all its files.")],
    model: NewReference,
    model_type: Annotated[str | None, typer.Option("--type", help="Format; else guessed from the file names.")] = None,
    tag: Tags = None,
    description: Annotated[str | None, typer.Option("--description", help="What it is.")] = None,
    values: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=JSON", help="Further metadata.")] = None,
    yes: Yes = False,
) -> None:
    """Store a file or folder as a version of a model."""
    model_id, version = reference_of(model)
    metadata: dict[str, Any] = assignments(values or [])
    if model_type is None:
        model_type = guess_type(path)
        session.output.remark(f"type: {model_type} (guessed from the file names; --type says otherwise)")
    metadata["type"] = model_type
    if tag:
        metadata["tags"] = tag
    if description is not None:
        metadata["description"] = description
    if version is None:
        version = await _agreed_version(session, model_id, yes)
    with session.output.progress() as progress:
        reply = await session.client.push(path, model_id, version, metadata=metadata, progress=progress)
    session.output.result(
        reply,
        lambda: pairs(
            {
                "version": f"{reply['modelId']}:{reply['version']}",
                "checksum": reply["checksum"],
                "size": size_text(reply["size"]),
                "stored": "now" if reply["created"] else "before, with the same files",
            }
        ),
    )


async def _agreed_version(session: Session, model_id: str, yes: bool) -> str:
    """The version to push: the first one of a new model, else the next one, if the user agrees."""
    versions = await versions_of(session.client, model_id)
    suggested = next_version(versions)
    if not versions or yes:
        session.output.remark(f"version: {suggested}")
        return suggested
    ask(
        f"Push it as {plain(model_id)}:{suggested}?",
        otherwise=f"Which version of {model_id}? The next one is {suggested}.",
        hint=f"push {model_id}:{suggested}, or say --yes",
        yes=yes,
        default=True,
    )
    return suggested


@client_command(models, "pull")
async def pull(
    session: Session,
    model: Reference,
    destination: Annotated[
        Path | None, typer.Argument(metavar="[DEST]", help="File or folder; else NAME-VERSION, or the file's own name.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are something else.")] = False,
) -> None:
    """Fetch the files of a version, each one verified."""
    model_id, reference = reference_of(model)
    with session.output.progress() as progress:
        pulled = await session.client.pull(model_id, reference, destination, force=force, progress=progress)
    fetched = sum(file.fetched for file in pulled.files)
    session.output.remark(f"{pulled.model_id}:{pulled.version}: {fetched} of {len(pulled.files)} files fetched")
    session.output.result(pulled.as_dict(), lambda: [plain(pulled.destination)])


# --- looking up ---


@client_command(models, "ls")
async def ls(
    session: Session,
    model_type: OfType = None,
    limit: Limit = 100,
) -> None:
    """List the versions of all models."""

    async def page(count: int, cursor: str | None) -> dict[str, Any]:
        return dict(await session.client.list_models(model_type=model_type, limit=count, cursor=cursor))

    await _show_listing(session, page, limit)


@client_command(models, "search")
async def search(
    session: Session,
    model_type: OfType = None,
    tag: Tags = None,
    text: Annotated[str | None, typer.Option("--text", help="Words in id, description and tags.")] = None,
    values: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=JSON", help="Metadata that is so.")] = None,
    sort: Annotated[str | None, typer.Option("--sort", help="modelId, size or createdAt; - for descending.")] = None,
    limit: Limit = 100,
) -> None:
    """Find versions by type, tags, words and metadata; all conditions hold."""
    criteria = criteria_of(model_type=model_type, tags=tag, text=text, equals=assignments(values or []))

    async def page(count: int, cursor: str | None) -> dict[str, Any]:
        return dict(await session.client.search_models(criteria, sort=sort, limit=count, cursor=cursor))

    await _show_listing(session, page, limit)


async def _show_listing(session: Session, page: Any, limit: int) -> None:
    """Gather pages up to `limit` entries and print them as one reply."""
    reply = await page(min(limit, _PAGE), None)
    entries = reply["models"]
    while len(entries) < limit and reply.get("nextCursor"):
        reply = await page(min(limit - len(entries), _PAGE), reply["nextCursor"])
        entries += reply["models"]
    whole = {**reply, "models": entries, "count": len(entries)}
    columns = ("MODEL", "VERSION", "TYPE", "SIZE", "CREATED", "CHECKSUM", "ALIASES", "STATE")
    rows = (
        (
            entry["modelId"],
            entry["version"],
            entry["type"],
            size_text(entry["size"]),
            entry["createdAt"],
            short(entry["checksum"]),
            ",".join(entry["aliases"]),
            entry["state"],
        )
        for entry in entries
    )
    session.output.result(whole, lambda: table(columns, rows))
    if reply.get("nextCursor"):
        session.output.remark(f"There are more than {limit}; raise --limit.")


@client_command(models, "show")
async def show(session: Session, model: Reference) -> None:
    """Show what is known of a version."""
    _show_metadata(session, await session.client.get_model_metadata(*reference_of(model)))


def _show_metadata(session: Session, reply: Any) -> None:
    def lines() -> Any:
        metadata = reply["metadata"]
        yield from pairs(
            {
                "version": f"{reply['modelId']}:{reply['version']}",
                "type": metadata["type"],
                "description": metadata.get("description", ""),
                "tags": ", ".join(metadata.get("tags", [])),
                "checksum": reply["checksum"],
                "size": size_text(reply["size"]),
                "created": reply["createdAt"],
                "revision": reply["revision"],
                "aliases": ", ".join(reply["aliases"]),
                "origin": reply["origin"],
                "replicas": ", ".join(reply["replicas"]),
                "state": reply["state"],
            }
        )
        known = ("type", "version", "description", "tags")
        free = {name: value for name, value in metadata.items() if name not in known}
        for name, value in free.items():
            yield f"{plain(name)} = {plain(json_value(value))}"
        yield ""
        rows = ((file["path"], size_text(file["size"]), file["checksum"]) for file in reply["files"])
        yield from table(("FILE", "SIZE", "CHECKSUM"), rows)

    session.output.result(reply, lines)


# --- changing ---


@client_command(models, "set")
async def set_metadata(
    session: Session,
    model: Reference,
    values: Annotated[
        list[str], typer.Argument(metavar="KEY=JSON...", help="null removes; plain text needs no quotes.")
    ],
    expect_revision: Annotated[int | None, typer.Option(help="Only if the metadata has this revision.")] = None,
) -> None:
    """Change the metadata of a version."""
    model_id, version = reference_of(model)
    reply = await session.client.update_model_metadata(
        model_id, assignments(values), version=version, expected_revision=expect_revision
    )
    _show_metadata(session, reply)


@client_command(models, "rm")
async def rm(
    session: Session,
    model: ManyReference,
    purge: Annotated[bool, typer.Option("--purge", help="Free the bytes now; there is no undo.")] = False,
    yes: Yes = False,
) -> None:
    """Delete a version, or a model with all its versions; `restore` brings it back for a while."""
    model_id, version = reference_of(model)
    what = f"{plain(model_id)}:{version}" if version else f"all versions of {plain(model_id)}"
    ask(f"Delete {what}{' for good' if purge else ''}?", otherwise=f"This deletes {what}.", yes=yes)
    reply = await session.client.delete_model(model_id, version, purge=purge)
    until = reply.get("restorableUntil")
    session.output.result(reply, lambda: [plain(f"{model_id}:{gone}") for gone in reply["versions"]])
    session.output.remark(f"restorable until {until}" if until else "purged")


@client_command(models, "restore")
async def restore(session: Session, model: ManyReference) -> None:
    """Undo a delete."""
    model_id, version = reference_of(model)
    reply = await session.client.restore_model(model_id, version)
    session.output.result(reply, lambda: [plain(f"{model_id}:{back}") for back in reply["versions"]])


# --- jobs ---


@client_command(models, "verify")
async def verify(session: Session, model: Reference) -> None:
    """Have the rack read a version back and check it. The exit status is 5 if it is not what it should be."""
    with session.output.progress() as progress:
        begun = await session.client.validate_model(*reference_of(model))
        reply = await session.client.outcome(begun, progress, step="Verifying")

    def lines() -> Any:
        rows = (
            (file["path"], "ok" if file["isValid"] else "WRONG", file["actualChecksum"] or "gone")
            for file in reply["files"]
        )
        yield from table(("FILE", "RESULT", "CHECKSUM"), rows)
        if "omittedFiles" in reply:
            yield plain(f"{reply['omittedFiles']} more files are not listed.")
        for finding in reply["findings"]:
            yield plain(f"{finding['severity']}: {finding['path']}: {finding['message']} ({finding['code']})")

    session.output.result(reply, lines)
    if not reply["isValid"]:
        text = f"{reply['modelId']}:{reply['version']} is not valid."
        raise ModelManagerError("ERR_CHECKSUM_MISMATCH", text, hint="push it again as a new version")


@client_command(models, "replicate")
async def replicate(
    session: Session,
    model: Reference,
    peer: Annotated[list[str] | None, typer.Option("--peer", help="A rack to hold it; may be repeated.")] = None,
) -> None:
    """Have other racks hold a version. The exit status is 1 if some of them failed."""
    model_id, version = reference_of(model)
    with session.output.progress() as progress:
        begun = await session.client.replicate_model(model_id, version, peers=peer)
        reply = await session.client.outcome(begun, progress, step="Replicating")
    rows = [(result["peer"], result["state"], result["message"]) for result in reply["results"]]
    session.output.result(reply, lambda: table(("RACK", "STATE", "MESSAGE"), rows))
    if reply["failedReplications"]:
        raise typer.Exit(_EXIT_SOME_FAILED)


# --- aliases ---


@client_command(alias, "set")
async def set_alias(
    session: Session,
    model: Model,
    name: Annotated[str, typer.Argument(metavar="ALIAS")],
    version: Annotated[str, typer.Argument(metavar="VERSION")],
    expect: Annotated[str | None, typer.Option("--expect", help="Only if it points there now; `none`: is new.")] = None,
) -> None:
    """Point an alias at a version."""
    if expect is None:
        reply = await session.client.set_alias(model, name, version)
    else:
        expected = None if expect == "none" else expect
        reply = await session.client.set_alias(model, name, version, expected_version=expected)
    before = f" (before: {reply['previous']})" if reply["previous"] else ""
    session.output.result(reply, lambda: [plain(f"{model}:{name} -> {reply['version']}{before}")])


@client_command(alias, "rm")
async def delete_alias(session: Session, model: Model, name: Annotated[str, typer.Argument(metavar="ALIAS")]) -> None:
    """Remove an alias; the version it points at stays."""
    reply = await session.client.delete_alias(model, name)
    session.output.result(reply, lambda: [plain(f"{model}:{name} is gone (before: {reply['previous']})")])


@client_command(alias, "ls")
async def list_aliases(session: Session, model: Model) -> None:
    """List the aliases of a model."""
    versions = await versions_of(session.client, model)
    if not versions:
        raise ModelManagerError("ERR_MODEL_NOT_FOUND", f"There is no model {model}.")
    aliases = {name: entry["version"] for entry in versions for name in entry["aliases"]}
    rows = sorted(aliases.items())
    document = {"success": True, "modelId": model, "aliases": dict(rows)}
    session.output.result(document, lambda: table(("ALIAS", "VERSION"), rows))


# --- the rack ---


@client_command(models, "stats")
async def stats(session: Session) -> None:
    """Show storage, registry, cache and replication in numbers."""
    reply = await session.client.get_storage_stats()
    sections = {name: section for name, section in reply.items() if isinstance(section, dict)}
    rows = {f"{name}.{key}": json_value(value) for name, section in sections.items() for key, value in section.items()}
    session.output.result(reply, lambda: pairs(rows))


@client_command(models, "ping")
async def ping(session: Session) -> None:
    """Ask a worker who it is and how far its journal is."""
    reply = await session.client.ping()
    rows = {name: json_value(value) for name, value in reply.items() if name != "success"}
    session.output.result(reply, lambda: pairs(rows))
