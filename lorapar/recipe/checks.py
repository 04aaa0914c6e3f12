"""What the types of a recipe's keys cannot say: ranges, and keys that do not go together."""

import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from ..errors import InputError, require
from ..model.quantised import BASES
from .sections import LabelConfig, Recipe, TeacherConfig
from .values import check_keys, convert

# LoRA options that change the product our layers compute; each is refused by name (design.md, Contract).
REFUSED_LORA_KEYS = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "eva_config",
    "loftq_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "megatron_config",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
    "ensure_weight_tying",
    "lora_ga_config",
    "runtime_config",
    "inference_mode",
)
# The request's own fields, which parameters must not overrule.
OUR_FIELDS = ("model", "messages", "stream", "n", "response_format", "tools", "tool_choice", "functions")


def check_values(recipe: Recipe) -> None:
    p = recipe.partition
    require(0 < p.theta <= 1, "partition.theta", p.theta, "a share in (0, 1]")
    require(0 <= p.alpha <= 1, "partition.alpha", p.alpha, "a share in [0, 1]")
    require(0 <= p.beta <= 1, "partition.beta", p.beta, "a share in [0, 1]")
    stable = recipe.score.until_stable
    require(stable is None or 0 < stable <= 1, "score.until_stable", stable, "a Jaccard index in (0, 1]")
    for at, count in (
        ("sft.micro_batch_tokens", None if recipe.sft.micro_batch_tokens == "auto" else recipe.sft.micro_batch_tokens),
        ("score.batch_size", recipe.score.batch_size),
        ("score.examples", recipe.score.examples),
        ("score.max_length", recipe.score.max_length),
        ("data.max_prompt_length", recipe.data.max_prompt_length),
        ("evaluate.max_new_tokens", recipe.evaluate.max_new_tokens),
        ("evaluate.batch_size", recipe.evaluate.batch_size),
        ("evaluate.limit", recipe.evaluate.limit),
        ("grpo.rollout_batch_size", recipe.grpo.rollout_batch_size),
        ("grpo.logprob_tokens", recipe.grpo.logprob_tokens),
    ):
        require(count is None or count >= 1, at, count, "at least 1")
    require(0 <= recipe.seed < 2**32, "seed", recipe.seed, "0 to 4294967295")
    require(recipe.output_dir != "", "output_dir", recipe.output_dir, "a folder")
    require(len(recipe.data.sources) > 0, "data.sources", recipe.data.sources, "at least one source")
    require(len(set(recipe.stages)) == len(recipe.stages) > 0, "stages", recipe.stages, "sft and grpo, once each")
    check_label(recipe.label)
    for at, systems in (("sft.systems", recipe.sft.systems), ("grpo.systems", recipe.grpo.systems)):
        require(systems in ([1], [2], [1, 2]), at, systems, "[1], [2] or [1, 2]")
    base = recipe.lora.get("base")
    require(base is None or base in BASES, "lora.base", base, f"{', '.join(BASES)}, or nothing for model.dtype's form")
    check_lora({key: value for key, value in recipe.lora.items() if key != "base"})
    weights = recipe.lora.get("init_lora_weights", True)
    require(weights is True or recipe.start == "peft", "lora.init_lora_weights", weights,
            f"nothing, since start: {recipe.start} says how A and B begin (start: peft leaves it to PEFT)")  # fmt: skip


def check_label(label: LabelConfig) -> None:
    """InputError for the first value out of its range."""
    require(label.stop_early is None or label.stop_early > 0, "label.stop_early", label.stop_early, "more than 0")
    require(label.column is None or not label.teachers, "label.column", label.column,
            "nothing beside label.teachers, or {name: column, column: ...} among label.voters")  # fmt: skip
    require(label.reask >= 0, "label.reask", label.reask, "at least 0")
    for at, count in (("set_aside", label.set_aside), ("enough", label.enough), ("budget.calls", label.budget.calls)):
        require(count is None or count >= 1, f"label.{at}", count, "at least 1")
    require(label.budget.cost is None or label.budget.cost > 0, "label.budget.cost", label.budget.cost, "more than 0")
    for name, weight in label.weights.items():
        require(weight > 0, f"label.weights.{name}", weight, "more than 0")
    for i, teacher in enumerate(label.teachers):
        at = f"label.teachers[{i}]"
        require(teacher.model != "", f"{at}.model", teacher.model, "the name of a model")
        for key in ("in_flight", "attempts"):
            require(getattr(teacher, key) >= 1, f"{at}.{key}", getattr(teacher, key), "at least 1")
        for key in ("per_minute", "timeout", "backoff", "context"):
            value = getattr(teacher, key)
            require(value is None or value > 0, f"{at}.{key}", value, "more than 0")
        price = teacher.price
        require(price is None or min(price.input, price.output) >= 0, f"{at}.price", price, "at least 0")
        _check_no_key(teacher, at)


def _check_no_key(teacher: TeacherConfig, at: str) -> None:
    """A recipe is copied into its output folder, so a key must not stand in it; what may be one is not repeated."""
    name = teacher.api_key_env
    if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", name):
        raise InputError(f"{at}.api_key_env: expected the name of an environment variable, of capital letters, digits "
                         "and _ (what is given is not shown: it may be a key)")  # fmt: skip
    for key in teacher.parameters:
        if key in OUR_FIELDS or re.search(r"key|authori[sz]ation|secret|password|header", key, re.IGNORECASE):
            raise InputError(f"{at}.parameters.{key}: not allowed; the request's own fields ({', '.join(OUR_FIELDS)}) "
                             "are set by us, and a key is named by api_key_env")  # fmt: skip
    if teacher.base_url is not None:
        parts = urlsplit(teacher.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or parts.query:
            raise InputError(f"{at}.base_url: expected http(s)://host[:port]/path, without user, password or query")


def check_lora(values: Mapping[str, Any]) -> None:
    """Refuse `lora` keys that PEFT does not know, and those that our layers do not have."""
    import peft

    fields = {f.name: f for f in dataclasses.fields(peft.LoraConfig) if f.init}
    check_keys(values, fields, "lora.")
    defaults = peft.LoraConfig()
    for key in REFUSED_LORA_KEYS:
        if key in values and values[key] and values[key] != getattr(defaults, key, None):
            raise InputError(f"lora.{key}: not supported by the masked LoRA layers; remove it (got {values[key]!r})")
    bias = values.get("bias", "none")
    require(bias == "none", "lora.bias", bias, "none: only LoRA elements are trained")
    hints = typing.get_type_hints(peft.LoraConfig)
    for key, value in values.items():
        convert(hints[key], value, f"lora.{key}")
    rank, alpha, dropout = values.get("r", 8), values.get("lora_alpha", 8), values.get("lora_dropout", 0.0)
    require(rank >= 1, "lora.r", rank, "an integer of at least 1")
    require(alpha > 0, "lora.lora_alpha", alpha, "more than 0")
    require(0 <= float(dropout) < 1, "lora.lora_dropout", dropout, "a share in [0, 1)")
    task = values.get("task_type")
    require(task in (None, "CAUSAL_LM"), "lora.task_type", task, "CAUSAL_LM")
    targets = values.get("target_modules", True)
    require(bool(targets) or targets is None, "lora.target_modules", targets, "at least one module's name")
