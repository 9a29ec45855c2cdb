"""The MinIO server as a program: built once from source with Go, then kept in the cache.

The project is archived and publishes neither programs nor images any more. The version pinned here is its last
commit. It is for one machine's own use: it will see no security fixes.
"""

from __future__ import annotations

from pathlib import Path

from deploy.local.golang import built
from deploy.local.server import Unavailable

VERSION = "v0.0.0-20260212201848-7aac2a2c5b7c"
BY_HAND = "set OBJECT_STORE_IMAGE to an image with the MinIO interface and start Docker, or name a running store"


def minio() -> Path:
    """The program; built if the cache has none, which takes some minutes. Raises `Unavailable`."""
    try:
        return built("minio", "github.com/minio/minio", VERSION)
    except Unavailable as error:
        raise Unavailable(error.reason, f"{error.what_to_do}, or {BY_HAND}") from None
