"""Whether loading a file may unpickle something, which runs code.

Nothing is unpickled to find out. `pickletools` decodes opcodes, a bounded number of them and only from the head of the
file. The answer is a tripwire, not a scanner's verdict on what a pickle does: any pickle counts, and a file that is
named as one counts unless it is known to be something else.
"""

from __future__ import annotations

import ast
import io
import pickletools
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from worker.validation.archives import Member, compression, is_tar, member_begins, peek, zip_members
from worker.validation.sniffing import Content
from worker.validation.source import Ends, Source

# Loaders of these names unpickle whatever is inside.
ALWAYS_PICKLE = frozenset({".pkl", ".pickle", ".joblib", ".pt", ".pth", ".dill", ".cloudpickle"})
# These may hold a pickle without the two leading bytes that newer ones have, too long to be seen to its end.
OFTEN_PICKLE = frozenset({".bin", ".ckpt", ".npy", ".npz", ".sav", ".dat", ".data", ".model", ".th", ".params"})
# Here a `.bin` is raw weights, whose first bytes may be an opcode by chance.
_RAW_WEIGHTS = frozenset({"openvino", "onnx", "coreml", "tensorflow", "jax", "gguf", "ggml", "ncnn"})
_TORCH = frozenset({"pytorch", "torchscript"})
# Any text may decode as old opcodes: "cat", "dog" on two lines is an import of `at.dog`.
_PROSE = {".txt", ".md", ".rst", ".log", ".html", ".py", ".sh", ".jinja", ".vocab", ".merges", ".tokens", ".tiktoken"}
_RECORDS = {".json", ".jsonl", ".yaml", ".yml", ".toml", ".xml", ".csv", ".tsv", ".cfg", ".ini", ".prototxt", ".pbtxt"}

_OPCODES_MAX = 4096
_NPY_HEADER_MAX = 10_000
_ARRAYS_MAX = 10_000
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*", re.ASCII)
# What can put a name on the stack, where STACK_GLOBAL takes two from.
_STRINGS = {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_NAMING = _STRINGS | {"GET", "BINGET", "LONG_BINGET", "DUP"}


@dataclass(frozen=True, slots=True)
class Trace:
    """How far bytes decode as pickles: `imports` says that something is imported, `stop` is the offset after the last
    STOP, and `cut` says that they were still opcodes where the look ended."""

    opcodes: int
    imports: bool
    stop: int | None
    cut: bool


def pickle_within(path: str, model_type: str, ends: Ends, content: Content, source: Source) -> str | None:
    """Why a file counts as pickle-bearing, as a clause that follows its name, or None if it does not.

    Raises DirectoryTooLargeError of a zip archive that lists too much to be looked through.
    """
    suffix = PurePosixPath(path).suffix.lower()
    if begins_with_protocol(ends.head):
        trace = decode(ends.head, ends.beyond)
        if trace.imports or trace.stop is not None or trace.cut:
            return "is a pickle"
    if "zip" in content.formats and (reason := _pickled_member(suffix, model_type, ends, source)):
        return reason
    if is_tar(ends.head) and (model_type in _TORCH or suffix in ALWAYS_PICKLE | OFTEN_PICKLE):
        return "is a tar archive, in which old versions of torch have pickles"
    if content.leading == "numpy" and npy_holds_objects(ends.head):
        return "is a NumPy array of Python objects, which are pickled"
    if content.leading is not None or not ends.size:
        return None
    if begins_with_protocol(inside := peek(ends.head)) and decode(inside, ends.size).opcodes > 1:
        return f"is a pickle, compressed with {compression(ends.head)}"
    if suffix in ALWAYS_PICKLE:
        return "is named as a pickle and is no other known format"
    # Names without a suffix are mostly those of texts, too (LICENSE, vocab).
    if not suffix or is_text_name(path):
        return None
    old = _is_old_pickle(decode(ends.head, ends.beyond), suffix, model_type, ends.size)
    return "is a pickle of an old protocol" if old else None


def is_text_name(path: str) -> bool:
    """Whether a file of this name is taken for text, which nobody unpickles."""
    return PurePosixPath(path).suffix.lower() in _PROSE | _RECORDS


def begins_with_protocol(head: bytes) -> bool:
    """Whether bytes begin with the PROTO opcode, as pickles since protocol 2 do."""
    return len(head) > 2 and head[0] == 0x80 and head[1] <= 5


def decode(head: bytes, beyond: int) -> Trace:
    """Decode opcodes, of one pickle after another, from the head of a file that goes on for `beyond` more bytes."""
    window = _Window(head, beyond)
    count = names = 0
    stop = None
    # Unpicklers read some numbers that pickletools does not, like a hexadecimal INT, so what it calls a bad argument
    # must not end the look: it goes on behind the argument. Likewise loaders may go on behind a pickle's end.
    while count < _OPCODES_MAX and not window.cut and not window.over:
        try:
            for opcode, argument, position in pickletools.genops(window):
                count += 1
                names += opcode.name in _NAMING
                if opcode.name == "STOP":
                    stop = (position or 0) + 1
                if _imports(opcode.name, argument, names):
                    return Trace(count, imports=True, stop=stop, cut=False)
                if opcode.name == "FRAME" and isinstance(argument, int) and argument > len(head) + beyond:
                    return Trace(count, imports=False, stop=stop, cut=False)
                if count >= _OPCODES_MAX:
                    break
        except ValueError as error:
            count += 1
            if str(error).endswith(" unknown"):
                return Trace(count - 1, imports=False, stop=stop, cut=False)
    return Trace(count, imports=False, stop=stop, cut=not window.over)


class _Window(io.BytesIO):
    """The head of a file, that notes when a read ends beyond it: `cut` within the file, `over` beyond that too."""

    def __init__(self, head: bytes, beyond: int) -> None:
        super().__init__(head)
        self._beyond = beyond
        self.cut = self.over = False

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if size is not None and (missing := size - len(data)) > 0:
            self.cut = missing <= self._beyond
            self.over = not self.cut
        return data

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        if self._beyond and not line.endswith(b"\n"):
            self.cut = True
        return line


def _imports(opcode: str, argument: object, names: int) -> bool:
    if opcode in ("GLOBAL", "INST"):
        # Two lines, that pickletools joins: prose has more words than a module's and an attribute's name.
        words = str(argument).split(" ")
        return len(words) == 2 and all(_NAME.fullmatch(word) for word in words)
    return opcode == "STACK_GLOBAL" and names >= 2


def _is_old_pickle(trace: Trace, suffix: str, model_type: str, size: int) -> bool:
    """Pickles without a leading PROTO have no magic: they must import, or be pickles from end to end."""
    if trace.imports or (trace.stop == size and trace.opcodes > 1):
        return True
    return trace.cut and suffix in OFTEN_PICKLE and model_type not in _RAW_WEIGHTS


def _pickled_member(suffix: str, model_type: str, ends: Ends, source: Source) -> str | None:
    """Of a zip archive the first file that a loader would unpickle, as a clause; readers of archives may ignore case.

    NumPy takes any file in an archive of its own for an array, whatever its name.
    """
    all_arrays = suffix == ".npz" or model_type == "numpy"
    seen: set[Member] = set()
    for member in zip_members(ends, source):
        kind = PurePosixPath(member.name).suffix.lower()
        if kind in ALWAYS_PICKLE:
            return f"is a zip archive that holds the pickle {member.name[:120]!r}"
        if (all_arrays or kind == ".npy") and member not in seen:
            if len(seen) == _ARRAYS_MAX:
                return f"is a zip archive of more than {_ARRAYS_MAX} arrays, which are not all looked into"
            seen.add(member)
            if any(begin is None or _begins_array_of_objects(begin) for begin in member_begins(member, source)):
                return f"is a zip archive that holds an array of Python objects, {member.name[:120]!r}"
    return None


def _begins_array_of_objects(begin: bytes) -> bool:
    return begin.startswith(b"\x93NUMPY") and npy_holds_objects(begin)


def npy_holds_objects(head: bytes) -> bool:
    """Whether a NumPy file's element type has Python objects in it; True if its header cannot be read."""
    length_bytes = 2 if head[6:7] == b"\x01" else 4
    start = 8 + length_bytes
    length = int.from_bytes(head[8:start], "little")
    if length > _NPY_HEADER_MAX or start + length > len(head):
        return True
    # Python 2 wrote its long numbers with an L.
    text = re.sub(r"(?<=\d)L\b", "", head[start : start + length].decode("latin-1"))
    try:
        header = ast.literal_eval(text.strip())
        return _has_objects(header["descr"])
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        return True


def _has_objects(descr: object) -> bool:
    """An element type is a string, a list of fields (name, type[, shape]), or a pair (type, shape)."""
    match descr:
        case str():
            return "O" in descr or "object" in descr
        case list():
            return any(_has_objects(field[1]) for field in descr)
        case (inner, _):
            return _has_objects(inner)
        case _:
            return True
