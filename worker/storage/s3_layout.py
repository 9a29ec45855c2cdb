"""How a blob is cut into parts, and what stands in its object's metadata."""

from __future__ import annotations

from urllib.parse import quote

from worker.storage.blobstore import BlobInfo

MIB = 1024 * 1024
PART_BYTES_MIN = 16 * MIB
_PARTS_WANTED_MAX = 9000  # S3 takes 10,000


def part_size_for(size: int) -> int:
    """Part size in bytes for a blob of `size`: 16 MiB, or what keeps it under 9,000 parts, in whole MiB."""
    needed = -(-size // _PARTS_WANTED_MAX)
    return max(PART_BYTES_MIN, -(-needed // MIB) * MIB)


def blob_metadata(info: BlobInfo, *, size: int, sha256: str) -> dict[str, str]:
    """S3 user metadata: ASCII only (botocore refuses the rest), under 1.5 KB in all."""
    return {
        "model-manager-sha256": sha256,
        "model-manager-size": str(size),
        "model-manager-format": info.format,
        "model-manager-model": quote(info.model),
        "model-manager-version": quote(info.version),
        "model-manager-rack": info.rack,
    }
