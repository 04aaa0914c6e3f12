"""What `make peers` counts as a difference between PEFT's layers and ours."""

from tests.peers.run import differ, expected


def test_a_test_that_passes_there_and_not_here_differs_and_no_other():
    outcomes = ("passed", "failed", "skipped")
    theirs = {f"{a}-{b}": {"outcome": a} for a in outcomes for b in outcomes} | {"gone": {"outcome": "passed"}}
    ours = {f"{a}-{b}": {"outcome": b} for a in outcomes for b in outcomes}
    assert differ(theirs, ours) == ["passed-failed", "passed-skipped", "gone"]


def test_each_difference_that_is_expected_has_a_reason():
    reasons = expected()
    assert reasons
    assert all(test.startswith("tests/test_") and "::" in test and reason for test, reason in reasons.items())
