"""A version whose list of files no record holds is refused before any of its bytes are there."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import ModelManagerError
from schemas.ids import MAX_ALIASES, MAX_METADATA_BYTES
from schemas.uploads import CreateUpload
from schemas.wire import canonical
from tests.rack import LocalRack
from worker.jobs.runner import Commit, Progress
from worker.uploads.plan import FEW_FILES, check_plan

FILES = 2000


@pytest.fixture
async def rack(tmp_path: Path) -> AsyncIterator[LocalRack]:
    rack = LocalRack(tmp_path).open()
    yield rack
    await rack.close()


def paths(count: int, size: int, letter: str = "x") -> list[str]:
    return [f"{number:05d}".ljust(size, letter) for number in range(count)]


def plan(names: list[str]) -> dict[str, Any]:
    files = [{"path": path, "size": 1, "sha256": f"sha256:{n:064x}"} for n, path in enumerate(names)]
    return {"modelId": "acme/wide", "version": "1.0.0", "files": files}


def inline(names: list[str], **metadata: Any) -> dict[str, Any]:
    files = [{"path": path, "data": base64.b64encode(path[:5].encode()).decode()} for path in names]
    return {"modelId": "acme/wide", "metadata": {"type": "custom", "version": "1.0.0", **metadata}, "files": files}


def content(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", ["createUpload", "storeModel"])
async def test_paths_that_are_too_long_together_are_refused_before_any_bytes(rack: LocalRack, method: str) -> None:
    await rack.store_bytes("acme/other", "1.0.0", b"bytes")
    before, head = content(rack.folder / "models"), rack.registry.journal.stats().records
    names = paths(FILES, 512)
    with pytest.raises(ModelManagerError) as refused:
        await rack.call(method, plan(names) if method == "createUpload" else inline(names))
    assert refused.value.code == "ERR_INVALID_REQUEST"
    assert refused.value.details["size"] > refused.value.details["limit"] > 1_000_000
    assert content(rack.folder / "models") == before
    assert rack.registry.journal.stats().records == head


async def test_as_many_files_as_a_version_may_have_fit_with_paths_of_a_common_length(rack: LocalRack) -> None:
    names = paths(FILES, 80)
    begun = await rack.call("createUpload", plan(names))
    assert len(begun["files"]) == FILES
    stored = await rack.call("storeModel", inline(names, note="x" * 60_000))
    assert len(stored["files"]) == FILES


def test_a_few_files_fit_however_long_their_paths_are() -> None:
    """So that only plans with more files are looked at: with one more, the longest that can be are near the limit."""
    longest = CreateUpload.model_validate(plan(paths(FEW_FILES + 1, 512, '"')))
    check_plan(longest.files, in_parts=True)


async def test_what_an_upload_may_begin_with_can_be_stored_with_any_metadata(rack: LocalRack) -> None:
    """The most files, with paths of this length, that createUpload takes."""
    few, many = FEW_FILES, FILES
    while many - few > 1:
        middle = (few + many) // 2
        try:
            check_plan(CreateUpload.model_validate(plan(paths(middle, 512))).files, in_parts=False)
            few = middle
        except ModelManagerError:
            many = middle
    params = inline(paths(few, 512))
    spare = MAX_METADATA_BYTES - len(canonical({**params["metadata"], "note": ""}))
    params["metadata"]["note"] = "x" * spare
    stored = await rack.call("storeModel", params, key="request", caller="somebody")
    assert len(stored["files"]) == few > FEW_FILES


async def test_as_many_aliases_as_a_model_may_have_leave_room_for_an_update(rack: LocalRack) -> None:
    await rack.store_bytes("acme/known", "1.0.0", b"bytes")
    await rack.store_bytes("acme/known", "2.0.0", b"others")
    names = [f"{number:04d}".ljust(64, "x") for number in range(MAX_ALIASES + 1)]

    async def point(alias: str, version: str = "1.0.0") -> Any:
        return await rack.call("setAlias", {"modelId": "acme/known", "alias": alias, "version": version})

    for start in range(0, MAX_ALIASES, 10):
        await asyncio.gather(*map(point, names[start : min(start + 10, MAX_ALIASES)]))
    with pytest.raises(ModelManagerError) as refused:
        await point(names[-1])
    assert refused.value.code == "ERR_INVALID_REQUEST"
    assert refused.value.details == {"limit": MAX_ALIASES}
    assert (await point(names[0], "2.0.0"))["previous"] == "1.0.0"
    note = {"modelId": "acme/known", "version": "1.0.0", "metadata": {"note": "x" * 60_000}}
    assert len((await rack.call("updateModelMetadata", note))["aliases"]) == MAX_ALIASES - 1
    await rack.call("deleteAlias", {"modelId": "acme/known", "alias": names[1]})
    await point(names[-1])


async def test_a_validation_of_more_files_than_a_record_holds_ends_and_lists_first_what_is_wrong(
    tmp_path: Path,
) -> None:
    rack = LocalRack(tmp_path, check_formats=False).open()
    names = paths(FILES, 320)
    stored = await rack.call("storeModel", inline(names))
    (tmp_path / "models" / stored["files"][-1]["storageKey"]).write_bytes(b"wrong")
    report = await rack.call("validateModel", {"modelId": "acme/wide", "waitMs": 5000})
    while "jobId" in report:
        status = await rack.call("getJob", {"jobId": report["jobId"], "waitMs": 5000})
        report = status.get("result", report)
    assert report["isValid"] is False
    assert (report["files"][0]["path"], report["files"][0]["isValid"]) == (names[-1], False)
    assert all(file["isValid"] for file in report["files"][1:])
    assert len(report["files"]) + report["omittedFiles"] == FILES
    await rack.close()


async def test_a_job_whose_result_no_record_holds_has_failed(rack: LocalRack) -> None:
    await rack.store_bytes("acme/net", "1.0.0", b"x")

    async def commit() -> dict[str, Any]:
        return {"success": True, "text": "x" * 2**20}

    async def body(params: dict[str, Any], progress: Progress) -> Commit:
        return commit

    rack.service.jobs._bodies["validateModel"] = body
    with pytest.raises(ModelManagerError) as failed:
        await rack.call("validateModel", {"modelId": "acme/net", "waitMs": 5000}, key="k")
    status = await rack.call("getJob", {"jobId": failed.value.details["jobId"]})
    assert status["state"] == "failed"
