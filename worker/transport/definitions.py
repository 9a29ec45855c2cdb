"""The whole access and topology of a vhost as RabbitMQ's definitions, to be loaded by a broker at boot or at any time.

Users have no password, and cannot log in, unless one is given: RabbitMQ takes an empty hash for a user that logs in
by certificate alone. Loading definitions adds and replaces; it removes nothing that they do not name.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from worker.transport.roles import BrokerUser, users
from worker.transport.topology import RPC_EXCHANGE, Topology, topology

VHOST = "model-manager"
_SALT_BYTES = 4


def definitions(
    racks: Sequence[str], *, vhost: str = VHOST, passwords: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The document for these racks; `passwords` are by the user's name. Without any it is always the same."""
    logins = users(racks)
    return {
        "vhosts": [{"name": vhost}],
        "users": [_user(user, (passwords or {}).get(user.name)) for user in logins],
        "permissions": [_permission(user, vhost) for user in logins],
        "topic_permissions": [_topic_permission(user, vhost) for user in logins],
        **_objects([topology(rack) for rack in racks], vhost),
    }


def _user(user: BrokerUser, password: str | None) -> dict[str, Any]:
    return {
        "name": user.name,
        "password_hash": "" if password is None else password_hash(password),
        "hashing_algorithm": "rabbit_password_hashing_sha256",
        "tags": list(user.tags),
    }


def password_hash(password: str) -> str:
    """RabbitMQ's form: salt and sha256 of salt and password, in base64."""
    salt = secrets.token_bytes(_SALT_BYTES)
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def _permission(user: BrokerUser, vhost: str) -> dict[str, str]:
    return {
        "user": user.name,
        "vhost": vhost,
        "configure": user.configure,
        "write": user.write,
        "read": user.read,
    }


def _topic_permission(user: BrokerUser, vhost: str) -> dict[str, str]:
    # For each user: one that has none for a topic exchange may use every routing key of it.
    return {"user": user.name, "vhost": vhost, "exchange": RPC_EXCHANGE, "write": user.call, "read": user.tap}


def _objects(topologies: Sequence[Topology], vhost: str) -> dict[str, Any]:
    exchanges = {exchange.name: exchange for each in topologies for exchange in each.exchanges}
    return {
        "exchanges": [
            {
                "name": exchange.name,
                "vhost": vhost,
                "type": exchange.kind,
                "durable": True,
                "auto_delete": False,
                "internal": False,
                "arguments": {},
            }
            for exchange in exchanges.values()
        ],
        "queues": [
            {
                "name": queue.name,
                "vhost": vhost,
                "durable": True,
                "auto_delete": False,
                "arguments": dict(queue.arguments),
            }
            for each in topologies
            for queue in each.queues
        ],
        "bindings": [
            {
                "source": binding.exchange,
                "vhost": vhost,
                "destination": binding.queue,
                "destination_type": "queue",
                "routing_key": binding.key,
                "arguments": {},
            }
            for each in topologies
            for binding in each.bindings
        ],
    }
