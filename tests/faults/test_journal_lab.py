"""A bounded part of what `python -m tests.crash` does to real processes and real files; each in a process of its own,
since owners are forked from one that has a single thread.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest


def cases(*arguments: str) -> dict[str, int]:
    """How many cases each row of the lab's table has; no promise was broken in any. Skips what cannot be run here."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.crash", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    if reason := re.search(r"^NOT RUN (.*)$", ran.stdout, re.MULTILINE):
        pytest.skip(reason[1])
    rows = re.findall(r"^(\S.*?)  +([0-9,]+) ", ran.stdout, re.MULTILINE)
    return {name: int(number.replace(",", "")) for name, number in rows}


def test_a_kill_while_it_boots_appends_rotates_or_compacts_loses_nothing_that_was_acknowledged() -> None:
    assert cases("kills", "--count", "50")["SIGKILL"] == 50


def test_a_fault_in_place_of_a_system_call_loses_nothing_and_acknowledges_nothing_false() -> None:
    found = cases("injections", "--every", "11")
    assert found["injected faults"] > 50
    assert found["short writes"] > 5


def test_damage_to_any_file_is_reported_and_damage_to_a_derived_one_is_made_up_for() -> None:
    found = cases("damage", "--every", "101")
    assert len(found) == 7
    assert found["all"] > 500
