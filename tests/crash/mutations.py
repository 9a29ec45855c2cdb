"""Takes away each sync, rename and checksum comparison of the journal in turn, and looks whether a test notices.

`python -m tests.crash.mutations` prints a table; the exit status is 1 if a mutation survived.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
JOURNAL = Path("worker/journal")
TESTS = (
    "tests/faults/test_journal_crashes.py",
    "tests/faults/test_journal_damage.py",
    "tests/faults/test_journal_chunks.py",
    "tests/faults/test_journal_disk.py",
    "tests/faults/test_journal_repair.py",
    "tests/contract/test_journal.py",
    "tests/contract/test_journal_backup.py",
    "tests/contract/test_journal_overview.py",
    "tests/contract/test_reconstruction.py",
    "tests/contract/test_compaction.py",
    "tests/unit/test_journal_format.py",
)
_COPIED = ("worker", "schemas", "tests", "deploy", "config", "pyproject.toml", "README.md", "Makefile")

# A statement that is taken away, or a comparison that always finds what it should. A statement with a comment behind it
# is there for another reason than safety.
_STATEMENT = re.compile(r"^(\s+)(sync\(|sync_folder\(|files\.rename\(|self\._files\.rename\().*\)$")
_COMPARISON = re.compile(
    r"^(\s+)(el)?if (.*not checks\(.*|not data\.endswith\(b',.*|not np\.array_equal\(.*|not check_size_and_crc\(.*"
    r"|not sound\.result\(\)|Digest\.of\(.*|.*crc32\(data\) != .*|\(portion\.offset, .*):$"
)


@dataclass(frozen=True, slots=True)
class Mutation:
    file: Path
    line: int
    text: str
    instead: str


def mutations() -> Iterator[Mutation]:
    """All of them, from the source as it is."""
    for path in sorted((ROOT / JOURNAL).glob("*.py")):
        for number, text in enumerate(path.read_text().splitlines()):
            if found := _STATEMENT.match(text):
                yield Mutation(path.relative_to(ROOT), number, text, f"{found[1]}pass")
            elif found := _COMPARISON.match(text):
                yield Mutation(path.relative_to(ROOT), number, text, f"{found[1]}{found[2] or ''}if False:")


def killer(mutation: Mutation, folder: Path) -> str | None:
    """The first test that fails on a copy of the source with this mutation; None if none does."""
    target = folder / mutation.file
    original = target.read_text()
    lines = original.splitlines(keepends=True)
    lines[mutation.line] = mutation.instead + "\n"
    target.write_text("".join(lines))
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "-p", "no:cacheprovider", *TESTS],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "they do not end"
    finally:
        target.write_text(original)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", ran.stdout, re.MULTILINE)
    return failed[1] if failed else None


def main() -> None:
    survived = 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as name:
        folder = Path(name)
        for part in _COPIED:
            source = ROOT / part
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / part)
        for mutation in mutations():
            test = killer(mutation, folder)
            survived += test is None
            place = f"{mutation.file.name}:{mutation.line + 1}"
            print(f"{place:24}{mutation.text.strip()[:60]:62}{test or 'SURVIVED'}", flush=True)
    print(f"{survived} survived")
    sys.exit(survived > 0)


if __name__ == "__main__":
    main()
