"""RabbitMQ and an S3 object store on this machine, for `make run` and for the tests.

`rabbitmq(folder)` and `object_store(folder)` decide where each service comes from and say so in one line on stderr:

1. an address in the environment is used as it is;
2. else a container, if a Docker daemon answers and the image can be had;
3. else a native process: RabbitMQ from the Debian package, MinIO built once with Go and kept in the user's cache.

`RABBITMQ_SUITE` names a Debian suite whose RabbitMQ is taken instead, as a native process on any Debian.

What they return is not started yet: `start()` it and `close()` it, or use it as a context manager. A service keeps its
data, ports and credentials in its folder, so that the same folder is the same service the next time. Whatever way the
caller ends, SIGKILL included, no process of a service outlives it.
"""

from __future__ import annotations

from deploy.local.broker import RabbitMQ, rabbitmq
from deploy.local.object_store import ObjectStore, object_store
from deploy.local.server import NotStarted, Source, Unavailable

__all__ = ["NotStarted", "ObjectStore", "RabbitMQ", "Source", "Unavailable", "object_store", "rabbitmq"]
