"""What this rack accepts and for how long it keeps things: the slice of the settings that the use cases read."""

from __future__ import annotations

from dataclasses import dataclass

from schemas.errors import ModelManagerError


@dataclass(frozen=True, slots=True)
class Policy:
    """Sizes are in bytes, durations in seconds. `formats` are the types that may be stored."""

    rack: str
    formats: frozenset[str]
    max_model_size: int
    max_inline_size: int
    allow_pickle: bool
    check_formats: bool
    check_checksums: bool
    peers: tuple[str, ...]
    replication_factor: int
    undo_s: float
    upload_s: float
    url_s: int

    def check_type(self, model_type: str) -> None:
        """ERR_UNSUPPORTED_FORMAT unless `model_type` may be stored here."""
        if model_type not in self.formats:
            raise ModelManagerError(
                "ERR_UNSUPPORTED_FORMAT",
                f"This rack does not accept the format {model_type}.",
                type=model_type,
                supported=sorted(self.formats),
            )

    def check_size(self, size: int) -> None:
        """ERR_MODEL_TOO_LARGE if a version of `size` bytes is over the limit."""
        if size > self.max_model_size:
            raise ModelManagerError(
                "ERR_MODEL_TOO_LARGE",
                f"A version may have at most {self.max_model_size} bytes.",
                maxModelSize=self.max_model_size,
            )
