"""Whatever arguments are, what is planned is built, or a sentence names what is wrong."""

import pytest

from tests.fuzz import fuzz
from tests.helpers import note


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "calls"), [("builder", 1000), ("functions", 200), ("settings", 100)])
def test_random_arguments(kind, calls):
    found = fuzz(kind, seed=2, calls=calls)
    note(f"fuzzed calls of the {kind} that gave what was planned", found["built"])
    note(f"fuzzed calls of the {kind} that named what is wrong", found["named"])
    assert not found["faults"], "\n".join(found["faults"])
    assert found["built"] + found["named"] == calls
