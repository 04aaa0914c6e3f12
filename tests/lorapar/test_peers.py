"""What `make peers` counts as a difference between PEFT's layers and ours."""

from tests.peers.run import differ, expected, uncollected


def test_a_test_that_passes_there_and_not_here_differs_and_no_other():
    outcomes = ("passed", "failed", "skipped")
    theirs = {f"{a}-{b}": {"outcome": a} for a in outcomes for b in outcomes} | {"gone": {"outcome": "passed"}}
    ours = {f"{a}-{b}": {"outcome": b} for a in outcomes for b in outcomes}
    assert differ(theirs, ours) == ["passed-failed", "passed-skipped", "gone"]


def test_a_file_that_cannot_be_read_is_named():
    """Without what PEFT's tests import, 328 of 5,547 were left, and all was well."""
    results = {
        "tests/test_a.py": {"outcome": "uncollected", "why": "No module named 'scipy'"},
        "b": {"outcome": "passed"},
    }
    assert uncollected(results) == {"tests/test_a.py": "No module named 'scipy'"}


def test_each_difference_that_is_expected_has_a_reason():
    reasons = expected()
    assert reasons
    assert all(test.startswith("tests/test_") and "::" in test and reason for test, reason in reasons.items())
