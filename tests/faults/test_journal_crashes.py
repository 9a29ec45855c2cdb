"""A crash at every operation of what a journal does, on a disk that forgets: no promise is broken.

`python -m tests.crash` looks at far more of the same.
"""

from __future__ import annotations

import pytest

from tests.crash.scenarios import SCENARIOS
from tests.crash.stage import Scenario
from tests.crash.states import BOUNDED, enumerate_states


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name.replace(" ", "-"))
def test_a_crash_at_any_operation_loses_nothing_that_was_acknowledged(scenario: Scenario) -> None:
    counts = enumerate_states(scenario, BOUNDED)
    assert counts.states > counts.moments > 5
