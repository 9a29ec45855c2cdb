"""Pages of listings and searches: what they hold fits into a reply, whatever the metadata is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.rack import LocalRack
from worker.transport.replies import encode_reply

RICH = "é" * 25_000  # 50 KB of metadata


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("listModels", {}),
        ("searchModels", {"criteria": {"text": "rich"}, "sort": "-createdAt"}),
        ("searchModels", {"criteria": {}, "sort": "-modelId"}),
    ],
)
async def test_a_page_of_rich_metadata_ends_early_and_the_next_one_goes_on(
    tmp_path: Path, method: str, params: dict[str, Any]
) -> None:
    rack = LocalRack(tmp_path).open()
    try:
        stored = {f"1.0.{number}" for number in range(90)}
        for version in stored:
            await rack.store_bytes("rich", version, b"same", note=RICH)
        found: list[str] = []
        pages, cursor = 0, {}
        while pages == 0 or cursor:
            reply = await rack.call(method, {**params, "limit": 1000, **cursor})
            assert b'"success":true' in encode_reply(reply)[:20]
            found += [entry["version"] for entry in reply["models"]]
            cursor = {"cursor": reply["nextCursor"]} if "nextCursor" in reply else {}
            pages += 1
        assert sorted(found) == sorted(stored)
        assert pages == 3
    finally:
        await rack.close()
