"""Who may do what on the broker: a user for each role, with no more than its program needs.

RabbitMQ asks twice. By resource: `configure` to declare or delete it, `write` to publish to an exchange or to bind a
queue, `read` to consume a queue or to bind to an exchange; a passive declaration, and direct reply-to, ask for
nothing. And by routing key, for topic exchanges: so a caller may call the methods its role lists, and the broker
refuses every other. Both are regular expressions, whole ones here.

The default exchange leads to every queue by its name, and has no routing keys to check. So whoever may write to it may
write anywhere: of all roles only the worker, which answers callers on queues of theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from worker.transport.reply_addresses import EXCLUSIVE_PREFIX, NAMED_PREFIX
from worker.transport.topology import DEAD_EXCHANGE, HINT_EXCHANGE, RPC_EXCHANGE, request_queue

DEFAULT_EXCHANGE = "amq.default"
REPLICATION = ("getChanges", "getModel", "getModelMetadata", "listModels", "ping")  # what racks ask of each other
LOOKUPS = ("getModel", "getModelMetadata", "listModels", "searchModels", "getChanges", "getStorageStats", "ping")
# What `push` calls, and what it takes to suggest the next version.
UPLOADS = (
    *("createUpload", "getUpload", "completeUpload", "abortUpload", "getJob", "storeModel"),
    *("getModelMetadata", "searchModels", "ping"),
)

_RACK = "[a-z0-9-]+"
_NOTHING = "^$"
_ANY_METHOD = f"^{_RACK}\\.[A-Za-z]+$"
_EVERY_OBJECT = "model-manager[-.].+"


@dataclass(frozen=True, slots=True)
class BrokerUser:
    """One login. `call` is what it may publish to the exchange for requests, `tap` what it may bind to it."""

    name: str
    configure: str = _NOTHING
    write: str = _NOTHING
    read: str = _NOTHING
    call: str = _NOTHING
    tap: str = _NOTHING
    tags: tuple[str, ...] = ()


def worker_name(rack: str) -> str:
    return f"worker-{rack}"


def users(racks: Sequence[str]) -> tuple[BrokerUser, ...]:
    """A worker for each rack, and one user for every other role."""
    return (
        *(_worker(rack) for rack in racks),
        _caller("orchestrator", _ANY_METHOD),
        _caller("inference", _methods(LOOKUPS)),
        _caller("uploader", _methods(UPLOADS)),
        _listener(),
        _operator(),
        # For the management API and its metrics: a tag to look at everything, and access to nothing.
        BrokerUser("monitoring", tags=("monitoring",)),
    )


def _worker(rack: str) -> BrokerUser:
    """Consumes its own rack's requests, answers, announces, dead-letters. For copies of other racks' models it hears
    their hints and asks them, on queues of its own."""
    own = (f"{_escaped(EXCLUSIVE_PREFIX)}.+", f"{_escaped(request_queue(rack))}\\.hints\\..+")
    exchanges = (DEFAULT_EXCHANGE, DEAD_EXCHANGE, HINT_EXCHANGE, RPC_EXCHANGE)
    return BrokerUser(
        worker_name(rack),
        configure=_patterns(*own),
        write=_patterns(*map(_escaped, exchanges), own[1]),
        read=_patterns(*map(_escaped, (request_queue(rack), HINT_EXCHANGE)), *own),
        call=_methods(REPLICATION),
    )


def _caller(name: str, call: str) -> BrokerUser:
    """Calls some methods of every rack, and takes the replies on queues of its own."""
    own = _patterns(f"{_escaped(EXCLUSIVE_PREFIX)}.+", f"{_escaped(NAMED_PREFIX)}{name}\\..+")
    return BrokerUser(name, configure=own, write=_names(RPC_EXCHANGE), read=own, call=call)


def _listener() -> BrokerUser:
    """Hears the hints of all racks on queues of its own; publishes nothing."""
    own = f"model-manager-{_RACK}\\.hints\\..+"
    return BrokerUser(
        "listener", configure=_patterns(own), write=_patterns(own), read=_patterns(own, _escaped(HINT_EXCHANGE))
    )


def _operator() -> BrokerUser:
    """Makes and compares the topology, reads dead letters and sends them again, in the name of who sent them."""
    own = f"{_escaped(EXCLUSIVE_PREFIX)}.+"
    return BrokerUser(
        "operator",
        configure=_patterns(_EVERY_OBJECT, own),
        write=_patterns(_EVERY_OBJECT),
        read=_patterns(_EVERY_OBJECT, own),
        call=_ANY_METHOD,
        tap=f"^{_RACK}\\.\\*$",
        tags=("impersonator",),
    )


def _methods(methods: Iterable[str]) -> str:
    return f"^{_RACK}\\.({'|'.join(methods)})$"


def _names(*names: str) -> str:
    return _patterns(*map(_escaped, names))


def _patterns(*patterns: str) -> str:
    return f"^({'|'.join(patterns)})$" if len(patterns) > 1 else f"^{patterns[0]}$"


def _escaped(name: str) -> str:
    return name.replace(".", "\\.")
