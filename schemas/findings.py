"""What validation found, as it stands on the wire and in the journal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One observation about a file. `code` is a stable kebab-case constant; `place` tells where inside the file."""

    severity: Severity
    code: str
    message: str
    path: str = ""
    place: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
