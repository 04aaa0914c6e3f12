"""The cards of what is exported: beside `adapter/` and `merged/`, and of the repository that `lorapar push` makes.

All say how to load it, show the prompt as in training, and what ends an answer. The repository's card adds how the
adapter was trained and what its answers are worth, out of the run's own files.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..data.tokens import prompt_ids
from ..files import read_text, write_text

# Asked in a card, so that no row of anybody's data is published.
QUESTION = "What is 2 + 3?"
ADAPTER = """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("this folder")"""
# PEFT has no auto class for a multimodal model, and its class for text would load another one.
ADAPTER_OF_WRAPPER = """from peft import PeftModel
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "this folder")"""
PAPER = "https://huggingface.co/papers/2507.20999"
CITATION = """```bibtex
@inproceedings{huang2025lorapar,
  title     = {{LoRA-PAR: A Flexible Dual-System LoRA Partitioning Approach to Efficient LLM Fine-Tuning}},
  author    = {Huang, Yining and Li, Bin and Tang, Keke and Chen, Meilian},
  booktitle = {Findings of the Association for Computational Linguistics: EMNLP 2025},
  pages     = {13693--13704},
  year      = {2025}
}
```"""
PROMPT = "## Prompt"
MERGED = """from transformers import {auto_class}

model = {auto_class}.from_pretrained("this folder")"""


def write_card(
    folder: Path, base: str, tokenizer: Any, prompt: Any, stops: list[int], merged: bool, auto_class: str,
    weights: str = "",
) -> None:  # fmt: skip
    """Write `folder`/README.md.

    Args:
        base: the base model's name. prompt: text or messages, shown as tokens make of it what every stage was given.
        stops: the ids that end an answer. merged: the folder holds a whole model, not an adapter.
        auto_class: the transformers class that loads the base as what it is. weights: how those that were trained on
            differ from the base's own.
    """
    shown = tokenizer.decode(prompt_ids({"prompt": prompt}, tokenizer))
    fence = "````"
    ends = ", ".join(f"`{tokenizer.convert_ids_to_tokens(token)}` ({token})" for token in stops)
    tags = ["lora-par", "lora"] if merged else ["lora-par", "lora", f"base_model:adapter:{base}"]
    form = (
        "Every stage and the evaluation asked the model in this form, which this folder's tokenizer writes "
        "(`tokenizer.apply_chat_template(messages, add_generation_prompt=True)`):"
        if isinstance(prompt, list)
        else "Every stage and the evaluation asked the model in plain text, without a chat template. Words in braces "
        "stand for what a row has there:"
    )
    differs = f"It was trained on that model's weights {weights}; on the model's own its answers differ a little."
    text = auto_class == "AutoModelForCausalLM"
    code = MERGED if merged else ADAPTER if text else ADAPTER_OF_WRAPPER
    lines = [
        "---",
        f"base_model: {base}",
        f"library_name: {'transformers' if merged else 'peft'}",
        f"pipeline_tag: {'text-generation' if text else 'image-text-to-text'}",
        "tags:",
        *[f"- {tag}" for tag in tags],
        "---",
        "",
        f"# {Path(base).name}, trained with LoRA-PAR",
        "",
        f"{'The model' if merged else 'An adapter'} of `{base}`, trained by "
        f"[LoRA-PAR]({PAPER}): SFT of the System 1 elements, then GRPO of the System 2 "
        "elements.",
        "",
        *([differs, ""] if weights and not merged else []),
        "```python",
        code.format(auto_class=auto_class, base=base),
        "```",
        "",
        PROMPT,
        "",
        form,
        "",
        fence,
        shown,
        fence,
        "",
        f"An answer ends with {ends}." if stops else "No token ends an answer.",
        "",
    ]
    write_text(folder / "README.md", "\n".join(lines))


@dataclass(frozen=True)
class Published:
    """What a repository's card says of a run.

    Attributes:
        repository: owner/name. base: the base's hub id (`on_hub`), or the name that the adapter gives it.
        revision: of the base on the hub. base_facts: lines on how to get it, or how far its name is known.
        weights: how those that were trained on differ from the base's own.
        stages: the training stages in their order, with the systems that each trained on. selection: of their elements,
            as the recipe says it (partition.selection). data: names of the sources.
        datasets: those that are hub ids. settings: what was set, {title: value}. metrics: the run's metrics.json.
        licence: of the base, where it is known. vllm: what export found out about serving it (serving.py).
    """

    repository: str
    base: str
    on_hub: bool
    revision: str | None
    base_facts: list[str]
    weights: str
    stages: dict[str, list[int]]
    selection: Literal["scores", "random", "all"]
    data: list[str]
    datasets: list[str]
    settings: dict[str, str]
    metrics: dict[str, Any] = field(default_factory=dict)
    licence: str | None = None
    vllm: dict[str, Any] = field(default_factory=dict)


def hub_card(run: Published, adapter: Path) -> str:
    """The text of a repository's README.md; `adapter`: the exported folder, whose own card shows the prompt."""
    own = read_text(adapter / "README.md") if (adapter / "README.md").is_file() else ""
    wrapper = re.search(r"AutoModelFor(?!CausalLM)\w+", own)
    parts = [
        _front_matter(run, wrapper is not None),
        f"# {run.repository.partition('/')[2]}",
        _summary(run),
        *(["\n".join(run.base_facts)] if run.base_facts else []),
        _accuracy(run.metrics),
        _benchmarks(run.metrics),
        _loading(run, wrapper[0] if wrapper else "AutoModelForCausalLM"),
        # Without the line break that ends the file.
        own[own.index(f"\n{PROMPT}\n") :].strip() if f"\n{PROMPT}\n" in own else "",
        _training(run),
        f"## Citation\n\n{CITATION}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(run: Published, wrapper: bool) -> str:
    # JSON strings are YAML, whatever a name holds.
    known = run.on_hub
    lines = [
        "---",
        *([f"base_model: {json.dumps(run.base)}", "base_model_relation: adapter"] if known else []),
        "library_name: peft",
        f"pipeline_tag: {'image-text-to-text' if wrapper else 'text-generation'}",
        *([f"license: {run.licence}"] if run.licence else []),
        *(["datasets:", *(f"- {json.dumps(name)}" for name in run.datasets)] if run.datasets else []),
        "tags:",
        "- lora-par",
        "- lora",
        *([f"- {json.dumps(f'base_model:adapter:{run.base}')}"] if known else []),
        "---",
    ]
    return "\n".join(lines)


def _summary(run: Published) -> str:
    did = [
        f"{stage.upper()} on rows of {' and '.join(f'System {system}' for system in systems)}"
        for stage, systems in run.stages.items()
    ]
    what = {
        "scores": "Each stage trained the elements of the adapter that matter to its rows, and no other.",
        "random": "Each stage trained elements of the adapter that were chosen at random, as a control.",
        "all": "Every element of the adapter was trained, as in plain LoRA.",
    }[run.selection]
    text = f"A LoRA adapter of `{run.base}`, trained by [LoRA-PAR]({PAPER}): {', then '.join(did)}. {what}"
    if run.weights:
        text += (
            f"\n\nIt was trained on that model's weights {run.weights}; on the model's own its answers differ a little."
        )
    return text


TITLES = {"base": "base", "sft": "after SFT", "grpo": "after GRPO"}
GROUPS = {"all": "all rows", "system1": "System 1", "system2": "System 2"}


def _accuracy(metrics: dict[str, Any]) -> str:
    """The table of held-out answers: a row a model, a column a system, each with its 95 % interval and rows."""
    share = "accuracy" in metrics
    means = metrics.get("accuracy") or metrics.get("mean") or {}
    groups = [group for group in GROUPS if any(of.get(group) is not None for of in means.values())]
    if not groups:
        return ""

    def cell(model: str, group: str) -> str:
        value = means[model].get(group)
        if value is None:
            return "–"
        bounds = metrics.get("interval", {}).get(model, {}).get(group)
        text = f"{100 * value:.1f} %" if share else f"{value:.4g}"
        if bounds:
            low, high = (f"{100 * end:.1f}" if share else f"{end:.4g}" for end in bounds)
            text += f" ({low} to {high})"
        return text

    counts = metrics.get("n", {})
    heads = []
    for group in groups:
        # Accuracy's rows are the same for every model; a metric's may differ.
        rows = [counts.get(group)] if share else sorted({of.get(group) for of in counts.values()} - {None})
        heads.append(f"{GROUPS[group]} (n = {' to '.join(map(str, rows))})" if any(rows) else GROUPS[group])
    lines = [[str(TITLES.get(name, name)), *(cell(name, group) for group in groups)] for name in means]
    what = "Share of right greedy answers" if share else f"Mean of `{metrics.get('metric')}` over greedy answers"
    return f"## Results\n\n{what} to held-out rows, with 95 % intervals.\n\n{_table(['', *heads], lines)}"


def _benchmarks(metrics: dict[str, Any]) -> str:
    """The figures of lm-evaluation-harness: a row a task and metric, a column a model, each with its standard error."""
    tasks = metrics.get("tasks", {})
    models = [name for name in TITLES if any(name in facts for facts in tasks.values())]
    # Of a group with figures of its own, those alone: MMLU has 57 parts.
    parts = {part for facts in tasks.values() if facts.get("base") for part in facts.get("subtasks", [])}
    rows = []
    for task, facts in tasks.items():
        n, of = facts.get("n"), facts.get("of")
        asked = "–" if n is None else f"{n} of {of}" if of is not None and of > n else str(n)
        shots = "" if facts.get("shots") is None else f", {facts['shots']}-shot"
        for metric in facts.get("base") or {} if task not in parts else {}:
            cells = []
            for model in models:
                figure = facts.get(model, {}).get(metric, {})
                value, error = figure.get("value"), figure.get("stderr")
                text = "–" if value is None else f"{value:.4g}"
                cells.append(text if value is None or error is None else f"{text} ± {error:.2g}")
            rows.append([f"{task}{shots}", metric.removesuffix(",none"), asked, *cells])
    if not rows:
        return ""
    heads = ["task", "metric", "documents", *(TITLES[model] for model in models)]
    return (
        "## Benchmarks\n\nBy [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness), with "
        f"standard errors.\n\n{_table(heads, rows)}"
    )


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _loading(run: Published, auto_class: str) -> str:
    known = run.on_hub
    base = json.dumps(run.base if known else "folder of the base model")
    at = f", revision={json.dumps(run.revision)}" if known and run.revision else ""
    lines = [
        "## Use",
        "",
        "With [PEFT](https://huggingface.co/docs/peft), where LoRA-PAR is not needed:",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {auto_class}, AutoTokenizer",
        "",
        f"base = {auto_class}.from_pretrained({base}{at})",
        f'model = PeftModel.from_pretrained(base, "{run.repository}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{run.repository}")',
        "```",
    ]
    if run.vllm.get("served"):
        name = run.repository.partition("/")[2]
        revision = f" --revision {run.revision}" if known and run.revision else ""
        lines += [
            "",
            "With [vLLM](https://docs.vllm.ai), which then offers the base and, as model "
            f"`{name}`, the base with this adapter:",
            "",
            "```sh",
            f"vllm serve {run.base if known else 'FOLDER_OF_THE_BASE'}{revision} --enable-lora "
            f"--max-lora-rank {run.vllm['max_lora_rank']} --lora-modules {name}={run.repository}",
            "```",
        ]
    return "\n".join(lines)


def _training(run: Published) -> str:
    settings = {"data": ", ".join(f"`{name}`" for name in run.data), **run.settings}
    rows = [[key, value] for key, value in settings.items() if value]
    files = (
        "`recipe.yaml` is the whole recipe, paths shortened to their last part and private addresses and keys left "
        "out; "
        "`lorapar_partition.safetensors` says which element belongs to which system; `metrics.json` and `report.html` "
        "are what was measured."
    )
    return f"## Training\n\n{_table(['', ''], rows)}\n\n{files}"
