"""The one table of errors.

Read by the RPC and the HTTP renderers, the client, the command line's exit codes and the generated documents. A handler
never invents a code: it raises `ModelManagerError` with one of these, and whoever renders it looks the rest up here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """One row: what a code means on every surface."""

    code: str
    sentence: str
    http_status: int
    exit_code: int
    retryable: bool = False


_TABLE = (
    ErrorKind("ERR_INVALID_REQUEST", "The request does not follow the contract.", 400, 2),
    ErrorKind("ERR_INVALID_MODEL_DATA", "The model's bytes are not what the request says they are.", 400, 2),
    ErrorKind("ERR_INVALID_METADATA", "The metadata does not follow the contract.", 400, 2),
    ErrorKind("ERR_MODEL_ALREADY_EXISTS", "That version is stored already, with other content.", 409, 4),
    ErrorKind("ERR_MODEL_NOT_FOUND", "No such model, version or alias.", 404, 3),
    ErrorKind("ERR_NOT_FOUND", "No such upload, job or alias.", 404, 3),
    ErrorKind("ERR_NOT_ORIGIN", "Another rack owns this model; only its origin may change it.", 409, 4),
    ErrorKind("ERR_MODEL_TOO_LARGE", "The bytes are more than the limit allows.", 413, 2),
    ErrorKind("ERR_CHECKSUM_MISMATCH", "The bytes do not have the checksum they should have.", 422, 5),
    ErrorKind("ERR_UNSUPPORTED_FORMAT", "This rack does not accept that format.", 415, 6),
    ErrorKind("ERR_UNSAFE_MODEL", "Loading this model could run code; the policy of this rack refuses it.", 422, 6),
    ErrorKind("ERR_UNKNOWN_METHOD", "No such method.", 404, 2),
    ErrorKind("ERR_DEADLINE_EXCEEDED", "The deadline passed before the work was done.", 504, 7, retryable=True),
    ErrorKind("ERR_CONFLICT", "The state is not what the request expects.", 409, 4),
    ErrorKind("ERR_CHANGES_GONE", "The change feed no longer reaches back that far; list and start again.", 410, 4),
    ErrorKind("ERR_UNAUTHORIZED", "Credentials are missing or wrong.", 401, 6),
    ErrorKind("ERR_FORBIDDEN", "These credentials do not allow that.", 403, 6),
    ErrorKind("ERR_OVERLOADED", "Too much is in progress; try again later.", 429, 7, retryable=True),
    ErrorKind("ERR_SHUTTING_DOWN", "The worker is shutting down; try again.", 503, 7, retryable=True),
    ErrorKind("ERR_STORAGE_UNAVAILABLE", "The storage cannot be reached; try again.", 503, 7, retryable=True),
    ErrorKind("ERR_STORAGE_FULL", "The storage has no room left.", 507, 7),
    ErrorKind("ERR_INTERNAL", "The worker failed in a way it does not know; its log says more.", 500, 1),
)

ERRORS: dict[str, ErrorKind] = {kind.code: kind for kind in _TABLE}

EXIT_CONFIG_INVALID = 8
EXIT_INTERRUPTED = 130


class ModelManagerError(Exception):
    """A failure with a code of the table: what every layer raises and one place renders.

    `message` is for people and holds no path, host or stack of ours; `details` is JSON for programs.
    """

    def __init__(self, code: str, message: str = "", /, **details: Any) -> None:
        self.kind = ERRORS[code]
        self.message = message or self.kind.sentence
        self.details = details
        super().__init__(f"{code}: {self.message}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Made again without a call: `args` is not what it was made with, and that is another in each subclass.
        return type(self).__new__, (type(self), *self.args), self.__dict__

    @property
    def code(self) -> str:
        return self.kind.code

    @property
    def retryable(self) -> bool:
        return self.kind.retryable

    def body(self) -> dict[str, Any]:
        """The reply body, the same on every transport."""
        return {
            "success": False,
            "error": {
                "code": self.code,
                "message": self.message,
                "retryable": self.retryable,
                "details": self.details,
            },
        }
