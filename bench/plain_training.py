"""One training step after another in a plain PyTorch loop: our layers, or PEFT's, on the same random model.

    python -m bench.plain_training     takes cases as lines of JSON (`Asked`) and answers each with a line of JSON

No TRL and no datasets: forward over one row of random tokens with gradient checkpointing, under autocast where the
model is in bf16 (as `bf16: true` runs a trainer); the mean loss over all positions; backward; optimizer. Two things
differ between the ways beside the layers:

    ours    the head and loss in pieces of HEAD_TOKENS positions (`lorapar.training.answer_head.AnswerLogProbs`), unless
            the case asks for transformers' own, and `PartitionedAdamW` over 40 % of the elements, chosen at random
    peft    transformers' own head and loss, and torch's fused AdamW over all of them

A process keeps the model that its first case loads, so each model and way takes a process of its own (workers.py), and
what the allocator had reserved for one is not counted for another.
"""

import contextlib
import dataclasses
import gc
import json
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lorapar
from bench.training_cases import Case, load, with_adapter
from lorapar.adapter.layers import lora_parameters
from lorapar.memory.process import is_out_of_memory, peak_memory_bytes, reset_peak_memory
from lorapar.partitioning.partition import SETS, Partition
from lorapar.training.answer_head import AnswerLogProbs

# Positions whose logits are there at a time: 0.26 GB in fp32 for 128,256 words, and products still of full speed.
HEAD_TOKENS = 512
WARM_UP = 256


@dataclass
class Asked(Case):
    """`untimed` steps of the case's length before `steps` timed ones; whole_head: transformers' own head and loss."""

    untimed: int = 1
    whole_head: bool = False


class Loop:
    """A model with adapters, its optimizer, and steps of whatever length is asked for."""

    def __init__(self, case: Asked):
        self.device = torch.device(case.device)
        base = load(case)
        self.model = with_adapter(case, base)
        base.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        if case.way == "ours":
            lorapar.activate(self.model, random_share(self.model, case.active), "sft")
            self.optimizer: torch.optim.Optimizer = lorapar.PartitionedAdamW(self.model, lr=1e-4, weight_decay=0.1)
        else:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.1, fused=True)
        self.autocast = case.dtype == "bfloat16"
        # Random weights are made whole and then quantised; a checkpoint is quantised as it is read.
        self.free()
        self.model_bytes = torch.cuda.memory_allocated() if case.device == "cuda" else 0
        # Moments exist from the first step on, and every kernel is compiled.
        self.step(min(WARM_UP, case.length), whole_head=case.way != "ours" or case.whole_head)

    def step(self, length: int, whole_head: bool) -> float:
        ids = torch.randint(8, self.model.config.vocab_size, (1, length), device=self.device)
        precision: Any = torch.autocast(self.device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext()
        with precision:
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss if whole_head else self.in_pieces(ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach().item()

    def in_pieces(self, ids: Tensor) -> Tensor:
        model = self.model.get_base_model()
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        head = model.get_output_embeddings()
        log_probs: Any = AnswerLogProbs.apply(hidden, head.weight, head.bias, ids[:, 1:].flatten(), HEAD_TOKENS)
        return -log_probs[0].mean()

    def free(self) -> None:
        """What no tensor holds goes back to the GPU, so that the next case's peak is its own."""
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measured(self, case: Asked) -> dict[str, Any]:
        whole_head = case.way != "ours" or case.whole_head
        self.free()
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min((case.cap or total) / total, 1.0))
            before = torch.cuda.memory_allocated()
        else:
            before = 0
        reset_peak_memory()
        # Every way sees the same tokens, so that their losses can be compared.
        torch.manual_seed(0)
        seconds, losses = [], []
        for number in range(case.untimed + case.steps):
            self.wait()
            began = time.perf_counter()
            losses.append(self.step(case.length, whole_head))
            self.wait()
            if number >= case.untimed:
                seconds.append(time.perf_counter() - began)
        return {
            "seconds": seconds,
            "losses": losses,
            "before_bytes": before,
            "allocated_bytes": peak_memory_bytes(),
            # A CPU's allocator reserves nothing that the resident set does not hold.
            "reserved_bytes": torch.cuda.max_memory_reserved() if case.device == "cuda" else peak_memory_bytes(),
        }


def random_share(model: nn.Module, share: float) -> Partition:
    """A partition in which every stage trains `share` of the elements, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    masks = {
        name: torch.rand(parameter.shape, generator=generator) < share
        for name, parameter in lora_parameters(model).items()
    }
    return Partition(dict.fromkeys(SETS, masks), {"selection": "random", "rank": None})


def answer(loops: list[Loop], case: Asked) -> dict[str, Any]:
    """The case's figures, or {"out_of_memory": True}, or {"missing": a package that is not installed}."""
    began = time.perf_counter()
    try:
        if not loops:
            loops.append(Loop(case))
        loaded = time.perf_counter() - began
        return {**loops[0].measured(case), "model_bytes": loops[0].model_bytes, "load_seconds": loaded}
    except ModuleNotFoundError as error:
        return {"missing": error.name}
    except (RuntimeError, MemoryError) as error:
        # cuBLAS has an error of its own for a workspace that it cannot have.
        if not is_out_of_memory(error) and "ALLOC_FAILED" not in str(error):
            raise
    # Outside the handler, whose traceback holds the tensors of the step.
    gc.collect()
    for loop in loops:
        loop.free()
    return {"out_of_memory": True}


def main() -> None:
    # What a library prints goes to the log; the answers alone go to whoever asked.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    loops: list[Loop] = []
    for line in sys.stdin:
        case = Asked(**json.loads(line))
        print(json.dumps({**dataclasses.asdict(case), **answer(loops, case)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
