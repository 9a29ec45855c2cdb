"""The folder of a journal at boot: what a crash left half done goes, what is not known is set aside."""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path

from worker.journal.base_index import index_name
from worker.journal.files import Files, sync_folder
from worker.journal.lock import LOCK
from worker.journal.manifest import MANIFEST, Manifest, is_base, segment_first, segment_name
from worker.journal.reserve import RESERVE

ASIDE = "aside"

_OWN_TEMPORARY = re.compile(r"(MANIFEST|seg-[0-9]{20}\.jsonl(\..+\.torn)?|base-[0-9]{10}\.(jsonl|idx))\.tmp")
_TORN_COPY = re.compile(r"seg-[0-9]{20}\.jsonl\..+\.torn")


def tidy(files: Files, folder: Path, manifest: Manifest, *, sequence: int, stands_for: int) -> None:
    """Remove what was half published and what a base stands for; set aside, never delete, what is not known.

    `sequence` is the last one of the journal, `stands_for` the last one its base stands for (0 without). The names in
    `folder` are durable once the caller has synced it.
    """
    names = files.list(folder)
    known = {LOCK, MANIFEST, RESERVE, ASIDE, *manifest.names, segment_name(sequence + 1)}
    known |= {index_name(name) for name in manifest.names if is_base(name)}
    superseded: list[str] = []
    unknown: list[str] = []
    for name in names:
        if _OWN_TEMPORARY.fullmatch(name):
            files.unlink(folder / name)
        elif name in known or _TORN_COPY.fullmatch(name) or files.is_dir(folder / name):
            continue
        elif _is_superseded(name, stands_for):
            superseded.append(name)
        else:
            unknown.append(name)
    if superseded:
        # Only now is it sure that MANIFEST, which does without them, is on the disk and not only in its cache.
        sync_folder(files, folder)
    for name in superseded:
        files.unlink(folder / name)
    if unknown or ASIDE in names:
        _set_aside(files, folder, unknown)


def _is_superseded(name: str, stands_for: int) -> bool:
    """Whether a base stands for the file now; or it is of a base that was replaced, or never adopted."""
    if is_base(name) or is_base(name.removesuffix(".idx") + ".jsonl"):
        return True
    first = segment_first(name)
    return first is not None and first <= stands_for


def _set_aside(files: Files, folder: Path, names: list[str]) -> None:
    """Each name is durable in its new place before it goes from the old one; also those that an earlier boot had moved
    when it died."""
    aside = folder / ASIDE
    if ASIDE not in files.list(folder):
        files.mkdir(aside)
    if names:
        sync_folder(files, folder)
    for name in names:
        files.rename(folder / name, aside / free_name(name, "", files.list(aside)))
    sync_folder(files, aside)


def free_name(stem: str, suffix: str, taken: Container[str]) -> str:
    """`stem` + `suffix`, with a number between them if that name is taken."""
    name, number = f"{stem}{suffix}", 0
    while name in taken:
        number += 1
        name = f"{stem}.{number}{suffix}"
    return name
