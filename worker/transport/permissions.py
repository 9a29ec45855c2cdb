"""Who may call what on the broker, as its management tells it: AMQP itself tells nobody.

RabbitMQ checks a routing key only for a user who has a topic permission for that exchange; one who has none may use
every key, and so call every method of every rack. From 4.3 on that permission goes with its exchange, and is not there
when that is made again. And the default exchange leads to every queue by its name, whatever the topic permissions are.
Users of other sources than the broker's own, such as LDAP, are not among those it tells of.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterable, Mapping
from typing import Any

from yarl import URL

from schemas.errors import ModelManagerError
from worker.transport.topology import RPC_EXCHANGE, Problem

DEFAULT_EXCHANGE = "amq.default"
ANSWER_TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 64_000_000
# Methods that nobody has, on racks that nobody has: a pattern that takes both takes everything.
_ANY_CALL = ("nobody-0.a", "r1.noSuchMethod")


def unmeant_callers(amqp_url: str, management_url: str) -> list[Problem]:
    """The users of the broker's vhost who may call more than a topic permission says. Blocks.

    The login is that of `management_url`, else that of `amqp_url`, and must be an administrator's. Raises
    ModelManagerError: ERR_FORBIDDEN, or ERR_STORAGE_UNAVAILABLE when the management cannot be reached.
    """
    management, broker = URL(management_url), URL(amqp_url)
    vhost = broker.path[1:] or "/"
    login = management if management.user else broker
    base = management.with_user(None)

    def told(what: str) -> list[dict[str, Any]]:
        found = _get(base / "api" / what, login.user or "guest", login.password or "guest")
        return [entry for entry in found if entry["vhost"] == vhost]

    return judge(told("permissions"), told("topic-permissions"))


def judge(permissions: Iterable[Mapping[str, str]], topic_permissions: Iterable[Mapping[str, str]]) -> list[Problem]:
    """What is wrong with the permissions of one vhost, as the management lists them."""
    calls = {entry["user"]: entry["write"] for entry in topic_permissions if entry["exchange"] == RPC_EXCHANGE}
    problems = []
    for entry in sorted(permissions, key=lambda each: each["user"]):
        user, writes = entry["user"], entry["write"]
        if not _matches(writes, RPC_EXCHANGE):
            continue
        if user not in calls:
            reason = f"may write to {RPC_EXCHANGE} without a topic permission for it, and so call everything"
        elif _matches(writes, DEFAULT_EXCHANGE) and not all(_matches(calls[user], key) for key in _ANY_CALL):
            reason = "may write to the default exchange, and so to every queue, whatever its topic permission says"
        else:
            continue
        problems.append(Problem("open", f"user {user}", reason))
    return problems


def _matches(pattern: str, name: str) -> bool:
    """As the broker does it: anywhere in the name, and an empty pattern matches nothing but an empty name."""
    try:
        return bool(pattern) and re.search(pattern, name) is not None
    except re.error:
        return True  # of another dialect: better to have it looked at


def _get(url: URL, user: str, password: str) -> Any:
    login = b64encode(f"{user}:{password}".encode()).decode()
    request = urllib.request.Request(str(url), headers={"Authorization": f"Basic {login}"})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as answer:
            return json.loads(answer.read(MAX_ANSWER_BYTES))
    except urllib.error.HTTPError as error:
        with error:
            if error.code in (401, 403):
                message = "The broker's management shows permissions to administrators only; this login is none."
                raise ModelManagerError("ERR_FORBIDDEN", message) from None
            raise _unreachable(f"it answers {error.code}") from None
    except (OSError, ValueError) as error:
        raise _unreachable(str(getattr(error, "reason", error))) from None


def _unreachable(why: str) -> ModelManagerError:
    return ModelManagerError("ERR_STORAGE_UNAVAILABLE", f"The broker's management cannot be asked: {why}.")
