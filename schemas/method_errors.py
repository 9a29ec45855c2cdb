"""Which errors each method may be answered with: what the documents tell callers to be ready for."""

from __future__ import annotations

from schemas.errors import ERRORS
from schemas.rpc import METHODS

_OF_ALL = (
    "ERR_INVALID_REQUEST",
    "ERR_DEADLINE_EXCEEDED",
    "ERR_OVERLOADED",
    "ERR_STORAGE_UNAVAILABLE",
    "ERR_INTERNAL",
)
_OF_WRITES = ("ERR_SHUTTING_DOWN", "ERR_STORAGE_FULL")
_OF_EFFECTS = ("ERR_CONFLICT",)  # at least: the idempotency key names another request
_OF_A_CHANGE = ("ERR_MODEL_NOT_FOUND", "ERR_NOT_ORIGIN")
_OF_A_LONG_REPLY = ("ERR_MODEL_TOO_LARGE",)

_OF_METHOD: dict[str, tuple[str, ...]] = {
    "storeModel": (
        *_OF_A_CHANGE,
        "ERR_INVALID_MODEL_DATA",
        "ERR_INVALID_METADATA",
        "ERR_MODEL_ALREADY_EXISTS",
        "ERR_NOT_FOUND",
        "ERR_MODEL_TOO_LARGE",
        "ERR_CHECKSUM_MISMATCH",
        "ERR_UNSUPPORTED_FORMAT",
        "ERR_UNSAFE_MODEL",
    ),
    "getModel": ("ERR_MODEL_NOT_FOUND", "ERR_CHECKSUM_MISMATCH", *_OF_A_LONG_REPLY),
    "listModels": _OF_A_LONG_REPLY,
    "searchModels": _OF_A_LONG_REPLY,
    "getModelMetadata": ("ERR_MODEL_NOT_FOUND",),
    "updateModelMetadata": (*_OF_A_CHANGE, "ERR_INVALID_METADATA"),
    "deleteModel": _OF_A_CHANGE,
    "restoreModel": _OF_A_CHANGE,
    "setAlias": _OF_A_CHANGE,
    "deleteAlias": (*_OF_A_CHANGE, "ERR_NOT_FOUND"),
    "replicateModel": _OF_A_CHANGE,
    "validateModel": ("ERR_MODEL_NOT_FOUND",),
    "createUpload": ("ERR_NOT_ORIGIN", "ERR_MODEL_TOO_LARGE"),
    "getUpload": ("ERR_NOT_FOUND", "ERR_CONFLICT"),
    "completeUpload": ("ERR_NOT_FOUND", "ERR_CHECKSUM_MISMATCH"),
    "abortUpload": ("ERR_NOT_FOUND",),
    "getChanges": ("ERR_CHANGES_GONE", *_OF_A_LONG_REPLY),
    "getJob": ("ERR_NOT_FOUND",),
    "cancelJob": ("ERR_NOT_FOUND",),
}


def errors_of(name: str) -> tuple[str, ...]:
    """The codes that a method of the contract may be answered with, in the order of the table of errors."""
    method = METHODS[name]
    codes = {*_OF_ALL, *_OF_METHOD.get(name, ())}
    if method.lane == "write":
        codes.update(_OF_WRITES)
    if method.effect:
        codes.update(_OF_EFFECTS)
    return tuple(code for code in ERRORS if code in codes)
