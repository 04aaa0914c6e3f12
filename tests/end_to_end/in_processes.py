"""Run stages of a recipe in this process, which may be one of a launch: what `lorapar VERB ...` does, watched.

    python -m tests.end_to_end.in_processes RECIPE OUTPUT_DIR sft,grpo [--section.key VALUE ...]

Rollouts are a function of the prompt, so that GRPO learns from the same completions in any number of processes. What is
handed to all-reduces of gradients is written to `exchanged.json`. In the environment,

    END names how process END_RANK ends, killed or refused, at the fourth step of the stage END_IN, or, of a stage that
    does not train, at its start; "drifts": it does not end, but has a weight of its own from then on;
    PAUSE has the main process sleep so many seconds in each stage that is its work alone;
    LIMIT is how many seconds a collective may take.
"""

import datetime
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from trl import GRPOTrainer

from lorapar.adapter.layers import lora_parameters
from lorapar.cli import main
from lorapar.distributed import launch
from lorapar.distributed.exchange import GradientExchange
from lorapar.errors import InputError
from lorapar.pipeline import running
from lorapar.training.trainer import PartitionedTrainer


def roll_out(trainer: GRPOTrainer, prompts: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
    """A number below 30 for each prompt, by the prompt and how often it came before: near its sum, or not."""
    made: list[list[int]] = []
    for place, prompt in enumerate(prompts):
        seed = hashlib.sha256(repr((prompt, prompts[:place].count(prompt))).encode()).digest()
        made.append(trainer._tokenizer(f"{seed[0] % 30:02}")["input_ids"])
    return made, None


def end(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise InputError("row 17: refused for the test")


def watch(folder: Path) -> None:
    GRPOTrainer._generate_single_turn = roll_out  # type: ignore[method-assign, assignment]
    average, backward = GradientExchange.average, PartitionedTrainer.backward_of_batch
    exchanged: list[int] = []

    def counted(exchange: GradientExchange) -> None:
        reduce = torch.distributed.all_reduce

        def reduced(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            exchanged.append(tensor.nbytes)
            return reduce(tensor, *arguments, **options)

        torch.distributed.all_reduce = reduced  # type: ignore[assignment]
        try:
            average(exchange)
        finally:
            torch.distributed.all_reduce = reduce
        if os.environ.get("RANK") == "0":
            (folder / "exchanged.json").write_text(json.dumps(exchanged))

    run_stage, reset_peak_memory = running._run_stage, running.reset_peak_memory
    stages: list[Any] = []

    def noted(stage: Any, run: Any) -> None:
        stages.append(stage)
        run_stage(stage, run)

    def at_start() -> None:
        reset_peak_memory()
        if mine and stages[-1].name == os.environ.get("END_IN") and not stages[-1].trains:
            end(os.environ["END"])
        if os.environ.get("RANK") == "0" and not stages[-1].together:
            time.sleep(float(os.environ.get("PAUSE", "0")))

    running._run_stage, running.reset_peak_memory = noted, at_start
    launch.LIMIT = datetime.timedelta(seconds=float(os.environ.get("LIMIT", "7200")))
    mine = os.environ.get("RANK", "0") == os.environ.get("END_RANK")

    def until(trainer: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        if mine and trainer.stage == os.environ.get("END_IN") and trainer.state.global_step == 3:
            if os.environ["END"] != "drifts":
                end(os.environ["END"])
            next(iter(lora_parameters(trainer.model).values())).data[0, 0] += 1e-3
        return backward(trainer, *arguments, **options)

    GradientExchange.average, PartitionedTrainer.backward_of_batch = counted, until  # type: ignore[method-assign]


if __name__ == "__main__":
    recipe, output, stages, *options = sys.argv[1:]
    watch(Path(output))
    for stage in stages.split(","):
        status = main([stage, recipe, "--output_dir", output, *options])
        if status:
            sys.exit(status)
