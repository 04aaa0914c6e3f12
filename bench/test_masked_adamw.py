"""`masked_adamw` against torch's fused AdamW over every element (optimizer_case.py)."""

import pytest

from bench.interleaved import interleave
from bench.optimizer_case import COPY, FUSED, optimizer_case

# The 7B's 17.9 M elements at 40 %: bytes allow 1.52.
REQUIRED = {("7b", 0.4): {FUSED: 1.2}}


@pytest.mark.parametrize("active", [0.4, 1.0], ids=["40%", "all"])
@pytest.mark.parametrize("model", ["135m", "7b"])
def test_masked_adamw(benchmark, report, device, model, active):
    case = optimizer_case(model, active, device)
    timed = interleave(benchmark, f"masked_adamw {device} {model} {active:.0%} active", case.ways, device, rounds=15)
    timed.required |= REQUIRED.get((model, active), {})
    case.check()
    bandwidth = case.moved() / timed.median("ours")
    copied = 24 * case.elements / timed.median(COPY)
    timed.facts = {"elements": case.elements, "state_bytes_an_active_element": case.state,
                   "bytes_per_second": bandwidth, "share_of_a_copys_bandwidth": bandwidth / copied}  # fmt: skip
    report(timed)
