"""The channel of the way of a request, below it a tap whose socket is a list of what was written."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pamqp.commands
import pamqp.frame
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pamqp.body import ContentBody
from pamqp.commands import Basic, Channel
from pamqp.header import ContentHeader

from worker.transport import hot_channel
from worker.transport.amqp_codec import BadFrameError, FrameSplitter, frame
from worker.transport.amqp_decoding import install
from worker.transport.amqp_observer import SilentObserver
from worker.transport.connections import LinkLostError
from worker.transport.deliveries import Delivery
from worker.transport.frame_tap import FrameTap
from worker.transport.hot_channel import HotChannel, Message

install()


class Socket(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closing = False

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None: ...

    def abort(self) -> None:
        self.closing = True

    def get_write_buffer_size(self) -> int:
        return 0

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return (0, 1)


class Opened:
    """An open channel 2047, its tap, its socket and what it delivered."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.socket = Socket()
        self.reader = asyncio.StreamReader()
        self.tap = FrameTap(self.reader, loop)
        self.tap.attach(self.socket)
        self.delivered: list[Message] = []
        self.order: list[str] = []
        connection: Any = SimpleNamespace(
            tap=self.tap,
            free_channel=lambda: 2047,
            connection_tune=SimpleNamespace(frame_max=131_072),
            accept_consumer_cancel_ok=False,
        )
        self.connection = connection
        self.channel = HotChannel(
            connection,
            delivered=self.delivered.append,
            lost=lambda: self.order.append("lost"),
            before_acks=lambda: self.order.append("replies"),
        )

    async def open(self) -> Opened:
        await self.asked(self.channel.open(), Channel.OpenOk())
        self.socket.writes.clear()
        return self

    async def asked(self, call: Any, answer: Any) -> None:
        task = asyncio.ensure_future(call)
        while not self.socket.writes:
            await asyncio.sleep(0)
        self.comes(answer)
        await task

    def comes(self, *frames: Any) -> None:
        """The broker sends this, in one piece."""
        self.tap.data_received(b"".join(pamqp.frame.marshal(one, 2047) for one in frames))

    def deliver(self, tag: int, body: bytes = b"{}") -> None:
        properties = Basic.Properties(correlation_id=f"c-{tag}")
        frames = [Basic.Deliver("t", tag, False, "", "k"), ContentHeader(0, len(body), properties)]
        self.comes(*frames, *([ContentBody(body)] if body else []))

    def written(self) -> list[Any]:
        """The frames that were written, in order; they are forgotten."""
        self.tap.flush()
        stream = b"".join(self.socket.writes)
        self.socket.writes.clear()
        return [pamqp.frame.unmarshal(frame(*one))[2] for one in FrameSplitter().feed(stream)]


def settlements(opened: Opened) -> list[tuple[str, int, bool]]:
    return [(one.name.removeprefix("Basic."), one.delivery_tag, one.multiple) for one in opened.written()]


async def test_a_delivery_is_put_together_from_its_frames() -> None:
    opened = await Opened().open()
    opened.deliver(1, b"")
    opened.comes(Basic.Deliver("t", 2, True, "x", "k"), ContentHeader(0, 4), ContentBody(b"bo"), ContentBody(b"dy"))
    first, second = opened.delivered
    assert (first.body, first.properties.correlation_id) == (b"", "c-1")
    assert (second.body, second.redelivered, second.exchange, second.routing_key) == (b"body", True, "x", "k")


async def test_acknowledgements_of_one_turn_are_put_together_behind_the_replies() -> None:
    opened = await Opened().open()
    for tag in range(1, 6):
        opened.deliver(tag)
    for tag in (2, 1, 4):
        opened.channel.ack(tag)
    assert opened.socket.writes == []
    assert settlements(opened) == [("Ack", 2, True), ("Ack", 4, False)]
    assert opened.order == ["replies"]
    opened.channel.nack(3, requeue=True)
    opened.channel.ack(5)
    assert settlements(opened) == [("Nack", 3, False), ("Ack", 5, False)]


@given(st.integers(0, 2**32))
def test_the_broker_understands_exactly_what_was_settled(seed: int) -> None:
    asyncio.run(_settle_at_random(random.Random(seed)))


async def _settle_at_random(dice: random.Random) -> None:
    opened = await Opened().open()
    at_broker: dict[int, None] = {}
    ours: list[int] = []
    acked, given_back = set(), set()
    seen_acked, seen_given_back = set(), set()
    tag = 0
    for _ in range(60):
        match dice.choice(["deliver", "deliver", "ack", "ack", "nack", "flush"]):
            case "deliver":
                tag += 1
                opened.deliver(tag)
                at_broker[tag] = None
                ours.append(tag)
            case "ack" if ours:
                one = ours.pop(dice.randrange(len(ours)))
                opened.channel.ack(one)
                acked.add(one)
            case "nack" if ours:
                one = ours.pop(dice.randrange(len(ours)))
                opened.channel.nack(one, requeue=True)
                given_back.add(one)
            case "flush":
                for kind, upto, multiple in settlements(opened):
                    assert upto in at_broker, "the broker closes the channel"
                    covered = [one for one in at_broker if one == upto or (multiple and one <= upto)]
                    (seen_acked if kind == "Ack" else seen_given_back).update(covered)
                    for one in covered:
                        del at_broker[one]
                assert (seen_acked, seen_given_back) == (acked, given_back)


async def test_what_should_be_acknowledged_behind_replies_that_are_lost_is_given_back() -> None:
    opened = await Opened().open()
    replies_lost = [True, False]

    def write_replies() -> None:
        if replies_lost.pop(0):
            raise LinkLostError("the publishing connection was lost")

    opened.channel._before_acks = write_replies
    for tag in range(1, 4):
        opened.deliver(tag)
    opened.channel.ack(3)
    opened.channel.ack(1)
    assert settlements(opened) == [("Nack", 1, False), ("Nack", 3, False)]
    opened.channel.ack(2)
    assert settlements(opened) == [("Ack", 2, False)]


async def test_a_tap_knows_whether_all_that_was_sent_was_written() -> None:
    opened = await Opened().open()
    opened.channel.reply("q", b"{}", correlation_id="c", headers=None, mandatory=False)
    opened.tap.flush()
    assert not opened.tap.dropped
    opened.channel.reply("q", b"{}", correlation_id="c", headers=None, mandatory=False)
    opened.tap.connection_lost(None)
    assert opened.tap.dropped


async def test_a_tap_knows_that_a_socket_which_is_closing_takes_nothing_more() -> None:
    opened = await Opened().open()
    opened.socket.closing = True
    opened.channel.reply("q", b"{}", correlation_id="c", headers=None, mandatory=False)
    assert opened.written() == []
    assert opened.tap.dropped


async def test_what_failed_is_rejected_so_that_every_broker_counts_it_and_what_was_not_begun_is_not() -> None:
    opened = await Opened().open()
    for tag in (1, 2, 3):
        opened.deliver(tag)
    failed, not_begun, done = (Delivery(message, SilentObserver()) for message in opened.delivered)
    done.ack()
    not_begun.requeue()
    failed.fail()
    rejected: Any
    nacked: Any
    acked: Any
    nacked, rejected, acked = opened.written()
    assert (nacked.name, nacked.delivery_tag, nacked.requeue) == ("Basic.Nack", 2, True)
    assert (rejected.name, rejected.delivery_tag, rejected.requeue) == ("Basic.Reject", 1, True)
    assert (acked.delivery_tag, acked.multiple) == (3, False)


async def test_closing_comes_behind_the_acknowledgements() -> None:
    opened = await Opened().open()
    opened.deliver(1)

    async def ack_and_close() -> None:  # in one turn
        opened.channel.ack(1)
        await opened.channel.close()

    await opened.asked(ack_and_close(), Channel.CloseOk())
    assert [one.name for one in opened.written()] == ["Basic.Ack", "Channel.Close"]
    assert opened.channel.is_closed
    assert opened.order == ["replies", "lost"]


async def test_confirms_come_one_by_one_or_for_all_up_to_one_and_a_returned_message_was_not_taken() -> None:
    opened = await Opened().open()
    futures = []
    for _ in range(5):
        number = opened.channel.reply("q", b"{}", correlation_id="", headers=None, mandatory=True)
        futures.append(opened.channel.confirmed(number))
    headers = [one for one in opened.written() if isinstance(one, ContentHeader)]
    returned = ContentHeader(0, 2, headers[1].properties)
    opened.comes(Basic.Return(312, "NO_ROUTE", "", "q"), returned, ContentBody(b"{}"), Basic.Ack(3, True))
    opened.comes(Basic.Nack(5, False), Basic.Ack(4, False))
    assert [await future for future in futures] == [True, False, True, True, False]


async def test_a_confirm_that_does_not_come_fails_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot_channel, "CONFIRM_TIMEOUT_S", 0.05)
    opened = await Opened().open()
    number = opened.channel.reply("q", b"{}", correlation_id="", headers=None, mandatory=True)
    with pytest.raises(LinkLostError, match="does not confirm"):
        await opened.channel.confirmed(number)
    opened.comes(Basic.Ack(number, True))
    later = opened.channel.reply("q", b"{}", correlation_id="", headers=None, mandatory=True)
    confirmed = opened.channel.confirmed(later)
    opened.comes(Basic.Ack(later, False))
    assert await confirmed


async def test_a_channel_that_the_broker_closes_fails_whoever_waits_with_its_reason() -> None:
    opened = await Opened().open()
    number = opened.channel.reply("q", b"{}", correlation_id="", headers=None, mandatory=True)
    confirmed = opened.channel.confirmed(number)
    opened.comes(Channel.Close(404, "NOT_FOUND - no queue", 60, 20))
    with pytest.raises(LinkLostError, match="NOT_FOUND - no queue"):
        await confirmed
    assert opened.channel.is_closed and opened.order == ["lost"]
    assert opened.written()[-1].name == "Channel.CloseOk"
    for use in (lambda: opened.channel.ack(1), lambda: opened.channel.nack(1, requeue=True)):
        with pytest.raises(LinkLostError):
            use()


async def test_an_answer_that_nobody_waits_for_any_more_ends_nothing() -> None:
    opened = await Opened().open()
    asking = asyncio.ensure_future(opened.channel.call(Basic.Qos(prefetch_count=1)))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    opened.comes(Basic.QosOk())
    opened.deliver(1)
    opened.comes(Channel.CloseOk())
    assert opened.channel.is_closed and not opened.delivered
    assert opened.reader.exception() is None
    assert not opened.tap.is_taken(2047)


async def test_a_broker_that_does_not_answer_costs_the_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot_channel, "ANSWER_TIMEOUT_S", 0.05)
    opened = await Opened().open()
    with pytest.raises(LinkLostError, match="does not answer"):
        await opened.channel.call(Basic.Qos(prefetch_count=1))
    assert [one.name for one in opened.written()] == ["Basic.Qos", "Channel.Close"]
    assert opened.channel.is_closed


async def test_an_answer_to_another_question_is_none() -> None:
    opened = await Opened().open()
    with pytest.raises(LinkLostError, match=r"Basic\.Qos with Basic\.CancelOk"):
        await opened.asked(opened.channel.call(Basic.Qos(prefetch_count=1)), Basic.CancelOk("t"))


async def test_nothing_is_acknowledged_on_a_channel_that_the_broker_has_closed() -> None:
    """It would end the connection, and all other channels on it."""
    opened = await Opened().open()
    opened.deliver(1)
    opened.channel.ack(1)
    opened.comes(Channel.Close(404, "NOT_FOUND - no queue", 60, 20))
    assert [one.name for one in opened.written()] == ["Channel.CloseOk"]


async def test_a_channel_on_a_connection_that_is_gone_is_lost_at_once() -> None:
    opened = await Opened().open()
    opened.tap.connection_lost(None)
    with pytest.raises(LinkLostError, match="the connection was lost"):
        async with asyncio.timeout(5):
            await HotChannel(opened.connection).open()


async def test_a_confirm_that_nobody_waits_for_any_more_fails_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    opened = await Opened().open()
    opened.channel.confirmed(opened.channel.reply("q", b"{}", correlation_id="", headers=None, mandatory=True))
    opened.comes(Channel.Close(404, "NOT_FOUND - no queue", 60, 20))
    gc.collect()
    assert caplog.text == ""


def _of(*frames: Any) -> Callable[[], bytes]:
    return lambda: b"".join(pamqp.frame.marshal(one, 2047) for one in frames)


BAD = {
    "a body out of turn": _of(ContentBody(b"x")),
    "a header out of turn": _of(ContentHeader(0, 1)),
    "a method within a content": _of(Basic.Deliver("t", 1, False, "", "k"), Basic.Ack(1)),
    "a body that is too long": _of(Basic.Deliver("t", 1, False, "", "k"), ContentHeader(0, 1), ContentBody(b"xy")),
    "an answer to nothing": _of(Basic.QosOk()),
    "an unknown method": lambda: frame(1, 2047, b"\x00\x3c\xff\xff"),
    "a delivery that is cut off": lambda: frame(1, 2047, b"\x00\x3c\x00\x3c\x05t"),
    "an empty method": lambda: frame(1, 2047, b""),
    "another's returned message": _of(Basic.Return(312, "NO_ROUTE", "", "q"), ContentHeader(0, 0)),
    "no frame": lambda: b"HTTP/1.1 400 Bad Request\r\n\r\n",
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
async def test_a_bad_frame_ends_the_connection_with_its_reason(bad: Callable[[], bytes]) -> None:
    opened = await Opened().open()
    opened.tap.data_received(bad())
    error = opened.reader.exception()
    assert isinstance(error, BadFrameError) and str(error)
    opened.deliver(1)
    assert not opened.delivered, "nothing is read behind a bad frame"
    opened.tap.connection_lost(None)
    with pytest.raises(LinkLostError, match=str(error)):
        opened.channel.ack(1)


METHODS = st.sampled_from([kind.index.to_bytes(4, "big") for kind in pamqp.commands.INDEX_MAPPING.values()])
PAYLOADS = st.builds(bytes.__add__, METHODS | st.just(b""), st.binary(max_size=60))


@given(st.lists(st.tuples(st.integers(1, 8), PAYLOADS), min_size=1, max_size=6))
@settings(max_examples=300)
def test_frames_at_random_end_at_most_the_connection(frames: list[tuple[int, bytes]]) -> None:
    async def fuzz() -> None:
        opened = await Opened().open()
        for kind, payload in frames:
            opened.tap.data_received(frame(kind, 2047, payload))
        opened.deliver(1)
        assert opened.delivered or opened.channel.is_closed or isinstance(opened.reader.exception(), BadFrameError)

    asyncio.run(fuzz())


async def test_frames_of_other_channels_go_to_aiormq_and_ours_are_a_sign_of_life_for_it() -> None:
    opened = await Opened().open()
    assert await opened.reader.readexactly(8) == b"\x08\x00\x00\x00\x00\x00\x00\xce"
    other = pamqp.frame.marshal(Basic.Ack(1), 1)
    opened.deliver(1)
    opened.tap.data_received(other)
    assert await opened.reader.readexactly(len(other)) == other, "one sign of life is enough for a while"
