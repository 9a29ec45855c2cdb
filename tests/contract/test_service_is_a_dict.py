"""The whole service behaves as a plain dictionary of models would, also across restarts at any point.

Hypothesis drives 10,000 random operations through the dispatcher over a real journal and a real disk store, beside the
smallest model of what the contract says, and compares everything that can be seen.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from schemas.errors import ModelManagerError
from tests.rack import LocalRack

MODELS = st.sampled_from(["bert", "org/bert", "org/gpt"])
VERSIONS = st.sampled_from(["1.0.0", "1.1.0", "2.0.0"])
ALIASES = st.sampled_from(["prod", "canary"])
BYTES = st.sampled_from([b"", b"one", b"two", b"three" * 100])
TAGS = st.lists(st.sampled_from(["nlp", "vision"]), unique=True, max_size=2)
KEYS = st.one_of(st.none(), st.integers(0, 5).map(str))


@dataclass
class Version:
    data: bytes
    metadata: dict[str, Any]
    revision: int = 1
    deleted: bool = False


@dataclass
class Model:
    versions: dict[str, Version] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def latest(self) -> str | None:
        return next((name for name, v in reversed(self.versions.items()) if not v.deleted), None)


class ServiceIsADict(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="model-manager-"))
        self.loop = asyncio.new_event_loop()
        self.rack = self.loop.run_until_complete(self._open())
        self.models: dict[str, Model] = {}
        self.answers: dict[str, tuple[Any, Any]] = {}  # key -> request, reply
        self.unrecorded: set[str] = set()  # those of them that no record has

    async def _open(self) -> LocalRack:
        return LocalRack(self.folder).open()

    def teardown(self) -> None:
        self.loop.run_until_complete(self.rack.close())
        self.loop.close()
        shutil.rmtree(self.folder)

    def call(self, method: str, params: dict[str, Any], key: str | None = None) -> Any:
        """The reply, or the error's code. With a key, also what the contract says of repeats."""
        request = (method, params)
        before = self.answers.get(key or "")
        try:
            reply = self.loop.run_until_complete(self.rack.call(method, params, key=key))
        except ModelManagerError as error:
            reply = error.code
        if before is not None:
            if before[0] == request:
                assert reply == before[1], "a repeat gets the same answer"
            else:
                assert reply == "ERR_CONFLICT", "a key belongs to one request"
            return None
        return reply

    def answered(
        self, key: str | None, method: str, params: dict[str, Any], reply: Any, *, recorded: bool = True
    ) -> None:
        """A repeat gets this answer: until a restart, if it had no effect whose record would tell."""
        if key is not None:
            self.answers[key] = ((method, params), reply)
            if not recorded:
                self.unrecorded.add(key)

    def live(self, model: str, version: str) -> Version | None:
        found = self.models.get(model, Model()).versions.get(version)
        return None if found is None or found.deleted else found

    # --- what callers do ---

    @rule(model=MODELS, version=VERSIONS, data=BYTES, tags=TAGS, key=KEYS)
    def store(self, model: str, version: str, data: bytes, tags: list[str], key: str | None) -> None:
        import base64

        metadata = {"type": "custom", "version": version, "tags": tags}
        params = {"modelId": model, "metadata": metadata, "modelData": base64.b64encode(data).decode()}
        reply = self.call("storeModel", params, key)
        if reply is None:
            return
        known = self.models.get(model, Model())
        existing = known.versions.get(version)
        if existing is None:
            assert reply["created"] is True
            assert reply["checksum"] == "sha256:" + hashlib.sha256(data).hexdigest()
            stored = Version(data, {**metadata, "description": ""})
            self.models.setdefault(model, Model()).versions[version] = stored
            self.answered(key, "storeModel", params, reply)
        elif existing.data != data:
            assert reply == "ERR_MODEL_ALREADY_EXISTS"
        else:
            assert reply["created"] is False
            had_effect, existing.deleted = existing.deleted, False
            self.answered(key, "storeModel", params, reply, recorded=had_effect)

    @rule(model=MODELS, version=VERSIONS, note=st.one_of(st.none(), st.integers(0, 3)), key=KEYS)
    def update(self, model: str, version: str, note: int | None, key: str | None) -> None:
        params = {"modelId": model, "version": version, "metadata": {"note": note}}
        reply = self.call("updateModelMetadata", params, key)
        if reply is None:
            return
        found = self.live(model, version)
        if found is None:
            assert reply == "ERR_MODEL_NOT_FOUND"
            return
        found.revision += 1
        found.metadata = {k: v for k, v in {**found.metadata, "note": note}.items() if v is not None}
        assert (reply["revision"], reply["metadata"]) == (found.revision, found.metadata)
        self.answered(key, "updateModelMetadata", params, reply)

    @rule(model=MODELS, version=VERSIONS, revision=st.integers(1, 3))
    def update_expecting(self, model: str, version: str, revision: int) -> None:
        reply = self.call(
            "updateModelMetadata",
            {"modelId": model, "version": version, "metadata": {}, "expectedRevision": revision},
        )
        found = self.live(model, version)
        if found is None:
            assert reply == "ERR_MODEL_NOT_FOUND"
        elif found.revision != revision:
            assert reply == "ERR_CONFLICT"
        else:
            found.revision += 1

    @rule(model=MODELS, version=st.one_of(st.none(), VERSIONS), purge=st.booleans(), key=KEYS)
    def delete(self, model: str, version: str | None, purge: bool, key: str | None) -> None:
        params: dict[str, Any] = {"modelId": model, "purge": purge}
        if version is not None:
            params["version"] = version
        reply = self.call("deleteModel", params, key)
        if reply is None:
            return
        known = self.models.get(model, Model())
        chosen = [name for name, v in known.versions.items() if version in (None, name) and (purge or not v.deleted)]
        if not chosen:
            assert reply == "ERR_MODEL_NOT_FOUND"
            return
        assert reply["versions"] == chosen
        assert ("restorableUntil" in reply) is not purge
        for name in chosen:
            if purge:
                del known.versions[name]
                known.aliases = {a: v for a, v in known.aliases.items() if v != name}
            else:
                known.versions[name].deleted = True
        if not known.versions:
            del self.models[model]
        self.answered(key, "deleteModel", params, reply)

    @rule(model=MODELS, version=st.one_of(st.none(), VERSIONS))
    def restore(self, model: str, version: str | None) -> None:
        params = {"modelId": model} if version is None else {"modelId": model, "version": version}
        reply = self.call("restoreModel", params)
        versions = self.models.get(model, Model()).versions
        chosen = [name for name, v in versions.items() if v.deleted and version in (None, name)]
        if not chosen:
            assert reply == "ERR_MODEL_NOT_FOUND"
            return
        assert reply["versions"] == chosen
        for name in chosen:
            versions[name].deleted = False

    @rule(model=MODELS, alias=ALIASES, version=VERSIONS, expected=st.one_of(st.just("any"), st.none(), VERSIONS))
    def set_alias(self, model: str, alias: str, version: str, expected: str | None) -> None:
        params: dict[str, Any] = {"modelId": model, "alias": alias, "version": version}
        if expected != "any":
            params["expectedVersion"] = expected
        reply = self.call("setAlias", params)
        if self.live(model, version) is None:
            assert reply == "ERR_MODEL_NOT_FOUND"
            return
        aliases = self.models[model].aliases
        if expected not in ("any", aliases.get(alias)):
            assert reply == "ERR_CONFLICT"
            return
        assert reply["previous"] == aliases.get(alias)
        aliases[alias] = version

    @rule(model=MODELS, alias=ALIASES)
    def delete_alias(self, model: str, alias: str) -> None:
        reply = self.call("deleteAlias", {"modelId": model, "alias": alias})
        known = self.models.get(model)
        if known is None:
            assert reply == "ERR_MODEL_NOT_FOUND"
        elif alias not in known.aliases:
            assert reply == "ERR_NOT_FOUND"
        else:
            assert reply["previous"] == known.aliases.pop(alias)

    @rule()
    def restart(self) -> None:
        async def again() -> LocalRack:
            await self.rack.close()
            return await self._open()

        self.rack = self.loop.run_until_complete(again())
        for key in self.unrecorded:
            del self.answers[key]
        self.unrecorded.clear()

    # --- what callers see ---

    @rule(model=MODELS, reference=st.one_of(VERSIONS, ALIASES, st.just("latest")))
    def get(self, model: str, reference: str) -> None:
        reply = self.call("getModel", {"modelId": model, "version": reference, "delivery": "inline"})
        known = self.models.get(model, Model())
        name = known.latest() if reference == "latest" else known.aliases.get(reference, reference)
        found = self.live(model, name or "")
        if found is None:
            assert reply == "ERR_MODEL_NOT_FOUND"
        else:
            import base64

            assert reply["version"] == name
            assert base64.b64decode(reply["modelData"]) == found.data

    @rule(tag=st.sampled_from(["nlp", "vision"]))
    def search(self, tag: str) -> None:
        reply = self.call("searchModels", {"criteria": {"tags": [tag]}, "sort": "-size"})
        expected = sorted(
            (-len(v.data), model, name)
            for model, known in self.models.items()
            for name, v in known.versions.items()
            if not v.deleted and tag in v.metadata["tags"]
        )
        assert [(-e["size"], e["modelId"], e["version"]) for e in reply["models"]] == expected

    @invariant()
    def lists_the_same(self) -> None:
        listed = []
        cursor: dict[str, str] = {}
        while True:
            reply = self.call("listModels", {"limit": 2, **cursor})
            listed += reply["models"]
            if "nextCursor" not in reply:
                break
            cursor = {"cursor": reply["nextCursor"]}
        expected = [
            (model, name, v.revision, v.metadata, sorted(a for a, t in known.aliases.items() if t == name))
            for model, known in sorted(self.models.items())
            for name, v in sorted(known.versions.items())
            if not v.deleted
        ]
        assert [(e["modelId"], e["version"], e["revision"], e["metadata"], e["aliases"]) for e in listed] == expected

    @invariant()
    def counts_the_same(self) -> None:
        stats = self.call("getStorageStats", {})
        versions = [v for known in self.models.values() for v in known.versions.values()]
        assert stats["registry"]["versions"] == sum(not v.deleted for v in versions)
        assert stats["storage"]["blobs"] == len({v.data for v in versions})
        assert stats["storage"]["blobBytes"] == sum(len(data) for data in {v.data for v in versions})


TestServiceIsADict = pytest.mark.filterwarnings("ignore::ResourceWarning")(ServiceIsADict.TestCase)
TestServiceIsADict.settings = settings(
    max_examples=100,
    stateful_step_count=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
