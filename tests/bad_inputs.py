"""Requests that break the contract, by the rows of the table of bad inputs, with the code each must get.

They are written against a rack that `seed` has prepared: the model `net` with version `1.0.0` and alias `prod`, the
model `gone` whose only version is deleted, and one open upload.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.rack import LocalRack

REQUEST, METADATA, DATA = "ERR_INVALID_REQUEST", "ERR_INVALID_METADATA", "ERR_INVALID_MODEL_DATA"
UPLOAD = "{upload}"  # stands for the id of the open upload
ZEROS = "sha256:" + "0" * 64
NOBODYS = "01ARZ3NDEKTSV4RRFFQ69G5FAV"


@dataclass(frozen=True, slots=True)
class BadInput:
    """One request. `body` is sent as it stands if it is bytes."""

    row: str
    what: str
    method: str
    body: bytes | dict[str, Any]
    code: str = REQUEST

    @property
    def name(self) -> str:
        return f"{self.row} {self.method} {self.what}"

    def encoded(self, upload: str) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).replace(UPLOAD, upload).encode()


async def seed(rack: LocalRack) -> str:
    """Prepare the rack; returns the id of the open upload."""
    await rack.store_bytes("net", "1.0.0", b"weights")
    await rack.call("setAlias", {"modelId": "net", "alias": "prod", "version": "1.0.0"})
    await rack.store_bytes("gone", "1.0.0", b"deleted")
    await rack.call("setAlias", {"modelId": "gone", "alias": "prod", "version": "1.0.0"})
    await rack.call("deleteModel", {"modelId": "gone"})
    files = [{"path": "a.bin", "size": 3, "sha256": ZEROS}]
    created = await rack.call("createUpload", {"modelId": "new", "version": "1.0.0", "files": files})
    return str(created["uploadId"])


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def storing(**changed: Any) -> dict[str, Any]:
    return {"modelId": "new", "metadata": {"type": "custom"}, "modelData": b64(b"bytes"), **changed}


def described(**metadata: Any) -> dict[str, Any]:
    return storing(metadata={"type": "custom", **metadata})


def of_files(*paths: str) -> dict[str, Any]:
    files = [{"path": path, "data": b64(path.encode())} for path in paths]
    return {"modelId": "new", "metadata": {"type": "custom"}, "files": files}


def planned(*files: dict[str, Any]) -> dict[str, Any]:
    complete = [{"path": f"{number}.bin", "size": 1, "sha256": ZEROS, **file} for number, file in enumerate(files)]
    return {"modelId": "new", "version": "2.0.0", "files": complete}


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


BODIES: dict[str, tuple[str, bytes]] = {
    "an empty body": ("B1", b""),
    "no JSON": ("B2", b"modelId=net"),
    "an array": ("B3", b'["net"]'),
    "a text": ("B3", b'"net"'),
    "a number": ("B3", b"5"),
    "null": ("B3", b"null"),
    "a body that is cut": ("B4", b'{"modelId": "net"'),
    "a byte order mark": ("B5", b'\xef\xbb\xbf{"modelId": "net"}'),
    "UTF-16": ("B5", '{"modelId": "net"}'.encode("utf-16")),
    "bytes that are not UTF-8": ("B6", b'{"modelId": "n\xff"}'),
    "a surrogate in UTF-8": ("B6", b'{"modelId": "n\xed\xa0\x80"}'),
    "an overlong slash": ("B6", b'{"modelId": "a\xc0\xafb"}'),
    "a lone surrogate by escape": ("B6", b'{"modelId": "net", "\\ud800": 1}'),
    "a NUL byte": ("B7", b'{"modelId": "net"}\x00'),
    "a control character in a text": ("B7", b'{"modelId": "n\x01t"}'),
    "more after the end": ("B8", b'{"modelId": "net"} {}'),
    "a depth of 65": ("B9", b'{"modelId": ' + b"[" * 64 + b"]" * 64 + b"}"),
    "a depth of 100,000": ("B9", b'{"modelId": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "objects that are never closed": ("B9", b'{"a":' * 100_000),
    "a body over 2 MB": ("B10", b'{"modelId": "net"}' + b" " * 2_000_000),
    "a key twice": ("B11", b'{"modelId": "net", "modelId": "gone"}'),
    "a key twice, once by escape": ("B11", b'{"modelId": "net", "model\\u0049d": "gone"}'),
    "a key twice after 200,000 others": (
        "B11",
        b"{" + b"".join(b'"%d":0,' % n for n in range(180_000)) + b'"x":1,"x":2}',
    ),
    "NaN": ("B14", b'{"modelId": NaN}'),
    "Infinity": ("B14", b'{"modelId": -Infinity}'),
    "1e400": ("B14", b'{"modelId": 1e400}'),
    "an integer of 5,000 digits": ("B14", b'{"modelId": ' + b"9" * 5000 + b"}"),
    "a comma too many": ("B2", b'{"modelId": "net",}'),
    "a comment": ("B2", b'{"modelId": "net"} // the model'),
    "text in single quotes": ("B2", b"{'modelId': 'net'}"),
}

MODEL_IDS: dict[str, tuple[str, Any]] = {
    "a parent folder": ("B18", "../x"),
    "a parent folder inside": ("B18", "a/../b"),
    "an absolute path": ("B19", "/abs"),
    "an empty part": ("B20", "a//b"),
    "three parts": ("B20", "a/b/c"),
    "a slash at the end": ("B20", "a/"),
    "a dot": ("B21", "."),
    "two dots": ("B21", ".."),
    "two dots inside a name": ("B21", "a..b"),
    "a drive": ("B22", "C:\\x"),
    "a backslash": ("B22", "a\\b"),
    "an escaped parent": ("B23", "%2e%2e%2f"),
    "a twice escaped parent": ("B23", "%252e%252e%252f"),
    "a semicolon": ("B23", "net;x=../y"),
    "a question mark": ("B23", "net?version=1"),
    "a hash": ("B23", "net#x"),
    "a Cyrillic look-alike": ("B24", "nеt"),
    "a letter and a combining accent": ("B24", "modèle"),
    "a letter with an accent": ("B24", "modèle"),
    "a full-width letter": ("B24", "ｎet"),
    "an Arabic digit": ("B24", "net١"),
    "a right-to-left override": ("B24", "net\u202etxt"),
    "a zero-width joiner": ("B24", "ne\u200dt"),
    "an emoji": ("B24", "net💾"),
    "a hidden name": ("B25", ".git"),
    "a name of a language": ("B25", "__proto__"),
    "a reserved second part": ("B25", "org/versions"),
    "an option": ("B25", "--help"),
    "two hyphens": ("B25", "a--b"),
    "10,000 characters": ("B26", "n" * 10_000),
    "97 characters": ("B26", "n" * 97),
    "no character": ("B26", ""),
    "a newline at the end": ("B28", "net\n"),
    "a terminal escape": ("B28", "net\x1b[2J"),
    "a NUL": ("B7", "net\x00"),
    "a blank": ("B20", "my net"),
    "a number": ("B12", 5),
    "a flag": ("B12", True),
    "a list": ("B12", ["net"]),
    "an object": ("B12", {"id": "net"}),
    "null": ("B15", None),
}

LABELS: dict[str, tuple[str, Any]] = {
    "the reserved name": ("B25", "latest"),
    "the reserved name in capitals": ("B25", "LATEST"),
    "a slash": ("B18", "1/0"),
    "a parent folder": ("B18", ".."),
    "a colon": ("B23", "1:0"),
    "65 characters": ("B26", "1" * 65),
    "no character": ("B26", ""),
    "a newline at the end": ("B28", "1.0.0\n"),
    "a full-width digit": ("B24", "１.0"),
    "a number": ("B12", 1.0),
}

PATHS: dict[str, tuple[str, tuple[str, ...]]] = {
    "a parent folder": ("B18", ("../x",)),
    "a parent folder inside": ("B18", ("a/../b",)),
    "an absolute path": ("B19", ("/etc/passwd",)),
    "an empty part": ("B20", ("a//b",)),
    "a slash at the end": ("B20", ("a/",)),
    "no character": ("B20", ("",)),
    "a dot": ("B21", ("./a",)),
    "a backslash": ("B22", ("..\\x",)),
    "a drive and a backslash": ("B22", ("C:\\x",)),
    "a NUL": ("B7", ("a\x00.bin",)),
    "a newline": ("B28", ("a\r\nX-Injected: 1",)),
    "a terminal escape": ("B28", ("a\x1b[2J",)),
    "a terminal escape of one character": ("B28", ("a\x9b2J",)),
    "a path of 513 bytes": ("B26", ("é" * 256 + "x",)),
    "the same path twice": ("B66", ("a", "b", "a")),
    "paths that differ in case only": ("B66", ("config.json", "Config.JSON")),
    "folders that differ in case only": ("B66", ("A/x", "a/X")),
    "paths that differ in Unicode form only": ("B66", ("mod\u00e8le", "mode\u0300le")),
    "a file that is a folder too": ("B66", ("a", "a/b")),
    "a file that is a folder in another case": ("B66", ("A/b", "a")),
    "2,001 files": ("B35", tuple(f"{n}" for n in range(2001))),
    "no file": ("B35", ()),
}

DIGESTS: dict[str, Any] = {
    "no algorithm": "0" * 64,
    "another algorithm": "md5:" + "0" * 32,
    "63 digits": "sha256:" + "0" * 63,
    "65 digits": "sha256:" + "0" * 65,
    "capitals": "sha256:" + "A" * 64,
    "no digit": "sha256:" + "g" * 64,
    "a path": "sha256:../../../../etc/passwd",
    "a newline at the end": ZEROS + "\n",
    "full-width digits": "sha256:" + "０" * 64,
    "a number": 0,
}

BASE64: dict[str, Any] = {
    "no base64": "not base64!",
    "a cut group": "QUJ",
    "too much padding": "QUJD====",
    "padding alone": "====",
    "padding inside": "QQ==QUJD",
    "padding between": "QUJD=QUJ",
    "no padding": "QUI",
    "a newline": "QUJD\nQUJD",
    "a blank": "QUJD QUJD",
    "the alphabet of URLs": "-_-_",
    "Unicode": "QUJDé",
    "a number": 5,
    "a list": ["QUJD"],
    "null": None,
}

BAD_METADATA: dict[str, tuple[str, Any]] = {
    "no type": ("B15", {"version": "1.0.0"}),
    "a type in capitals": ("B16", {"type": "ONNX"}),
    "a type that is a path": ("B16", {"type": "../x"}),
    "a type that is a number": ("B12", {"type": 5}),
    "a type of 33 characters": ("B26", {"type": "x" * 33}),
    "a text": ("B15", "custom"),
    "a list": ("B15", [{"type": "custom"}]),
    "null": ("B15", None),
    "a null member": ("B15", {"type": "custom", "note": None}),
    "a null description": ("B15", {"type": "custom", "description": None}),
    "a description that is a number": ("B12", {"type": "custom", "description": 5}),
    "a description of 16,385 characters": ("B34", {"type": "custom", "description": "x" * 16_385}),
    "more than 64 KiB": ("B34", {"type": "custom", "note": "x" * 65_536}),
    "more than 64 KiB in UTF-8": ("B34", {"type": "custom", "note": "é" * 32_768}),
    "a NUL in a text": ("B28", {"type": "custom", "note": "a\x00b"}),
    "a NUL in a name": ("B28", {"type": "custom", "a\x00b": 1}),
    "a NUL deep inside": ("B28", {"type": "custom", "note": [{"a": "\x00"}]}),
    "65 tags": ("B35", {"type": "custom", "tags": [str(n) for n in range(65)]}),
    "10,000 tags": ("B35", {"type": "custom", "tags": [str(n) for n in range(10_000)]}),
    "a tag twice": ("B35", {"type": "custom", "tags": ["a", "a"]}),
    "an empty tag": ("B35", {"type": "custom", "tags": [""]}),
    "a tag of 129 characters": ("B35", {"type": "custom", "tags": ["x" * 129]}),
    "a tag that is a number": ("B12", {"type": "custom", "tags": [1]}),
    "tags that are a text": ("B12", {"type": "custom", "tags": "prod"}),
    "an integer of 2^53": ("B13", {"type": "custom", "n": 2**53}),
    "an integer of -2^53": ("B13", {"type": "custom", "n": -(2**53)}),
    "an integer of 2^64 deep inside": ("B13", {"type": "custom", "n": {"a": [2**64]}}),
}

INTEGERS: dict[str, tuple[str, Any]] = {
    "a float": ("B12", 1.0),
    "a text": ("B12", "1"),
    "a flag": ("B12", True),
    "a list": ("B12", [1]),
    "null": ("B15", None),
    "2^53": ("B13", 2**53),
    "2^64": ("B13", 2**64),
    "-1": ("B13", -1),
}

INTEGER_PARAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "limit": ("listModels", {}),
    "waitMs": ("validateModel", {"modelId": "net"}),
    "expectedRevision": ("updateModelMetadata", {"modelId": "net", "metadata": {"note": 1}}),
    "after": ("getChanges", {"epoch": 1}),
    "epoch": ("getChanges", {"after": 0}),
}

CRITERIA: dict[str, Any] = {
    "a type that is null": {"type": None},
    "tags that are a text": {"tags": "prod"},
    "tags that are numbers": {"tags": [1]},
    "tags that are null": {"tags": None},
    "65 tags": {"tags": [str(n) for n in range(65)]},
    "a size that is a number": {"size": 5},
    "a size with an unknown bound": {"size": {"minimum": 5}},
    "a size with a text as bound": {"size": {"min": "5"}},
    "a negative size": {"size": {"max": -1}},
    "a time that is a number": {"createdAt": {"from": 0}},
    "a time without a zone": {"createdAt": {"from": "2024-01-01T00:00:00"}},
    "a day that does not exist": {"createdAt": {"to": "2024-02-30T00:00:00Z"}},
    "an hour that does not exist": {"createdAt": {"to": "2024-02-03T25:00:00Z"}},
    "a year before the first": {"createdAt": {"from": "0000-01-01T00:00:00Z"}},
    "a time in full-width digits": {"createdAt": {"from": "２０２４-01-01T00:00:00Z"}},
    "a time in a list": {"createdAt": ["2024-01-01T00:00:00Z"]},
    "an empty text": {"text": ""},
    "a text of 1,025 characters": {"text": "x" * 1025},
    "a type that is a number": {"type": 5},
    "an integer of 2^64": {"note": 2**64},
    "a text": "net",
    "a list": [],
    "null": None,
}

CURSORS: dict[str, Any] = {
    "no base64": "%%%",
    "base64 of something else": b64(b"something else"),
    "base64 of a number": b64(b"5"),
    "base64 of an object": b64(b"{}"),
    "base64 of a list that is too short": b64(b"[]"),
    "one of another query": b64(b'["0123456789abcdef","net","1.0.0"]'),
    "Unicode": "é",
    "no character": "",
    "2,049 characters": "A" * 2049,
    "a number": 5,
}

PARTS: dict[str, tuple[str, Any]] = {
    "part 0": ("B32", [{"number": 0, "sha256": ZEROS}]),
    "part 10,001": ("B32", [{"number": 10_001, "sha256": ZEROS}]),
    "part -1": ("B32", [{"number": -1, "sha256": ZEROS}]),
    "no part": ("B32", []),
    "1,001 parts": ("B32", [{"number": n, "sha256": ZEROS} for n in range(1, 1002)]),
    "a part without its digest": ("B29", [{"number": 1}]),
    "a part with a digest in capitals": ("B29", [{"number": 1, "sha256": ZEROS.upper()}]),
}


def _bodies() -> Iterator[BadInput]:
    for what, (row, body) in BODIES.items():
        yield BadInput(row, what, "getModelMetadata", body)
    yield BadInput("B15", "an unknown field", "getModelMetadata", {"modelId": "net", "verbose": True})
    yield BadInput("B15", "an unknown field of 100,000 characters", "ping", {"x" * 100_000: 1})
    yield BadInput("B15", "1,000 unknown fields", "ping", {f"x{n}": 1 for n in range(1000)})
    yield BadInput("B15", "a field with a name of another style", "getModelMetadata", {"model_id": "net"})
    yield BadInput("B15", "a missing field", "getModelMetadata", {})
    yield BadInput("B15", "a null where a field may only be absent", "deleteModel", {"modelId": "net", "version": None})
    yield BadInput("B15", "params where there are none", "getStorageStats", {"modelId": "net"})
    for method in ("", "storemodel", "../ping", "__init__", "store_model", "x" * 10_000, "ping\n"):
        yield BadInput("B16", "unknown", method, {}, "ERR_UNKNOWN_METHOD")
    yield BadInput("B16", "a type this rack does not know", "storeModel", described(type="nosuch"), _UNSUPPORTED)


_UNSUPPORTED = "ERR_UNSUPPORTED_FORMAT"


def _names() -> Iterator[BadInput]:
    for what, (row, name) in MODEL_IDS.items():
        yield BadInput(row, f"to {what}", "storeModel", storing(modelId=name))
        yield BadInput(row, f"of {what}", "deleteModel", {"modelId": name})
    yield BadInput("B27", "a twin in another case", "storeModel", storing(modelId="Net"), "ERR_CONFLICT")
    for what, (row, label) in LABELS.items():
        yield BadInput(row, f"a version with {what}", "storeModel", described(version=label), METADATA)
        yield BadInput(row, f"with {what}", "setAlias", {"modelId": "net", "alias": label, "version": "1.0.0"})
        yield BadInput(row, f"to a version with {what}", "setAlias", {"modelId": "net", "alias": "a", "version": label})
        yield BadInput(row, f"a version with {what}", "createUpload", {**planned({}), "version": label})
    for what, (row, paths) in PATHS.items():
        yield BadInput(row, what, "storeModel", of_files(*paths))
        yield BadInput(row, what, "createUpload", planned(*({"path": path} for path in paths)))
    for what in ("a parent folder", "an absolute path", "a backslash", "a NUL", "a terminal escape"):
        row, (path, *_) = PATHS[what]
        yield BadInput(row, f"a filename of {what}", "storeModel", storing(filename=path))
    for peers in (["Rack"], ["../x"], [""], ["a" * 33], "rack-2", [1], [f"r{n}" for n in range(257)]):
        yield BadInput("B35", f"peers {str(peers)[:20]}", "replicateModel", {"modelId": "net", "peers": peers})


def _bytes() -> Iterator[BadInput]:
    for what, digest in DIGESTS.items():
        yield BadInput("B29", f"a checksum with {what}", "storeModel", storing(checksum=digest))
        yield BadInput("B29", what, "createUpload", planned({"sha256": digest}))
    for what, text in BASE64.items():
        yield BadInput("B30", what, "storeModel", storing(modelData=text), DATA)
        with_data = {"modelId": "new", "metadata": {"type": "custom"}}
        files = [{"path": "good.bin", "data": b64(b"good")}, {"path": "bad.bin", "data": text}]
        yield BadInput("B30", f"a second file with {what}", "storeModel", {**with_data, "files": files}, DATA)
    too_much = b64(bytes(1_000_001))
    yield BadInput("B30", "a byte over the limit", "storeModel", storing(modelData=too_much), _TOO_LARGE)
    halves = [{"path": path, "data": b64(bytes(500_001))} for path in ("a", "b")]
    spread = {"modelId": "new", "metadata": {"type": "custom"}, "files": halves}
    yield BadInput("B30", "files over the limit together", "storeModel", spread, _TOO_LARGE)
    yield BadInput("B31", "other bytes than declared", "storeModel", storing(checksum=ZEROS), "ERR_CHECKSUM_MISMATCH")
    yield BadInput("B31", "no bytes", "storeModel", {"modelId": "new", "metadata": {"type": "custom"}})
    yield BadInput("B31", "bytes from two sources", "storeModel", storing(uploadId=NOBODYS))
    yield BadInput("B31", "a checksum for several files", "storeModel", {**of_files("a", "b"), "checksum": ZEROS})
    for what, (row, size) in INTEGERS.items():
        yield BadInput(row, f"a size of {what}", "createUpload", planned({"size": size}))
    yield BadInput("B30", "more than a model may have", "createUpload", planned({"size": 10**9 + 1}), _TOO_LARGE)
    largest = planned(*[{"size": 2**53 - 1}] * 2000)
    yield BadInput("B30", "sizes that add up beyond 2^53", "createUpload", largest, _TOO_LARGE)


_TOO_LARGE = "ERR_MODEL_TOO_LARGE"


def _members() -> Iterator[BadInput]:
    for what, (row, metadata) in BAD_METADATA.items():
        yield BadInput(row, f"metadata with {what}", "storeModel", storing(metadata=metadata), METADATA)
    yield BadInput("B9", "metadata of a depth of 65", "storeModel", described(note=nested(63)))
    yield BadInput("B15", "no metadata", "storeModel", {"modelId": "new", "modelData": ""}, METADATA)
    patches = {"another type": {"type": "onnx"}, "another version": {"version": "2.0.0"}, "no type": {"type": None}}
    refused = {"65 tags", "a NUL in a text", "an integer of 2^53", "more than 64 KiB", "a text", "null", "a list"}
    patches |= {what: metadata for what, (_, metadata) in BAD_METADATA.items() if what in refused}
    for what, patch in patches.items():
        yield BadInput("B34", what, "updateModelMetadata", {"modelId": "net", "metadata": patch}, METADATA)
    for param, (method, others) in INTEGER_PARAMS.items():
        for what, (row, value) in INTEGERS.items():
            yield BadInput(row, f"{param} {what}", method, {**others, param: value})
    for limit in (0, 1001):
        yield BadInput("B35", f"limit {limit}", "listModels", {"limit": limit})
    yield BadInput("B35", "waitMs 5001", "validateModel", {"modelId": "net", "waitMs": 5001})
    for what, criteria in CRITERIA.items():
        yield BadInput("B12", f"criteria with {what}", "searchModels", {"criteria": criteria})
    yield BadInput("B12", "an unknown order", "searchModels", {"sort": "name"})
    yield BadInput("B12", "an unknown delivery", "getModel", {"modelId": "net", "delivery": "ftp"})
    for what, cursor in CURSORS.items():
        yield BadInput("B33", f"a cursor that is {what}", "listModels", {"cursor": cursor})
        yield BadInput("B33", f"a cursor that is {what}", "searchModels", {"cursor": cursor, "sort": "-size"})


def _aliases_and_uploads() -> Iterator[BadInput]:
    alias = {"modelId": "net", "alias": "next", "version": "prod"}
    yield BadInput("B36", "to an alias", "setAlias", alias)
    yield BadInput("B36", "to itself", "setAlias", {**alias, "alias": "prod"})
    yield BadInput("B36", "onto a version", "setAlias", {**alias, "alias": "1.0.0", "version": "1.0.0"}, "ERR_CONFLICT")
    yield BadInput("B36", "to no version", "setAlias", {**alias, "version": "9.9.9"}, _NO_MODEL)
    deleted = {"modelId": "gone", "alias": "next", "version": "1.0.0"}
    yield BadInput("B36", "to a deleted version", "setAlias", deleted, _NO_MODEL)
    yield BadInput("B36", "of a deleted version", "getModel", {"modelId": "gone", "version": "prod"}, _NO_MODEL)
    yield BadInput("B36", "named like an alias", "storeModel", storing(modelId="net") | _PROD, "ERR_CONFLICT")
    stale = {"modelId": "net", "alias": "prod", "version": "1.0.0", "expectedVersion": "2.0.0"}
    yield BadInput("B36", "that was moved meanwhile", "setAlias", stale, "ERR_CONFLICT")
    yield BadInput("B36", "expected to be absent", "setAlias", {**stale, "expectedVersion": None}, "ERR_CONFLICT")
    yield BadInput("B36", "that is absent", "deleteAlias", {"modelId": "net", "alias": "none"}, "ERR_NOT_FOUND")
    for what, (row, parts) in PARTS.items():
        yield BadInput(row, what, "getUpload", {"uploadId": UPLOAD, "path": "a.bin", "parts": parts})
    yield BadInput("B32", "parts without a path", "getUpload", {"uploadId": UPLOAD, "parts": PARTS["part 0"][1]})
    yield BadInput("B32", "a path without parts", "getUpload", {"uploadId": UPLOAD, "path": "a.bin"})
    one = {"uploadId": UPLOAD, "parts": [{"number": 1, "sha256": ZEROS}]}
    yield BadInput("B33", "a path it does not have", "getUpload", {**one, "path": "b.bin"}, "ERR_NOT_FOUND")
    for method in ("getUpload", "completeUpload", "abortUpload"):
        yield BadInput("B33", "of nobody", method, {"uploadId": NOBODYS}, "ERR_NOT_FOUND")
        for bad in ("../../x", NOBODYS.lower(), NOBODYS + "\n", "8" + NOBODYS[1:], 5):
            yield BadInput("B33", f"an id of {bad!r}", method, {"uploadId": bad})
    from_upload = {"metadata": {"type": "custom"}, "uploadId": UPLOAD}
    yield BadInput("B33", "from nobody's", "storeModel", {**from_upload, "modelId": "new", "uploadId": NOBODYS}, _GONE)
    yield BadInput("B33", "from another's", "storeModel", {**from_upload, "modelId": "other"}, "ERR_CONFLICT")
    yield BadInput("B33", "from an open one", "storeModel", {**from_upload, "modelId": "new"}, "ERR_CONFLICT")
    for method in ("getJob", "cancelJob"):
        yield BadInput("B33", "of nobody", method, {"jobId": NOBODYS}, "ERR_NOT_FOUND")
        yield BadInput("B33", "an id that is a path", method, {"jobId": "../x"})


_NO_MODEL, _GONE = "ERR_MODEL_NOT_FOUND", "ERR_NOT_FOUND"
_PROD = {"metadata": {"type": "custom", "version": "prod"}}

BAD_INPUTS = (*_bodies(), *_names(), *_bytes(), *_members(), *_aliases_and_uploads())
