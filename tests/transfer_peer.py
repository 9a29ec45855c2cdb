"""A worker's HTTP service as small as pushing and pulling need, with real files, that can be told to misbehave."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from schemas.errors import ModelManagerError
from schemas.ids import digest_of, hex_of, new_ulid
from schemas.model import version_digest

TOKEN = "let-me-in"
_CREATED = "2026-01-01T00:00:00.000Z"


class TransferPeer:
    """Takes uploads whole (`part_size` None) or in parts, and serves the files of one version.

    `faults` has the misbehaviours of the next transfers of bytes, first one first: `cut` ends the connection in the
    middle, `expired` answers 403, `busy` 503, `wrong` serves other bytes, `whole` ignores a range.
    """

    def __init__(self, folder: Path, part_size: int | None) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.part_size = part_size
        self.url = ""
        self.faults: list[str] = []
        self.seen: Counter[str] = Counter()
        self.keys: list[str] = []
        self.files: dict[str, dict[str, Any]] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.present: set[str] = set()
        self.upload_id = new_ulid()
        self.aborted = False
        self.forget_once = False
        self.together = asyncio.Barrier(1)  # so many requests with bytes are answered only together

    # --- methods ---

    async def create_upload(self, request: web.Request) -> web.Response:
        self.keys.append(request.headers["Idempotency-Key"])
        if self._next("busy"):
            return _answer(ModelManagerError("ERR_OVERLOADED", retryAfterMs=10).body(), 429)
        for file in (await request.json())["files"]:
            self.files[file["path"]] = file
        return web.json_response(self._upload(), status=201)

    async def get_upload(self, request: web.Request) -> web.Response:
        self.seen["getUpload"] += 1
        return web.json_response(self._upload())

    async def sign_parts(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.seen["signed"] += len(asked["parts"])
        urls = [
            {
                "number": part["number"],
                "url": f"{self.url}/store/{asked['path']}?part={part['number']}&credential=a%2Fb",
                "headers": {"x-amz-checksum-sha256": base64.b64encode(bytes.fromhex(hex_of(part["sha256"]))).decode()},
            }
            for part in asked["parts"]
        ]
        return web.json_response({**self._upload(), "urls": urls})

    async def complete(self, request: web.Request) -> web.Response:
        if self.forget_once:
            self.forget_once = False
            self.parts.clear()
        for path, file in self.files.items():
            if path in self.present:
                continue
            data = b"".join(self.parts[key] for key in sorted(self.parts) if key[0] == path)
            if digest_of(hashlib.sha256(data).hexdigest()) != file["sha256"]:
                return _answer(ModelManagerError("ERR_CONFLICT", "The bytes are not all there yet.").body(), 409)
            target = self.folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            self.present.add(path)
        return web.json_response({"success": True, "jobId": new_ulid(), "state": "running"})

    async def get_job(self, request: web.Request) -> web.Response:
        self.seen["getJob"] += 1
        state = "succeeded" if self.seen["getJob"] > 1 else "running"
        reply = {"success": True, "jobId": "J", "method": "completeUpload", "state": state, "progress": {}}
        return web.json_response({**reply, "result": self._upload()})

    async def abort(self, request: web.Request) -> web.Response:
        self.aborted = True
        return web.json_response({"success": True, "uploadId": self.upload_id, "state": "aborted"})

    async def store_model(self, request: web.Request) -> web.Response:
        params = await request.json()
        self.seen["storeModel"] += 1
        known = self._known(params["modelId"], params["metadata"]["version"])
        return web.json_response({**known, "createdAt": _CREATED, "created": True}, status=201)

    async def metadata(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return _answer(ModelManagerError("ERR_UNAUTHORIZED").body(), 401)
        return web.json_response(self._known(request.match_info["model"], "1.0.0"))

    # --- bytes ---

    async def put(self, request: web.Request) -> web.Response:
        self.seen["put"] += 1
        await asyncio.wait_for(self.together.wait(), 10)
        if self._next("expired"):
            return web.Response(status=403, text="<Error><Code>AccessDenied</Code></Error>")
        if self._next("cut"):
            await request.content.readany()
            assert request.transport is not None
            request.transport.abort()
        data = await request.read()
        declared = request.headers.get("x-amz-checksum-sha256")
        if declared not in (None, base64.b64encode(hashlib.sha256(data).digest()).decode()):
            return web.Response(status=400, text="<Error><Code>BadDigest</Code></Error>")
        if self.part_size is not None:
            assert request.raw_path.endswith("credential=a%2Fb")  # a signature covers every escape
        self.parts[(request.match_info["path"], int(request.query.get("part", 1)))] = data
        return web.json_response({"success": True})

    async def get_file(self, request: web.Request) -> web.StreamResponse:
        self.seen["get"] += 1
        if self._next("expired"):
            return web.Response(status=403)
        data = (self.folder / request.match_info["path"]).read_bytes()
        if self._next("wrong"):
            data = bytes(len(data))
        start = request.http_range.start or 0
        if start and not self._next("whole"):
            self.seen["ranges"] += 1
            headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            return web.Response(body=data[start:], status=206, headers=headers)
        if self._next("cut"):
            response = web.StreamResponse(headers={"Content-Length": str(len(data))})
            await response.prepare(request)
            await response.write(data[: len(data) // 2])
            await asyncio.sleep(0)
            assert request.transport is not None
            request.transport.close()
            return response
        return web.Response(body=data)

    # --- views ---

    def _next(self, fault: str) -> bool:
        if self.faults and self.faults[0] == fault:
            self.faults.pop(0)
            return True
        return False

    def _upload(self) -> dict[str, Any]:
        states = []
        for path, file in self.files.items():
            state = {**file, "present": path in self.present}
            if not state["present"] and self.part_size is None:
                state["url"] = f"{self.url}/api/uploads/{self.upload_id}/files/{path}"
            elif not state["present"]:
                assert self.part_size is not None
                state["partSize"] = self.part_size
                state["parts"] = -(-file["size"] // self.part_size)
                state["received"] = [number for name, number in self.parts if name == path]
            states.append(state)
        upload = {"success": True, "uploadId": self.upload_id, "modelId": "m", "version": "1.0.0", "state": "open"}
        return {**upload, "expiresAt": _CREATED, "files": states}

    def _known(self, model_id: str, version: str) -> dict[str, Any]:
        files: list[dict[str, Any]] = []
        for file in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            data, path = file.read_bytes(), file.relative_to(self.folder).as_posix()
            checksum = digest_of(hashlib.sha256(data).hexdigest())
            files.append({"path": path, "size": len(data), "checksum": checksum, "mediaType": "x/y", "storageKey": "k"})
        digest = digest_of(version_digest((f["path"], f["size"], hex_of(f["checksum"])) for f in files))
        return {
            "success": True,
            "modelId": model_id,
            "version": version,
            "metadata": {"type": "custom", "version": version},
            "checksum": files[0]["checksum"] if len(files) == 1 else digest,
            "size": sum(file["size"] for file in files),
            "files": files,
        }


def _answer(body: dict[str, Any], status: int) -> web.Response:
    return web.json_response(body, status=status)


@asynccontextmanager
async def transfer_peer(folder: Path, *, part_size: int | None = None) -> AsyncIterator[TransferPeer]:
    peer = TransferPeer(folder, part_size)
    app = web.Application(client_max_size=10**9)
    app.add_routes(
        [
            web.post("/api/uploads", peer.create_upload),
            web.get("/api/uploads/{upload}", peer.get_upload),
            web.delete("/api/uploads/{upload}", peer.abort),
            web.post("/api/uploads/{upload}/parts", peer.sign_parts),
            web.post("/api/uploads/{upload}/complete", peer.complete),
            web.put("/api/uploads/{upload}/files/{path:.+}", peer.put),
            web.put("/store/{path:.+}", peer.put),
            web.post("/api/models", peer.store_model),
            web.get("/api/models/{model}", peer.metadata),
            web.get("/api/models/{model}/versions/{version}", peer.metadata),
            web.get("/api/models/{model}/versions/{version}/files/{path:.+}", peer.get_file),
            web.get("/api/jobs/{job}", peer.get_job),
        ]
    )
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    peer.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield peer
    finally:
        await runner.cleanup()
