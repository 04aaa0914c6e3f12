"""Does I(φ) say what it should? Predicted against measured loss when LoRA elements are set to zero, in float64.

    python -m bench.validate_importance        # a minute or two on one core; writes bench/results/ and docs/

A two-layer Llama of 64 dimensions learns one-digit sums from scratch; then a LoRA adapter of rank 4 on its six
projections is scored on 128 rows of two-digit sums, which it has not learnt, in two states: at the paper's start
N(0, 0.01²), and after 150 steps of AdamW on such sums. The loss is the mean over rows of each row's own mean over its
answer, as in scoring, on the rows that were scored.

    single elements: the signed change −gφ + ½Fφ² that the paper's expansion predicts, against the change measured;
    sets: the loss after setting the lowest 10, 50 and 90 % of all elements to zero by I(φ), |gφ|, |φ|, or by chance.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lorapar
import lorapar_kernels as lk
from bench.conftest import commit, write_whole
from lorapar.adapter.layers import ADAPTER, lora_parameters
from lorapar.scoring.sums import RunningSums

HERE = Path(__file__).parent
SYMBOLS = "0123456789+= "
ROWS, ELEMENTS, SEEDS = 128, 400, 5
SHARES = (0.1, 0.5, 0.9)
TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
Row = dict[str, list[int]]


def sums(count: int, digits: int, generator: torch.Generator) -> list[Row]:
    """Rows `a+b=` → the sum, a and b of up to `digits` digits."""
    rows = []
    for a, b in torch.randint(0, 10**digits, (count, 2), generator=generator).tolist():
        prompt, answer = f"{a}+{b}=", f"{a + b} "
        ids = [SYMBOLS.index(symbol) for symbol in prompt + answer]
        rows.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    return rows


def losses(model: nn.Module, rows: list[Row]) -> Tensor:
    """Each row's own mean over its answer tokens, [rows]."""
    width = max(len(row["input_ids"]) for row in rows)
    ids, targets = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        targets[i, : len(row["labels"]) - 1] = torch.tensor(row["labels"][1:])
    logits = model(input_ids=ids, use_cache=False).logits.transpose(1, 2)
    each = nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    return each.sum(1) / (targets != -100).sum(1)


def train(model: nn.Module, digits: int, steps: int, lr: float, generator: torch.Generator) -> None:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, 2 * (1 - step / steps))
        losses(model, sums(64, digits, generator)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(SYMBOLS), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=32, bos_token_id=None,
                         eos_token_id=None, pad_token_id=None)  # fmt: skip
    model = LlamaForCausalLM(config)
    train(model, digits=1, steps=800, lr=3e-3, generator=torch.Generator().manual_seed(1))
    return model


class Zeroed:
    """The loss on some rows with some LoRA elements set to zero, all elements of the model counted in one row."""

    def __init__(self, model: nn.Module, rows: list[Row]):
        self.model, self.rows = model, rows
        self.parameters = list(lora_parameters(model).values())
        self.values = torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters])
        self.before = self._loss()

    @torch.no_grad()
    def _loss(self) -> float:
        return float(losses(self.model, self.rows).mean())

    @torch.no_grad()
    def change(self, elements: Tensor) -> float:
        """The loss with those elements (indices) at zero, less the loss as it is."""
        values = self.values.clone()
        values[elements] = 0.0
        self._set(values)
        changed = self._loss() - self.before
        self._set(self.values)
        return changed

    def _set(self, values: Tensor) -> None:
        for parameter, part in zip(self.parameters, values.split([p.numel() for p in self.parameters])):
            parameter.copy_(part.view(parameter.shape))


def measure(model: nn.Module, rows: list[Row]) -> dict[str, Any]:
    gathered: dict[str, lk.ScoreSums] = {}

    def keep(running: RunningSums) -> None:
        gathered.update(running.sums)

    scores = lorapar.score(model, None, rows, batch_size=64, on_batch=keep)
    names = list(lora_parameters(model))
    by_name = {
        f"{layer}.{factor}.{ADAPTER}.weight": pair
        for layer, found in gathered.items()
        for factor, pair in (("lora_A", found[:2]), ("lora_B", found[2:]))
    }
    first, second = (torch.cat([by_name[name][i].reshape(-1) for name in names]) / len(rows) for i in (0, 1))
    importance = torch.cat([scores[name].reshape(-1) for name in names]).double()
    torch.testing.assert_close(importance, (first - second / 2).abs(), rtol=1e-4, atol=1e-12)
    zeroed = Zeroed(model, rows)
    generator = torch.Generator().manual_seed(2)
    order = importance.argsort(descending=True)
    # Half by chance, half of those that score highest: of the rest hardly one changes anything.
    chance = torch.randperm(len(order), generator=generator)[: ELEMENTS // 2]
    chosen = torch.cat([order[: ELEMENTS // 2], chance]).unique()
    measured = torch.tensor([zeroed.change(element[None]) for element in chosen], dtype=torch.float64)
    predicted = {"gradient alone": -first[chosen], "gradient and Fisher": -first[chosen] + second[chosen] / 2}
    single = {
        name: {
            "correlation": float(torch.corrcoef(torch.stack([values, measured]))[0, 1]),
            "relative_error": float((values - measured).norm() / measured.norm()),
            "same_sign": float((values.sign() == measured.sign()).double().mean()),
        }
        for name, values in predicted.items()
    }
    keys = {"I": importance, "|g·φ|": first.abs(), "|φ|": zeroed.values.abs()}
    sets: dict[str, dict[str, float]] = {name: {} for name in (*keys, "chance", "predicted for I")}
    for share in SHARES:
        count = int(share * len(importance))
        for name, key in keys.items():
            sets[name][str(share)] = zeroed.change(key.argsort()[:count])
        lowest = importance.argsort()[:count]
        sets["predicted for I"][str(share)] = float((-first[lowest] + second[lowest] / 2).sum())
        draws = [zeroed.change(torch.randperm(len(importance), generator=generator)[:count]) for _ in range(SEEDS)]
        sets["chance"][str(share)] = sum(draws) / SEEDS
    return {
        "loss": zeroed.before,
        "elements": len(importance),
        "fisher_over_gradient": float((second / 2 / first.abs()).nanmedian()),
        "single": single,
        "sets": sets,
        "points": {"predicted": predicted["gradient and Fisher"].tolist(), "measured": measured.tolist()},
    }


def draw(states: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(states), 2, figsize=(9, 3.6 * len(states)), layout="constrained")
    for (left, right), (state, found) in zip(axes, states.items()):
        points = found["points"]
        ends = [min(*points["measured"], *points["predicted"]), max(*points["measured"], *points["predicted"])]
        left.plot(ends, ends, color="0.7", linewidth=1)
        left.scatter(points["predicted"], points["measured"], s=8)
        r = found["single"]["gradient and Fisher"]["correlation"]
        left.set(title=f"{state}: one element set to zero (r = {r:.4f})", xlabel="predicted: −gφ + ½Fφ²",
                 ylabel="change of loss measured")  # fmt: skip
        for name, marker in (("I", "o"), ("|g·φ|", "x"), ("|φ|", "s"), ("chance", "^")):
            changes = [found["sets"][name][str(share)] for share in SHARES]
            right.plot([100 * share for share in SHARES], changes, marker=marker, label=f"lowest by {name}")
        right.axhline(0, color="0.7", linewidth=1)
        right.set(title=f"{state}: loss {found['loss']:.3f} as it is", xlabel="% of elements set to zero",
                  ylabel="change of loss measured")  # fmt: skip
        right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=HERE / "results" / "importance_validation.json")
    parser.add_argument("--picture", type=Path, default=HERE.parent / "docs" / "importance_validation.png")
    given = parser.parse_args()
    config = LoraConfig(r=4, lora_alpha=32, target_modules=TARGETS)
    model = lorapar.attach(base_model(), config, start="paper")
    rows = sums(ROWS, 2, torch.Generator().manual_seed(3))
    states: dict[str, dict[str, Any]] = {}
    states["paper's start"] = measure(model.double().eval(), rows)
    for parameter in lora_parameters(model).values():
        parameter.requires_grad_(True)
    train(model, digits=2, steps=150, lr=3e-3, generator=torch.Generator().manual_seed(4))
    states["after 150 steps"] = measure(model.eval(), rows)
    facts = {"commit": commit(), "torch": torch.__version__, "dtype": "float64", "rows": ROWS, "states": states}
    write_whole(given.results, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    draw(states, given.picture)
    for state, found in states.items():
        print(state, json.dumps({k: v for k, v in found.items() if k != "points"}, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
