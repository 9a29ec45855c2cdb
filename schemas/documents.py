"""Writes the generated documents below this folder, or compares them: `python -m schemas.documents [--check]`.

They are `openapi.json`, `asyncapi.json` and a JSON Schema in `json-schema/` for each message and each record. The same
sources always give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from schemas.asyncapi_document import asyncapi_document
from schemas.json_schemas import Schema, named_schemas
from schemas.openapi_document import openapi_document

FOLDER = Path(__file__).parent
_SCHEMAS = "json-schema"


def documents() -> dict[str, str]:
    """The text of every document, by its path below `schemas/`."""
    found: dict[str, Schema] = {"openapi.json": openapi_document(), "asyncapi.json": asyncapi_document()}
    found |= {f"{_SCHEMAS}/{named.file}": named.document() for named in named_schemas()}
    return {
        path: json.dumps(found[path], indent=2, sort_keys=True, ensure_ascii=False) + "\n" for path in sorted(found)
    }


def write(folder: Path = FOLDER) -> None:
    """Write every document, and remove the schemas that are no longer there."""
    texts = documents()
    (folder / _SCHEMAS).mkdir(parents=True, exist_ok=True)
    for path in _present(folder) - texts.keys():
        (folder / path).unlink()
    for path, text in texts.items():
        (folder / path).write_text(text, encoding="utf-8")


def drift(folder: Path = FOLDER) -> list[str]:
    """The paths of the documents that are missing, out of date, or not generated any more."""
    texts, present = documents(), _present(folder)
    changed = {path for path in texts.keys() & present if (folder / path).read_text(encoding="utf-8") != texts[path]}
    return sorted((texts.keys() ^ present) | changed)


def openapi_bytes() -> bytes:
    """The committed OpenAPI document, as the HTTP service hands it out."""
    return (FOLDER / "openapi.json").read_bytes()


def _present(folder: Path) -> set[str]:
    found = {*folder.glob("*.json"), *(folder / _SCHEMAS).glob("*.json")}
    return {path.relative_to(folder).as_posix() for path in found}


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 when `--check` finds that the documents do not follow their sources."""
    parser = argparse.ArgumentParser(prog="python -m schemas.documents", description="Write the generated documents.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if not parser.parse_args(arguments).check:
        write()
        return 0
    stale = drift()
    for path in stale:
        print(f"{path}: out of date, run python -m schemas.documents", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
