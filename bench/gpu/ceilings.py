"""What this GPU can do at best: copy bandwidth and the rate of a bf16 product, to read every other figure against."""

import torch

from bench.gpu import record, timing

GOAL_BYTES, SIDE = 1 << 32, 8192


def main() -> None:
    device = record.device()
    if not record.rehearsal():
        of = torch.cuda.get_device_properties(0)
        for name, unit, value in (
            ("compute capability", "", of.major + of.minor / 10),
            ("multiprocessors", "", of.multi_processor_count),
            ("memory", "B", of.total_memory),
            ("L2", "B", of.L2_cache_size),
            ("shared memory of a block", "B", of.shared_memory_per_block_optin),
        ):
            record.result(name, unit, value)
    bytes_, side = (1 << 20, 128) if record.rehearsal() else (GOAL_BYTES, SIDE)
    source = torch.ones(bytes_ // 4, device=device)
    target = torch.empty_like(source)
    found = timing.times({"copy": lambda: target.copy_(source)}, ("events",))["copy"]["events"]
    # Read and written.
    record.spread(
        "copy", "B/s", [2 * bytes_ / seconds for seconds in found], "copy, bytes read and written", size=bytes_
    )
    torch.manual_seed(0)
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    found = timing.times({"product": lambda: left @ right}, ("events",), calls=10)["product"]["events"]
    rates = [2 * side**3 / seconds for seconds in found]
    record.spread("product", "FLOP/s", rates, f"bf16 product {side}³, random data", size=side)
