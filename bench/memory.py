"""Memory and speed of training, ours beside TRL with PEFT's layers; and the plan against what was measured.

    python -m bench.memory --cpu       SmolLM2-135M on the CPU: an SFT step of 8 × 512 tokens, each way, TRL's without
                                       recomputing too, and ours with each layer computed alone
    python -m bench.memory --plan      `lorapar plan`'s figure and the measured peak of 14 CPU configurations
                                       (--drawn N: of N drawn at random)
    python -m bench.memory             one GPU: an SFT and a GRPO step at 2 k, 8 k and 32 k tokens, and the longest
                                       context under 8, 12, 16 and 24 GB, on random weights of 7B to 8B shapes

On a GPU all of it takes hours, and needs TRL and datasets: it is for a machine of one's own. What a GPU is asked in
minutes, without either, is bench/gpu/training_*.py. Each case runs in a process of its own (memory_case.py). Tables go
to the terminal, all figures to bench/results/memory_<device>.json. TRL's own defaults stand (recomputing on, its tiled
head) but for the precision and what a line names.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.training_cases import SHAPES, Case, recipe_of

RESULTS = Path(__file__).with_name("results")
# What a recipe of ours sets on a CPU: no recomputing, parts of 512 tokens.
OURS_ON_CPU = {"micro_batch_tokens": 512, "trainer": {"gradient_checkpointing": False}}
GB = 10**9
KEYS = "tokens_per_second", "tokens_per_cpu_second", "peak_bytes_above_model"


def run(siblings: bool = True, **settings: Any) -> dict[str, Any]:
    """One case in its own process; what it printed, or {"failed": its last line}.

    siblings: whether layers of one input share one op (lorapar_kernels/siblings.py).
    """
    command = [sys.executable, "-m", "bench.memory_case", json.dumps(settings)]
    environment = os.environ | {
        "LORAPAR_BENCH_WAY": settings.get("way", "ours"),
        "LORAPAR_SIBLINGS": str(int(siblings)),
    }
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment)
    if done.returncode != 0:
        return {**settings, "failed": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def write(name: str, results: list[dict[str, Any]]) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    facts = {"commit": commit, "device": device, "torch": torch.__version__, "threads": torch.get_num_threads()}
    (RESULTS / f"memory_{name}.json").write_text(json.dumps({**facts, "cases": results}, indent=1) + "\n")


def on_cpu(rounds: int) -> None:
    """Turns, so that what else the machine does falls on every way."""
    ways = {
        "trl": {"way": "trl"},
        "trl, no recomputing": {"way": "trl", "trainer": {"gradient_checkpointing": False}},
        "ours, layer by layer": {"way": "ours", "siblings": False, **OURS_ON_CPU},
        "ours": {"way": "ours", **OURS_ON_CPU},
    }
    results: list[dict[str, Any]] = []
    for _ in range(rounds):
        for name, settings in ways.items():
            results.append({"name": name, **run(batch=8, length=512, prompt=256, steps=3, **settings)})
            print(line(results[-1]), flush=True)

    def median(name: str, key: str) -> float:
        values = sorted(result[key] for result in results if result["name"] == name)
        return values[len(values) // 2]

    for other in list(ways)[:-1]:
        faster, in_cpu, share = (median("ours", key) / median(other, key) for key in KEYS)
        print(f"against {other}: {faster:.2f} times the tokens per second ({in_cpu:.2f} by CPU time), "
              f"{share:.2f} of the peak above the model")  # fmt: skip
    write("cpu", results)


def line(result: dict[str, Any]) -> str:
    r = {"stage": "sft", "model": "", "name": result["way"], **result}
    what = f"{r['name']:<20} {r['stage']:<5} {r['model']:<14} {r['batch']:>3} × {r['length']:<6}"
    if "failed" in result or result.get("out_of_memory"):
        return f"{what} {result.get('failed', 'out of memory')}"
    above, model = result["peak_bytes_above_model"] / GB, result["model_bytes"] / GB
    return f"{what} {result['tokens_per_second']:>9.1f} tokens/s {above:>7.3f} GB above {model:.3f}"


# Batch, length, recomputing, tokens at once, rank, dtype.
MATRIX = [
    (1, 128, False, 512, 8, "float32"), (1, 512, False, 512, 8, "float32"), (4, 128, False, 512, 8, "float32"),
    (2, 256, False, None, 8, "float32"), (4, 256, False, None, 8, "float32"), (2, 512, False, None, 8, "float32"),
    (1, 1024, False, None, 8, "float32"), (2, 512, False, 512, 64, "float32"), (4, 256, True, None, 8, "float32"),
    (2, 512, True, None, 8, "float32"), (1, 256, False, None, 8, "bfloat16"), (2, 256, True, None, 8, "bfloat16"),
    (8, 32, False, 512, 16, "float32"), (8, 64, False, None, 16, "float32"),
]  # fmt: skip


def drawn(count: int, seed: int) -> list[tuple[Any, ...]]:
    """Configurations that no factor of the plan was fitted to."""
    draw = random.Random(seed)
    return [
        (draw.randint(1, 6), draw.randrange(40, 360, 8), draw.random() < 0.5, draw.choice([None, 512]),
         draw.choice([4, 8, 16, 32]), "float32")
        for _ in range(count)
    ]  # fmt: skip


def against_plan(configurations: list[tuple[Any, ...]], name: str) -> bool:
    """Peak resident set of one SFT step, planned and measured; whether every one is within 15 %."""
    from lorapar.memory.needs import Lengths, need

    results, columns = [], "{:<16}{:<11}{:<9}{:<6}{:<10}{:>9}{:>10}{:>8}"
    print(columns.format("batch × length", "recompute", "at once", "rank", "dtype", "planned", "measured", "off"))
    for batch, length, recompute, at_once, rank, dtype in configurations:
        case = Case(batch=batch, length=length, prompt=1, steps=1, rank=rank, dtype=dtype, active=1.0,
                    micro_batch_tokens=at_once, trainer={"gradient_checkpointing": recompute})  # fmt: skip
        measured = run(**dataclasses.asdict(case))
        recipe = recipe_of(case, case.model)
        planned = need(recipe, Lengths(1, length, "the case"), "sft")
        peak = measured["model_bytes"] + measured["peak_bytes_above_model"]
        off = planned.total / peak - 1
        results.append({**measured, "planned_bytes": planned.total, "measured_bytes": peak, "off": off})
        figures = f"{planned.total / GB:.3f}", f"{peak / GB:.3f}", f"{off:+.1%}"
        print(columns.format(f"{batch} × {length}", str(recompute), str(at_once), rank, dtype, *figures), flush=True)
    write(name, results)
    return all(abs(result["off"]) <= 0.15 for result in results)


def longest_context(way: str, model: str, cap: int) -> int:
    """The longest single row, to a sixteenth, of which a step fits under `cap` bytes of reserved memory; 0 for none."""

    def fits(length: int) -> bool:
        result = run(way=way, model=model, batch=1, length=length, prompt=1, steps=1, cap=cap, **on_gpu(way))
        return "failed" not in result and not result.get("out_of_memory", False)

    low, high = 0, 1024
    while high <= 1 << 18 and fits(high):
        low, high = high, 2 * high
    while low and high - low > low // 16:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def on_gpu(way: str) -> dict[str, Any]:
    """The switches of a memory-short recipe: recomputing, off-loaded in ours."""
    settings = {"base": "nf4", "dtype": "bfloat16", "device": "cuda", "offloading": way == "ours"}
    # Unsloth's own recomputing is asked for where its layers are made.
    return settings | {"trainer": {} if way == "unsloth" else {"gradient_checkpointing": True}}


def on_cuda(models: list[str], contexts: list[int], caps: list[int]) -> None:
    results: list[dict[str, Any]] = []
    installed = importlib.util.find_spec("unsloth") is not None
    if not installed:
        print("unsloth is not installed: left out")
    for model in models:
        for length in contexts:
            for stage, batch in (("sft", 1), ("grpo", 4)):
                for way in ("ours", "trl", *(["unsloth"] if installed and stage == "sft" else [])):
                    settings: dict[str, Any] = on_gpu(way) | {"prompt": 1 if stage == "sft" else length // 2}
                    results.append(
                        run(way=way, stage=stage, model=model, batch=batch, length=length, steps=3, **settings)
                    )
                    print(line(results[-1]), flush=True)
        for cap in caps:
            for way in ("ours", "trl", *(["unsloth"] if installed else [])):
                longest = longest_context(way, model, cap * GB)
                results.append({"way": way, "model": model, "cap_bytes": cap * GB, "longest_context": longest})
                print(f"{way:<5} {model:<14} longest context under {cap} GB: {longest:,}", flush=True)
    write("gpu", results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="the CPU comparison")
    parser.add_argument("--plan", action="store_true", help="the plan against measured peaks")
    parser.add_argument("--drawn", type=int, default=0, help="with --plan: so many configurations drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    parser.add_argument("--rounds", type=int, default=1, help="of the CPU comparison")
    parser.add_argument("--models", nargs="*", default=list(SHAPES), help="of the GPU comparison")
    parser.add_argument("--contexts", nargs="*", type=int, default=[2048, 8192, 32768])
    parser.add_argument("--caps", nargs="*", type=int, default=[8, 12, 16, 24], help="in GB")
    options = parser.parse_args()
    if options.plan:
        if options.drawn:
            sys.exit(0 if against_plan(drawn(options.drawn, options.seed), "plan_drawn_cpu") else 1)
        sys.exit(0 if against_plan(MATRIX, "plan_cpu") else 1)
    if options.cpu:
        on_cpu(options.rounds)
    else:
        if not torch.cuda.is_available():
            sys.exit("bench.memory: torch sees no CUDA device; --cpu and --plan run without one")
        on_cuda(options.models, options.contexts, options.caps)
