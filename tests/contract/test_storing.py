"""storeModel: what is stored, what is refused, and what lies on the disk afterwards."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import pickle
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import numpy
import pytest
from safetensors.numpy import save

from schemas.errors import ModelManagerError
from schemas.findings import Finding
from schemas.model import Metadata, version_digest
from tests.rack import LocalRack
from worker.context import Context
from worker.validation.registry import HOOKS
from worker.validation.source import Source


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture
async def rack(tmp_path: Path) -> AsyncIterator[LocalRack]:
    rack = LocalRack(tmp_path).open()
    yield rack
    await rack.close()


def blobs(rack: LocalRack) -> dict[str, bytes]:
    """What lies in the store, by key."""
    return {f"blobs/{path.name}": path.read_bytes() for path in (rack.folder / "models" / "blobs").glob("*")}


async def refused(rack: LocalRack, params: dict[str, Any]) -> ModelManagerError:
    with pytest.raises(ModelManagerError) as error:
        await rack.call("storeModel", params)
    return error.value


async def test_a_single_binary_lies_under_its_storage_key_with_its_checksum(rack: LocalRack) -> None:
    reply = await rack.store_bytes("org/net", "1.0.0", b"weights")
    assert reply["checksum"] == f"sha256:{sha256(b'weights')}"
    assert reply["size"] == 7
    assert reply["files"][0]["path"] == "model.custom"
    assert blobs(rack) == {reply["storageKey"]: b"weights"}


async def test_the_digest_of_several_files_is_that_of_the_canonical_manifest(rack: LocalRack) -> None:
    contents = {"b.txt": b"two", "a/é.txt": b"one"}
    files = [{"path": path, "data": b64(data)} for path, data in contents.items()]
    reply = await rack.call("storeModel", {"modelId": "net", "metadata": {"type": "custom"}, "files": files})
    digest = version_digest((path, len(data), sha256(data)) for path, data in contents.items())
    assert reply["checksum"] == f"sha256:{digest}"
    assert "storageKey" not in reply
    by_hand = (
        f'{{"files":[{{"path":"a/é.txt","sha256":"{sha256(b"one")}","size":3}},'
        f'{{"path":"b.txt","sha256":"{sha256(b"two")}","size":3}}]}}'
    )
    assert digest == sha256(by_hand.encode())


async def test_bytes_that_are_there_already_are_stored_once(rack: LocalRack) -> None:
    first = await rack.store_bytes("one", "1.0.0", b"shared")
    second = await rack.store_bytes("two", "1.0.0", b"shared")
    assert first["storageKey"] == second["storageKey"]
    assert len(blobs(rack)) == 1
    stats = await rack.call("getStorageStats", {})
    assert (stats["storage"]["blobs"], stats["storage"]["blobBytes"]) == (1, 6)


async def test_storing_the_same_files_again_succeeds_and_leaves_the_metadata(rack: LocalRack) -> None:
    await rack.store_bytes("net", "1.0.0", b"same", description="first")
    again = await rack.store_bytes("net", "1.0.0", b"same", description="second")
    assert again["created"] is False
    seen = await rack.call("getModelMetadata", {"modelId": "net"})
    assert seen["metadata"]["description"] == "first"


async def test_a_version_never_changes(rack: LocalRack) -> None:
    stored = await rack.store_bytes("net", "1.0.0", b"one")
    with pytest.raises(ModelManagerError) as error:
        await rack.store_bytes("net", "1.0.0", b"two")
    assert error.value.code == "ERR_MODEL_ALREADY_EXISTS"
    assert error.value.details["checksum"] == stored["checksum"]
    assert list(blobs(rack).values()) == [b"one"]


async def test_a_version_of_another_type_is_another_version(rack: LocalRack) -> None:
    await rack.store_bytes("net", "1.0.0", b"one")
    with pytest.raises(ModelManagerError, match="ERR_MODEL_ALREADY_EXISTS"):
        await rack.store_bytes("net", "1.0.0", b"one", type="ncnn")


async def test_model_ids_are_unique_ignoring_case(rack: LocalRack) -> None:
    await rack.store_bytes("Net", "1.0.0", b"one")
    with pytest.raises(ModelManagerError, match="ERR_CONFLICT"):
        await rack.store_bytes("net", "2.0.0", b"two")


async def test_versions_and_aliases_are_one_namespace(rack: LocalRack) -> None:
    await rack.store_bytes("net", "1.0.0", b"one")
    await rack.call("setAlias", {"modelId": "net", "alias": "prod", "version": "1.0.0"})
    with pytest.raises(ModelManagerError, match="ERR_CONFLICT"):
        await rack.store_bytes("net", "prod", b"two")
    with pytest.raises(ModelManagerError, match="ERR_CONFLICT"):
        await rack.call("setAlias", {"modelId": "net", "alias": "1.0.0", "version": "1.0.0"})


async def test_a_pickle_is_refused_and_nothing_of_it_stays(rack: LocalRack) -> None:
    data = pickle.dumps({"weights": [1, 2, 3]}, protocol=4)
    params = {"modelId": "net", "metadata": {"type": "pytorch"}, "modelData": b64(data), "filename": "net.pt"}
    assert (await refused(rack, params)).code == "ERR_UNSAFE_MODEL"
    assert blobs(rack) == {}
    assert rack.registry.journal.stats().records == 0


async def test_a_pickle_is_stored_where_the_policy_allows_it(tmp_path: Path) -> None:
    rack = LocalRack(tmp_path, allow_pickle=True).open()
    data = pickle.dumps([1])
    params = {"modelId": "net", "metadata": {"type": "pytorch"}, "modelData": b64(data), "filename": "net.pt"}
    assert (await rack.call("storeModel", params))["created"] is True
    await rack.close()


async def test_a_broken_safetensors_header_is_refused_with_its_findings(rack: LocalRack) -> None:
    good = save({"w": numpy.zeros(4, dtype=numpy.float32)})
    params = {"modelId": "net", "metadata": {"type": "safetensors"}, "modelData": b64(good[:-1])}
    error = await refused(rack, params)
    assert error.code == "ERR_INVALID_MODEL_DATA"
    assert error.details["findings"][0]["severity"] == "error"
    params["modelData"] = b64(good)
    assert (await rack.call("storeModel", params))["created"] is True


async def test_a_store_that_hangs_is_not_the_models_fault(rack: LocalRack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.service.examining._READ_TIMEOUT_S", 0.05)
    cut = asyncio.Event()

    async def hang(*args: Any) -> bytes:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cut.set()
            raise
        return b""

    monkeypatch.setattr(rack.store, "read_at", hang)

    async def chunks() -> AsyncIterator[bytes]:
        yield b"bytes"

    with pytest.raises(ModelManagerError) as error:
        await rack.service.store_stream(
            "net",
            Metadata(type="custom"),
            filename="m",
            chunks=chunks(),
            size=5,
            sha256=None,
            context=Context(),
        )
    assert (error.value.code, error.value.retryable) == ("ERR_STORAGE_UNAVAILABLE", True)
    await asyncio.wait_for(cut.wait(), 5)


async def test_nobody_looks_on_into_files_whose_caller_is_gone(
    rack: LocalRack, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    began, go_on = threading.Event(), threading.Event()

    def slow(path: str, source: Source) -> list[Finding]:
        looks.append(path)
        began.set()
        go_on.wait(10)
        return []

    monkeypatch.setitem(cast("dict[str, Any]", HOOKS), "gguf", slow)
    files = [{"path": f"{i}.gguf", "data": b64(b"GGUF" + bytes([i]))} for i in range(9)]
    params = {"modelId": "net", "metadata": {"type": "gguf"}, "files": files}
    call = asyncio.create_task(rack.call("storeModel", params))
    assert await asyncio.to_thread(began.wait, 10)
    call.cancel()
    await asyncio.wait([call])
    go_on.set()
    await rack.store_bytes("other", "1.0.0", b"x")
    await asyncio.sleep(0.1)
    assert len(looks) == 1


async def test_a_format_that_is_not_on_the_list_is_refused(tmp_path: Path) -> None:
    rack = LocalRack(tmp_path, formats=frozenset({"onnx"})).open()
    with pytest.raises(ModelManagerError) as error:
        await rack.store_bytes("net", "1.0.0", b"x")
    assert error.value.code == "ERR_UNSUPPORTED_FORMAT"
    assert error.value.details["supported"] == ["onnx"]
    await rack.close()


async def test_a_wrong_checksum_is_told_with_both(rack: LocalRack) -> None:
    params = {
        "modelId": "net",
        "metadata": {"type": "custom"},
        "modelData": b64(b"bytes"),
        "checksum": "sha256:" + "0" * 64,
    }
    error = await refused(rack, params)
    assert error.code == "ERR_CHECKSUM_MISMATCH"
    assert error.details["actual"] == f"sha256:{sha256(b'bytes')}"


async def test_the_placement_is_recorded(rack: LocalRack) -> None:
    await rack.store_bytes("net", "1.0.0", b"bytes")
    replicas = (await rack.call("getModelMetadata", {"modelId": "net"}))["replicas"]
    assert len(replicas) == 1
    assert set(replicas) <= {"rack-2", "rack-3"}


async def test_recently_stored_bytes_are_answered_from_memory(rack: LocalRack) -> None:
    reply = await rack.store_bytes("net", "1.0.0", b"bytes")
    (rack.folder / "models" / reply["storageKey"]).unlink()
    got = await rack.call("getModel", {"modelId": "net", "delivery": "inline"})
    assert base64.b64decode(got["modelData"]) == b"bytes"


async def test_files_that_were_read_for_one_answer_are_kept_together_for_the_next(rack: LocalRack) -> None:
    files = [{"path": path, "data": b64(path.encode())} for path in "abcd"]
    reply = await rack.call("storeModel", {"modelId": "net", "metadata": {"type": "custom"}, "files": files})
    rack.cache.forget("net", None)
    first = await rack.call("getModel", {"modelId": "net"})
    for file in reply["files"]:
        (rack.folder / "models" / file["storageKey"]).unlink()
    assert await rack.call("getModel", {"modelId": "net"}) == first


async def test_bytes_that_went_bad_are_never_answered(rack: LocalRack) -> None:
    reply = await rack.store_bytes("net", "1.0.0", b"bytes")
    rack.cache.forget("net", "1.0.0")
    (rack.folder / "models" / reply["storageKey"]).write_bytes(b"bytez")
    with pytest.raises(ModelManagerError, match="ERR_CHECKSUM_MISMATCH"):
        await rack.call("getModel", {"modelId": "net", "delivery": "inline"})


async def test_what_is_larger_than_a_message_may_hold_is_delivered_by_address(rack: LocalRack) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield bytes(100_000)

    await rack.service.store_stream(
        "big",
        Metadata.model_validate({"type": "custom"}),
        filename="big.bin",
        chunks=chunks(),
        size=None,
        sha256=None,
        context=Context(),
    )
    got = await rack.call("getModel", {"modelId": "big"})
    assert got["files"][0]["url"].endswith("/api/models/big/versions/1.0.0/files/big.bin")
    assert "expiresAt" in got
    with pytest.raises(ModelManagerError) as error:
        await rack.call("getModel", {"modelId": "big", "delivery": "inline"})
    assert error.value.code == "ERR_MODEL_TOO_LARGE"
    assert error.value.details["maxInlineSize"] == 10**6


async def test_files_of_one_version_with_the_same_bytes_are_stored_once(rack: LocalRack) -> None:
    files = [{"path": path, "data": b64(b"same")} for path in ("a", "b")]
    reply = await rack.call("storeModel", {"modelId": "net", "metadata": {"type": "custom"}, "files": files})
    assert len({file["storageKey"] for file in reply["files"]}) == 1
    assert len(blobs(rack)) == 1
