"""What the command line prints: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from schemas.errors import ModelManagerError

if TYPE_CHECKING:
    from worker.client.progress import Report

# Controls, among them the escape that begins a terminal's commands, the marks that turn the direction of text, and
# what stands for bytes that are no text, in the name of a file.
_HARMFUL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_HARMFUL_IN_JSON = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")

_HINTS = {
    "ERR_MODEL_ALREADY_EXISTS": "versions never change; push it as a new version",
    "ERR_MODEL_NOT_FOUND": "`model-manager ls` shows what there is",
    "ERR_UNAUTHORIZED": "name the bearer token's file with --token-file, or the login in --amqp-url",
    "ERR_UNSAFE_MODEL": "convert it to safetensors, or set allowPickle on the rack",
    "ERR_OVERLOADED": "try again, or wait longer with --timeout",
    "ERR_SHUTTING_DOWN": "check --rack and --amqp-url, or --url; `model-manager doctor` checks the parts",
    "ERR_DEADLINE_EXCEEDED": "wait longer with --timeout",
    "ERR_STORAGE_FULL": "free some room first",
    "ERR_INTERNAL": "the worker's log says more",
}


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"


class Output:
    """Where a command's results and remarks go."""

    def __init__(self, form: Format = Format.TABLE, *, quiet: bool = False) -> None:
        self.form = form
        self.quiet = quiet

    def result(self, reply: Mapping[str, Any], lines: Callable[[], Iterable[str]]) -> None:
        """Print the reply: as one JSON document, or as the lines a person reads."""
        if self.form is Format.JSON:
            print(json_text(reply))
            return
        for line in lines():
            print(line)

    def remark(self, text: str) -> None:
        """Tell a person something that is not the result."""
        if not self.quiet:
            print(plain(text), file=sys.stderr)

    def error(self, error: ModelManagerError) -> None:
        """One line, with a hint where there is one; as JSON the envelope of the reply."""
        if self.form is Format.JSON:
            print(json_text(error.body()), file=sys.stderr)
            return
        print(plain(f"error: {error.code} {error.message}"), file=sys.stderr)
        hint = error.details.get("hint", _HINTS.get(error.code))
        if hint:
            print(plain(f"hint: {hint}"), file=sys.stderr)

    def unusable(self, problems: Sequence[str]) -> None:
        """A line for each reason why the settings cannot be used; as JSON the envelope of an error."""
        if self.form is Format.JSON:
            self.error(ModelManagerError("ERR_INVALID_REQUEST", "The settings are unusable.", problems=list(problems)))
            return
        for problem in problems:
            print(plain(f"error: configuration: {problem}"), file=sys.stderr)

    @contextmanager
    def progress(self) -> Iterator[Report]:
        """Bars on a terminal's stderr, one for each step; elsewhere silence."""
        from worker.client.progress import silent

        if self.quiet or not sys.stderr.isatty():
            yield silent
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description:>10}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        steps: dict[str, TaskID] = {}
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:

            def report(step: str, done: int, total: int, /) -> None:
                if step not in steps:
                    steps[step] = bars.add_task(step, total=total or None)
                bars.update(steps[step], completed=done, total=total or None)

            yield report


def plain(value: object) -> str:
    """Text from others that cannot steer a terminal: what could is shown as its escape."""
    return _HARMFUL.sub(lambda found: found[0].encode("unicode_escape").decode(), str(value))


def json_text(value: Mapping[str, Any]) -> str:
    """One JSON document, indented. Its strings hold no character that steers a terminal, nor what is no text."""
    return _harmless_json(value, indent=True)


def json_line(value: Mapping[str, Any]) -> str:
    """One JSON document on one line, as harmless."""
    return _harmless_json(value, indent=False)


def _harmless_json(value: Mapping[str, Any], *, indent: bool) -> str:
    import orjson

    try:
        text = orjson.dumps(value, option=orjson.OPT_INDENT_2 if indent else None).decode()
    except TypeError:  # it has no escape for the surrogates that stand for bytes in the name of a file
        text = json.dumps(value, indent=2 if indent else None)
    return _HARMFUL_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """Lines of aligned columns, as wide as their widest cell; bold heads on a terminal."""
    cells = [[plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    head = "  ".join(name.ljust(width) for name, width in zip(columns, widths, strict=True)).rstrip()
    yield f"\x1b[1m{head}\x1b[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else head
    for row in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def pairs(entries: Mapping[str, object]) -> Iterator[str]:
    """Lines of `name  value`."""
    width = max(map(len, entries), default=0)
    for name, value in entries.items():
        yield f"{name.ljust(width)}  {plain(value)}".rstrip()


def size_text(size: int) -> str:
    """A number of bytes in powers of 1000, with three digits."""
    value, units = float(size), ["B", "KB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{size} B" if units[0] == "B" else f"{value:.3g} {units[0]}"


def short(checksum: str) -> str:
    """Enough of a digest to tell it from others."""
    return checksum.removeprefix("sha256:")[:12]
