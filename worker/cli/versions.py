"""The versions a model has, and the one that comes next."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from schemas.errors import ModelManagerError

if TYPE_CHECKING:
    from schemas.model import ListedVersion
    from worker.client.client import ModelManagerClient

FIRST = "1.0.0"
_PAGE = 1000
_LAST_NUMBER = re.compile(r"(\d+)(?=\D*$)")


async def versions_of(client: ModelManagerClient, model_id: str) -> list[ListedVersion]:
    """The versions of a model, the one stored last first; empty if there is no such model."""
    try:
        await client.get_model_metadata(model_id)
    except ModelManagerError as error:
        if error.code != "ERR_MODEL_NOT_FOUND":
            raise
        return []
    versions: list[ListedVersion] = []
    cursor: str | None = None
    while True:
        page = await client.search_models({"text": model_id}, sort="-createdAt", limit=_PAGE, cursor=cursor)
        versions += [entry for entry in page["models"] if entry["modelId"] == model_id]
        cursor = page.get("nextCursor")
        if cursor is None:
            return versions


def next_version(versions: Sequence[ListedVersion]) -> str:
    """The version after the one stored last (`versions[0]`): its last number plus one, until that is free."""
    if not versions:
        return FIRST
    taken = {entry["version"] for entry in versions} | {name for entry in versions for name in entry["aliases"]}
    version = _bumped(versions[0]["version"])
    while version in taken:
        version = _bumped(version)
    return version


def _bumped(version: str) -> str:
    """`1.0.0` to `1.0.1`, `v9` to `v10`, `2026-rc1` to `2026-rc2`, `final` to `final.1`."""
    if _LAST_NUMBER.search(version) is None:
        return f"{version}.1"
    return _LAST_NUMBER.sub(lambda found: str(int(found[0]) + 1).zfill(len(found[0])), version)
