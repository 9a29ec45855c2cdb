"""Where replies may go.

`reply_to` is what a caller wrote, and a reply published to it goes to any queue of that name; so only three forms are
permitted. A direct reply-to address needs more care: it holds an Erlang process id in base64, written by the broker. A
forged one that does not decode (3.10, 4.0), or that names a node the broker does not know (3.10), makes the broker fail
with INTERNAL_ERROR and close the connection it was published on. So its form is checked, and its node must have proved
good once: tried by a passive declaration on a connection of its own, which may be lost. RabbitMQ 4.0 does not tell such
a node from a caller who has gone; there a reply to it harms nobody.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections import OrderedDict
from functools import lru_cache

from aiormq.exceptions import ChannelNotFoundEntity, ConnectionInternalError
from pamqp.commands import Queue

from worker.transport.connections import LinkLostError, close_connection, link_failures, open_channel
from worker.transport.link import Broker

DIRECT_PREFIX = "amq.rabbitmq.reply-to."
EXCLUSIVE_PREFIX = "amq.gen-"
NAMED_PREFIX = "model-manager.reply."
TRIAL_TIMEOUT_S = 5.0
MAX_NODES = 1024
_ADDRESSES_REMEMBERED = 4096

_NAMED = re.compile(r"(?:amq\.gen-|model-manager\.reply\.)[\x21-\x7e]+")
_DIRECT = re.compile(r"amq\.rabbitmq\.reply-to\.([A-Za-z0-9+/]+={0,2})\.[A-Za-z0-9+/_-]+={0,2}")
# An external term (131): a process id, new or old, whose node is an atom; then id and serial, and the creation.
_PID_TAILS = {b"X": 12, b"g": 9}
_ATOM_LENGTH_BYTES = {b"v": 2, b"d": 2, b"w": 1, b"s": 1}


def is_direct(reply_to: str) -> bool:
    """Whether this is RabbitMQ's direct reply-to: no queue, and gone with the caller's channel."""
    return reply_to.startswith(DIRECT_PREFIX)


def is_exclusive(reply_to: str) -> bool:
    """Whether the broker named this queue, as it does for the exclusive queue of one caller."""
    return reply_to.startswith(EXCLUSIVE_PREFIX)


@lru_cache(_ADDRESSES_REMEMBERED)
def is_permitted(reply_to: str) -> bool:
    """Whether a reply may go there, as far as the form tells."""
    if is_direct(reply_to):
        return node_of(reply_to) is not None
    return _NAMED.fullmatch(reply_to) is not None


@lru_cache(_ADDRESSES_REMEMBERED)
def node_of(reply_to: str) -> bytes | None:
    """The broker node inside a well-formed direct reply-to address."""
    match = _DIRECT.fullmatch(reply_to)
    if match is None:
        return None
    try:
        term = base64.b64decode(match[1], validate=True)
    except binascii.Error:
        return None
    tail = _PID_TAILS.get(term[1:2])
    length_bytes = _ATOM_LENGTH_BYTES.get(term[2:3])
    if term[:1] != b"\x83" or tail is None or length_bytes is None:
        return None
    name = 3 + length_bytes
    end = name + int.from_bytes(term[3:name], "big")
    return term[name:end] if name < end and len(term) == end + tail else None


class NodeTrials:
    """Knows which broker nodes a direct reply-to address may name."""

    def __init__(self, broker: Broker, connection_name: str) -> None:
        self._broker = broker
        self._connection_name = connection_name
        self._verdicts: OrderedDict[bytes, bool] = OrderedDict()
        self._lock = asyncio.Lock()

    def forget(self) -> None:
        """Forget all verdicts: another broker may answer at the same place."""
        self._verdicts.clear()

    async def is_safe(self, reply_to: str) -> bool:
        """Whether publishing to it leaves the connection alone; the first address of a node costs a connection.

        Raises LinkLostError when that cannot be found out now.
        """
        node = node_of(reply_to)
        if node is None:
            return False
        verdict = self._verdicts.get(node)
        if verdict is None:
            async with self._lock:
                verdict = self._verdicts.get(node)
                if verdict is None:
                    verdict = await self._try(reply_to)
                    self._verdicts[node] = verdict
                    if len(self._verdicts) > MAX_NODES:
                        self._verdicts.popitem(last=False)
        return verdict

    async def _try(self, reply_to: str) -> bool:
        connection = await self._broker.connect(self._connection_name)
        try:
            with link_failures():
                channel = await open_channel(connection, confirms=False)
                await channel.rpc(_passive_declaration(reply_to), timeout=TRIAL_TIMEOUT_S)
        except LinkLostError as error:
            if isinstance(error.__cause__, ConnectionInternalError):
                return False
            if isinstance(error.__cause__, ChannelNotFoundEntity):  # this caller has gone, but the node is real
                return True
            raise
        finally:
            await close_connection(connection)
        return True


class _ReplyAddressDeclaration(Queue.Declare):
    """A queue declaration whose name may hold `+`, `/` and `=`, which pamqp refuses and the broker takes."""

    def validate(self) -> None:
        return


def _passive_declaration(reply_to: str) -> Queue.Declare:
    frame = _ReplyAddressDeclaration(passive=True)
    frame.queue = reply_to
    return frame
