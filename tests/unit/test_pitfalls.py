"""The table of pitfalls: every one is in it, with a test that exists, or with a reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KNOWN = {*(f"A{number}" for number in range(1, 17)), *(f"R{number}" for number in range(1, 19))}
ROWS = {
    row[1].strip(): row[3].strip()
    for line in (ROOT / "tests/PITFALLS.md").read_text().splitlines()
    if len(row := line.split("|")) == 5 and re.fullmatch(r" [AR]\d+ ", row[1])
}
TESTS = sorted({named for line in ROWS.values() for named in re.findall(r"`(tests/\S+::\S+)`", line)})


def test_every_pitfall_has_a_test_or_a_reason() -> None:
    assert ROWS.keys() == KNOWN
    assert all("::test_" in line or line.endswith(".") for line in ROWS.values())


@pytest.mark.parametrize("named", TESTS)
def test_a_test_that_is_named_exists(named: str) -> None:
    file, _, name = named.partition("::")
    assert re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE)
