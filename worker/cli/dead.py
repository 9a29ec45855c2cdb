"""The commands on dead letters: requests that could be neither served nor refused to somebody."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schemas.errors import ModelManagerError
from schemas.wire import timestamp
from worker.cli.loading import AmqpUrl, Form, Rack, broker_failures, confirm, loaded_settings, started
from worker.cli.models import Yes
from worker.cli.output import Format, Output, pairs, plain, size_text, table

if TYPE_CHECKING:
    from worker.transport.dead_letter import DeadLetter
    from worker.transport.dead_letters import DeadLetters

_SHOWN_BODY = 4096

dead = typer.Typer(help="Requests that nobody could serve, or be told about.", no_args_is_help=True)

Ids = Annotated[list[str] | None, typer.Argument(metavar="ID...", help="As `dead list` shows them.")]
All = Annotated[bool, typer.Option("--all", help="All that are there now.")]
Code = Annotated[str | None, typer.Option("--code", help="Those with this code, as `dead list` shows it.")]
Method = Annotated[str | None, typer.Option("--method", help="Those that asked for this.")]
Caller = Annotated[str | None, typer.Option("--caller", help="Those of this user.")]


@dataclass(frozen=True, slots=True)
class _Selection:
    """Which letters: those with the ids, if there are any, else all; of them those that the filters let pass."""

    ids: tuple[str, ...] = ()
    code: str | None = None
    method: str | None = None
    caller: str | None = None

    @property
    def filters(self) -> dict[str, str]:
        """What a letter must be, by the name of its attribute."""
        wanted = {"code": self.code, "method": self.method, "caller": self.caller}
        return {name: value for name, value in wanted.items() if value is not None}

    def __contains__(self, letter: DeadLetter) -> bool:
        return (not self.ids or letter.id in self.ids) and all(
            value == _printable(getattr(letter, name)) for name, value in self.filters.items()
        )

    def __str__(self) -> str:
        filters = ", ".join(f"{name} {value}" for name, value in self.filters.items())
        return f"{len(self.ids) or 'all'} dead letters" + (f" of {filters}" if filters else "")


def add_to(app: typer.Typer) -> None:
    app.add_typer(dead, name="dead")


@dead.command("list")
def list_letters(
    ctx: typer.Context,
    rack: Rack = None,
    amqp_url: AmqpUrl = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="The oldest so many.")] = 100,
    code: Code = None,
    method: Method = None,
    caller: Caller = None,
    output: Form = Format.TABLE,
) -> None:
    """List a rack's dead letters, oldest first, and leave them as they are."""
    out = started(ctx, output)

    selection = _Selection(code=code, method=method, caller=caller)
    found: list[dict[str, Any]] = []

    async def work(letters: DeadLetters) -> tuple[int, int]:
        looked_at = 0
        async for letter in letters.read():
            looked_at += 1
            if letter in selection:
                found.append(_summary(letter))
                if len(found) == limit:
                    break
        return letters.total, looked_at

    total, looked_at = _on_letters(out, rack, amqp_url, work)
    columns = ("ID", "DIED AT", "METHOD", "CALLER", "MESSAGE ID", "SIZE", "REASON")
    rows = (
        (
            *(each[name] or "-" for name in ("id", "diedAt", "method", "caller", "messageId")),
            size_text(each["size"]),
            f"{each['code']}: {each['reason']}",
        )
        for each in found
    )
    out.result({"success": True, "total": total, "deadLetters": found}, lambda: table(columns, rows))
    if len(found) == limit and total > looked_at:
        out.remark(f"{total - looked_at} more were not looked at; --limit shows more of them")


@dead.command("show")
def show_letter(
    ctx: typer.Context,
    letter_id: Annotated[str, typer.Argument(metavar="ID", help="As `dead list` shows it.")],
    rack: Rack = None,
    amqp_url: AmqpUrl = None,
    output: Form = Format.TABLE,
) -> None:
    """Print all there is of a dead letter, and leave it as it is."""
    out = started(ctx, output)

    async def work(letters: DeadLetters) -> dict[str, Any]:
        async for letter in letters.read():
            if letter.id == letter_id:
                return {**_summary(letter), **_content(letter)}
        raise _unknown([letter_id])

    shown = _on_letters(out, rack, amqp_url, work)

    def lines() -> Iterator[str]:
        yield from pairs({name: _text(value) for name, value in shown.items() if name not in ("body", "bodyBase64")})
        yield ""
        body = shown.get("body", shown.get("bodyBase64", ""))
        yield from map(plain, body[:_SHOWN_BODY].splitlines())
        if len(body) > _SHOWN_BODY:
            yield "... -o json has all of it"

    out.result({"success": True, **shown}, lines)


@dead.command("replay")
def replay_letters(
    ctx: typer.Context,
    ids: Ids = None,
    every: All = False,
    code: Code = None,
    method: Method = None,
    caller: Caller = None,
    rack: Rack = None,
    amqp_url: AmqpUrl = None,
    output: Form = Format.TABLE,
) -> None:
    """Send dead letters to the rack's queue again; each leaves the dead ones once the broker has it there.

    What was served already is answered from its record, and not done twice.
    """
    out = started(ctx, output)
    selection = _selected(_Selection(tuple(ids or ()), code, method, caller), every)
    _settle(out, selection, rack, amqp_url, "replayed", lambda letters: letters.replay)


@dead.command("drop")
def drop_letters(
    ctx: typer.Context,
    ids: Ids = None,
    every: All = False,
    code: Code = None,
    method: Method = None,
    caller: Caller = None,
    rack: Rack = None,
    amqp_url: AmqpUrl = None,
    yes: Yes = False,
    output: Form = Format.TABLE,
) -> None:
    """Remove dead letters for good."""
    out = started(ctx, output)
    selection = _selected(_Selection(tuple(ids or ()), code, method, caller), every)
    confirm(f"drop {selection} for good", yes)
    _settle(out, selection, rack, amqp_url, "dropped", lambda letters: letters.drop)


def _selected(selection: _Selection, every: bool) -> _Selection:
    """The selection, if it was made on purpose."""
    if bool(selection.ids) == (every or bool(selection.filters)):
        raise ModelManagerError(
            "ERR_INVALID_REQUEST", "Name the dead letters by their ids, or by a filter, or say --all."
        )
    return selection


def _settle(
    out: Output,
    selection: _Selection,
    rack: str | None,
    amqp_url: str | None,
    done: str,
    settling: Callable[[DeadLetters], Callable[[DeadLetter], Awaitable[None]]],
) -> None:
    """Do it to each letter that is selected; what cannot be done is told, and the others are done all the same."""
    from worker.transport.dead_letters import NotReplayedError

    settled: list[str] = []
    kept: list[dict[str, str]] = []
    missing = set(selection.ids)

    async def work(letters: DeadLetters) -> None:
        settle = settling(letters)
        async for letter in letters.read():
            if letter not in selection:
                continue
            missing.discard(letter.id)
            try:
                await settle(letter)
                settled.append(letter.id)
            except NotReplayedError as error:
                kept.append({"id": letter.id, "reason": str(error)})

    try:
        _on_letters(out, rack, amqp_url, work)
    except ModelManagerError as error:
        raise ModelManagerError(error.code, f"{error.message} {len(settled)} were {done} before.") from None
    document = {"success": not (kept or missing), done: settled, "kept": kept}
    out.result(document, lambda: [f"{len(settled)} {done}"])
    for each in kept:
        out.remark(f"{each['id']} was not {done}: {each['reason']}")
    if missing:
        raise _unknown(sorted(missing))
    if kept:
        raise typer.Exit(ModelManagerError("ERR_CONFLICT").kind.exit_code)


def _on_letters(
    out: Output, rack: str | None, amqp_url: str | None, work: Callable[[DeadLetters], Awaitable[Any]]
) -> Any:
    loaded = loaded_settings(out, rack=rack, amqp_url=amqp_url)

    async def held() -> Any:
        from worker.transport.dead_letters import dead_letters

        async with dead_letters(loaded.amqp_url, loaded.settings.rack) as letters:
            if letters.remark:
                out.remark(f"warning: {letters.remark}")
            return await work(letters)

    with broker_failures():
        return asyncio.run(held())


def _summary(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "diedAt": None if letter.died_at is None else timestamp(int(letter.died_at.timestamp() * 1000)),
        "method": _printable(letter.method),
        "caller": _printable(letter.caller),
        "messageId": _printable(letter.message_id),
        "code": _printable(letter.code),
        "reason": _printable(letter.reason),
        "size": len(letter.body),
    }


def _content(letter: DeadLetter) -> dict[str, Any]:
    """The rest: its properties and headers, and the body as text, or in base64."""
    properties = {name: _plain(value) for name, value in letter.properties if value not in (None, "")}
    content = {"headers": properties.pop("headers", {}), "properties": properties}
    try:
        return {**content, "body": letter.body.decode()}
    except UnicodeDecodeError:
        return {**content, "bodyBase64": base64.b64encode(letter.body).decode()}


def _plain(value: Any) -> Any:
    """A property or header as a JSON value."""
    match value:
        case None | bool() | float():
            return value
        case int() if abs(value) < 2**63:
            return value
        case str():
            return _printable(value)
        case datetime():
            return timestamp(int(value.timestamp() * 1000))
        case dict():
            return {_printable(str(name)): _plain(member) for name, member in value.items()}
        case list():
            return [_plain(member) for member in value]
        case bytes() | bytearray():
            return bytes(value).decode("utf-8", "backslashreplace")
        case _:
            return str(value)


def _printable(text: str) -> str:
    from worker.transport.amqp_decoding import printable

    return printable(text)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _unknown(ids: Sequence[str]) -> ModelManagerError:
    return ModelManagerError("ERR_NOT_FOUND", f"There is no dead letter {', '.join(ids)}.")
