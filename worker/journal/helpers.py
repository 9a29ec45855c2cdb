"""A boot on all processors: other processes extract chunks of its files while this one takes what comes before them.

A helper is sent chunks as lines of JSON and answers each with a frame: its length in 4 bytes, then the portions in
MessagePack. One that fails, hangs or ends is done without: what it should have made is made here.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import select
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import orjson

from worker.journal.blocks import Block
from worker.journal.files import Files
from worker.journal.format import Line, line_decoder
from worker.journal.portions import Chunk, Portion, extracted
from worker.journal.replay import Help

HELPED_BYTES = 64 * 1024 * 1024
"""Of lines, from which on a boot is helped: a helper takes half a second to begin."""

_MOST = 3  # helpers: more make more than one process can take
_ASKED = 2  # chunks a helper has at once, so that it never waits for the next
_AHEAD = 16  # chunks that are made before their turn
_PATIENCE_MS = 30_000  # for one that hangs
_FRAME_BYTES = 1024 * 1024  # about the most; a pipe that holds one lets its writer go on
_LENGTH = struct.Struct(">I")
_BEGUN = -1  # in place of a chunk, for the frame by which a helper tells that it is there

R = TypeVar("R")
T = TypeVar("T")


class Made(msgspec.Struct, Generic[T], frozen=True, array_like=True, gc=False):
    """The portions of a chunk; `failed` if it has to be tried again, for the reason to be seen."""

    portions: list[Portion[T]]
    failed: bool = False


class Extraction(Generic[R, T]):
    """The chunks of a boot, to be asked for in their order. `close` it."""

    def __init__(
        self,
        files: Files,
        folder: Path,
        decoder: msgspec.json.Decoder[Line[R]],
        extract: Callable[[Block[R]], T],
    ) -> None:
        self._files = files
        self._folder = folder
        self._decoder = decoder
        self._extract = extract
        self._chunks: list[Chunk] = []
        self._made: dict[int, Made[T]] = {}  # before their turn
        self._turn = 0  # of the chunk that is asked for next
        self._next = 0  # the first that nobody makes yet
        self._frames: msgspec.msgpack.Decoder[Made[T]] | None = None
        self._help: Help | None = None
        self._helpers: dict[int, _Helper] = {}  # by the descriptor of their output
        self._outputs = select.poll()

    def help(self, help_: Help) -> None:
        """Begin helpers, one for each other processor, as soon as there is enough to do."""
        self._help = help_
        self._begin()

    def expect(self, chunks: Sequence[Chunk]) -> None:
        """These will be asked for before all others that are expected. To be told before the first one is."""
        self._chunks[:0] = chunks
        self._begin()

    def _begin(self) -> None:
        if self._help is None or sum(chunk.end - chunk.start for chunk in self._chunks) < HELPED_BYTES:
            return
        self._frames = msgspec.msgpack.Decoder(Made[self._help.content])  # type: ignore[name-defined]
        with contextlib.suppress(OSError):  # there is no room for another process
            while len(self._helpers) < min(_processors() - 1, _MOST):
                helper = _Helper([*self._help.command, str(self._folder)])
                self._helpers[helper.output] = helper
                self._outputs.register(helper.output, select.POLLIN)

    def close(self) -> None:
        for helper in self._helpers.values():
            helper.end()
        self._helpers.clear()

    def of(self, chunk: Chunk) -> list[Portion[T]]:
        """The portions of a chunk: of the next one, or one that is none of them. Raises as `extracted`."""
        if self._turn == len(self._chunks) or chunk != self._chunks[self._turn]:
            return self._make(chunk)
        turn, mine = self._turn, self._next == self._turn
        self._next = max(self._next, turn + 1)
        self._hear(wait=False)
        while not mine and turn not in self._made:
            if self._next < self._end:
                self._make_ahead()
            self._hear(wait=self._next >= self._end)
        self._turn += 1
        made = self._made.pop(turn, None)
        return self._make(chunk) if made is None or made.failed else made.portions

    @property
    def _end(self) -> int:
        """Of the chunks that may be made by now."""
        return min(self._turn + _AHEAD, len(self._chunks))

    def _make(self, chunk: Chunk) -> list[Portion[T]]:
        with self._files.reader(self._folder / chunk.name) as stream:
            return list(extracted(stream, chunk, self._decoder, self._extract))

    def _make_ahead(self) -> None:
        number = self._next
        self._next += 1
        try:
            self._made[number] = Made(self._make(self._chunks[number]))
        except Exception:  # noqa: BLE001 - the file may be no journal, which is seen when it is its turn
            self._made[number] = Made([], failed=True)

    def _hear(self, *, wait: bool) -> None:
        """Take what helpers have made, and give them more to do."""
        if not self._helpers:
            return
        ready = self._outputs.poll(_PATIENCE_MS if wait else 0)
        for output, _ in ready:
            self._try(self._helpers[output], self._take)
        for helper in list(self._helpers.values()):
            if wait and not ready:
                self._do_without(helper)
            else:
                self._try(helper, self._give)

    def _take(self, helper: _Helper) -> None:
        frame = helper.read()
        if helper.asked[0] != _BEGUN:
            assert self._frames is not None
            self._made[helper.asked[0]] = self._frames.decode(frame)
        helper.asked.popleft()

    def _give(self, helper: _Helper) -> None:
        while _BEGUN not in helper.asked and len(helper.asked) < _ASKED and self._next < self._end:
            self._next += 1
            helper.ask(self._next - 1, self._chunks[self._next - 1])

    def _try(self, helper: _Helper, what: Callable[[_Helper], None]) -> None:
        try:
            what(helper)
        except (OSError, EOFError, msgspec.DecodeError):
            self._do_without(helper)

    def _do_without(self, helper: _Helper) -> None:
        for number in helper.asked:
            if number != _BEGUN:
                self._made[number] = Made([], failed=True)
        self._outputs.unregister(helper.output)
        del self._helpers[helper.output]
        helper.end()


def _processors() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # this system cannot tell
        return os.cpu_count() or 1


class _Helper:
    """The other process, as this one sees it: `asked` are the chunks it has not answered for."""

    def __init__(self, command: Sequence[str]) -> None:
        """Raises OSError."""
        # Not of the terminal's group: Ctrl-C is for the one who is helped, and ends both.
        self._process = subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input = self._process.stdin
        self.output = self._process.stdout.fileno()
        self.asked = deque([_BEGUN])
        with contextlib.suppress(OSError, AttributeError):  # it then waits now and then
            fcntl.fcntl(self.output, fcntl.F_SETPIPE_SZ, _FRAME_BYTES)

    def ask(self, number: int, chunk: Chunk) -> None:
        """Raises OSError if it is not there any more."""
        self.asked.append(number)
        self._input.write(orjson.dumps(astuple(chunk)) + b"\n")

    def read(self) -> bytearray:
        """The next frame. Raises EOFError if it has ended, or hangs."""
        (length,) = _LENGTH.unpack(self._read_exactly(_LENGTH.size))
        return self._read_exactly(length)

    def _read_exactly(self, length: int) -> bytearray:
        data = bytearray(length)
        left = memoryview(data)
        ready = select.poll()
        ready.register(self.output, select.POLLIN)
        while left:
            if not ready.poll(_PATIENCE_MS):
                raise EOFError
            count = os.readv(self.output, [left])
            if not count:
                raise EOFError
            left = left[count:]
        return data

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def help_boot(folder: Path, record: type[R], extract: Callable[[Block[R]], T]) -> None:
    """The helper's side, until its input ends."""
    with contextlib.suppress(OSError):  # where memory is short, better this process ends than the one it helps
        Path("/proc/self/oom_score_adj").write_text("1000")
    gc.disable()  # nothing stays
    files, decoder = Files(), line_decoder(record)
    _answer(b"")
    for line in sys.stdin.buffer:
        chunk = Chunk(*orjson.loads(line))
        made: Made[T]
        try:
            with files.reader(folder / chunk.name) as stream:
                made = Made(list(extracted(stream, chunk, decoder, extract)))
        except Exception:  # noqa: BLE001 - it is seen when the chunk is made again
            made = Made([], failed=True)
        _answer(msgspec.msgpack.encode(made))


def _answer(frame: bytes) -> None:
    sys.stdout.buffer.write(_LENGTH.pack(len(frame)) + frame)
    sys.stdout.buffer.flush()
