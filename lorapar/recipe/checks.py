"""What types cannot say of a recipe: the ranges that keys declare, and which keys do not go together."""

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

from ..errors import InputError, require
from ..files import expanded
from .sections import BASES, LabelConfig, Recipe, TeacherConfig
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

# The trainers' keys that would give one stage other tokens than the rest, and where every stage and what is exported
# has them from.
OF_THE_MODEL = {
    "eos_token": "model.eos_token",
    "pad_token": "model.pad_token",
    "chat_template_path": "model.chat_template",
    "chat_template_kwargs": "model.chat_template_kwargs",
    "model_init_kwargs": "the section model",
}
# The trainers' keys that end a stage late, change nothing in silence, or would break what a run promises: why, and what
# to do. Each is off by TRL's default.
REFUSED_TRAINER_KEYS = {
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision",
         "log_completions_hub_repo"),
        "a run uploads nothing, and its recipe.yaml would hold a token; publish it once it is finished: lorapar push "
        "RECIPE.yaml OWNER/NAME",
    ),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "parallelism_config"),
        "masks, the proof and the optimizer know whole parameters by name; launch several processes (torchrun or "
        "accelerate launch), with model.fsdp: true where the base is too large for one device (FSDP2)",
    ),
    "optim_target_modules": "the optimizer is PartitionedAdamW; lora.target_modules says what is adapted",
    "sync_ref_model": "the reference is the adapter as the stage received it, which TRL does not synchronise",
    "auto_find_batch_size": "it would begin again within a stage, with another result; `lorapar plan` says what fits, "
                            "and the largest batch is tried first",
    "save_only_model": "a run that was stopped could not be resumed",
    "enable_jit_checkpoint": "a run that is stopped resumes from its last checkpoint (save_steps)",
    "ignore_data_skip": "a resumed run would train on its first rows again",
    "restore_callback_states_from_checkpoint": "a run resumes by itself, with the callbacks of its recipe",
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"), "it would round the model that is trained; model.dtype is its precision"
    ),
    "label_names": "the rows' labels are made from their completions",
    "assistant_only_loss": "one stage alone would use it; set data.loss: assistant, which scoring follows too, and "
                           "leave it out",
}  # fmt: skip
# What TRL takes as it is, and what breaks in the middle of a stage.
TRAINER_NUMBERS: tuple[tuple[tuple[str, ...], str, Callable[[float], bool]], ...] = (
    (("weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "eval_delay", "neftune_noise_alpha", "beta",
      "epsilon", "epsilon_high", "off_policy_mask_threshold", "entropy_coef", "router_aux_loss_coef"),
     "a finite number of at least 0", lambda number: 0 <= number < math.inf),
    (("learning_rate", "temperature", "repetition_penalty", "delta", "sapo_temperature_neg", "sapo_temperature_pos"),
     "a finite number above 0", lambda number: 0 < number < math.inf),
    (("adam_beta1", "adam_beta2", "label_smoothing_factor"), "a number in [0, 1)", lambda number: 0 <= number < 1),
    (("min_p", "top_entropy_quantile"), "a share in [0, 1]", lambda number: 0 <= number <= 1),
    (("top_p", "vllm_gpu_memory_utilization"), "a share in (0, 1]", lambda number: 0 < number <= 1),
    (("dataloader_num_workers",), "at least 0", lambda number: number >= 0),
    (("top_k",), "at least 0; 0: of all tokens", lambda number: number >= 0),
    (("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_iterations",
      "eval_accumulation_steps", "steps_per_generation", "generation_batch_size", "max_completion_length", "max_length",
      "pad_to_multiple_of", "dataloader_prefetch_factor", "torch_empty_cache_steps", "dataset_num_proc",
      "vllm_max_model_length", "vllm_tensor_parallel_size"),
     "at least 1", lambda number: number >= 1),
    (("num_generations",), "at least 2: completions are compared with each other", lambda number: number >= 2),
    (("max_steps",), "at least 1, or -1: as num_train_epochs says", lambda number: number == -1 or number >= 1),
)  # fmt: skip
# TRL finds another one out when it computes the first loss; label smoothing it has in SFT alone.
OF_BOTH: dict[str, tuple[Any, ...]] = {
    "log_level": ("detail", "debug", "info", "warning", "error", "critical", "passive"),
    "log_level_replica": ("detail", "debug", "info", "warning", "error", "critical", "passive"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
}
TRAINER_CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "sft": {**OF_BOTH, "loss_type": ("nll", "dft"), "packing_strategy": ("bfd", "bfd_split", "bfd-requeue", "wrapped")},
    "grpo": {
        **OF_BOTH,
        "loss_type": ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"),
        "scale_rewards": ("group", "batch", "none"),
        "importance_sampling_level": ("token", "sequence"),
        "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
        "vllm_mode": ("colocate", "server"),
        "label_smoothing_factor": (0.0,),
    },
}

# Of grpo.generation_kwargs: which token ends a completion.
STOPPING = (
    "eos_token_id",
    "forced_eos_token_id",
    "ignore_eos",
    "pad_token_id",
    "stop_token_ids",
    "stop_strings",
    "stop",
)

# Of grpo.watch_rows.
NOTHING_TO_WATCH = "0 unless stages is [sft, grpo] and sft trains on a system that grpo does not train on"
# Of partition.system1_cost beside selection: all.
NO_COST = "0 with selection: all, where both stages train every element"


def check_values(recipe: Recipe) -> None:
    """InputError for the first value that its declaration, or another key, does not allow."""
    check_ranges(recipe)
    require(len(set(recipe.stages)) == len(recipe.stages) > 0, "stages", recipe.stages, "sft and grpo, once each")
    check_label(recipe.label)
    paths = {"output_dir": recipe.output_dir, "model.name": recipe.model.name, "label.store": recipe.label.store,
             "label.template": recipe.label.template, "label.corrections": recipe.label.corrections,
             **{f"data.sources[{i}].name": source.name for i, source in enumerate(recipe.data.sources)}}  # fmt: skip
    for at, path in paths.items():
        expanded(path or "", at)
    require(not recipe.grpo.watch_rows or recipe.watched_system() is not None, "grpo.watch_rows",
            recipe.grpo.watch_rows, NOTHING_TO_WATCH)  # fmt: skip
    cost = recipe.partition.system1_cost
    require(not math.isinf(cost), "partition.system1_cost", cost, "a finite number")
    require(recipe.partition.selection != "all" or not cost, "partition.system1_cost", cost, NO_COST)
    check_renew(recipe)
    whole = recipe.sft.trainer.get("completion_only_loss") is False
    require(recipe.data.loss == "last" or not whole, "sft.completion_only_loss", False,
            f"nothing beside data.loss: {recipe.data.loss}")  # fmt: skip
    share = recipe.sft.eval_rows
    require(not isinstance(share, float) or share < 1, "sft.eval_rows", share, "a number of rows, or a share below 1")
    weights = recipe.grpo.trainer.get("reward_weights")
    require(weights is None or len(weights) == len(recipe.grpo.rewards), "grpo.reward_weights", weights,
            f"as many as grpo.rewards: {len(recipe.grpo.rewards)}")  # fmt: skip
    require(weights is None or (all(map(math.isfinite, weights)) and any(weights)), "grpo.reward_weights", weights,
            "finite numbers that are not all 0")  # fmt: skip
    base = recipe.lora.get("base")
    require(base is None or base in BASES, "lora.base", base, f"{', '.join(BASES)}, or nothing for model.dtype's form")
    check_lora({key: value for key, value in recipe.lora.items() if key != "base"})
    task = recipe.lora.get("task_type")
    require(task in (None, "CAUSAL_LM"), "lora.task_type", task, "CAUSAL_LM")
    weights = recipe.lora.get("init_lora_weights", True)
    require(weights is True or recipe.start == "peft", "lora.init_lora_weights", weights,
            f"nothing, since start: {recipe.start} says how A and B begin (start: peft leaves it to PEFT)")  # fmt: skip


def check_renew(recipe: Recipe) -> None:
    """InputError for a recipe in which nothing could be scored again between two training stages."""
    for senseless, why in (
        (len(recipe.stages) < 2, "one training stage, which none comes before"),
        (recipe.partition.selection == "all", "partition.selection: all, which needs no scores"),
        (recipe.score.method == "random", "score.method: random, whose scores say nothing of their elements"),
    ):
        require(not (recipe.score.renew and senseless), "score.renew", recipe.score.renew, f"false with {why}")


def check_ranges(config: Any, at: str = "") -> None:
    """InputError for the first key of a dataclass, or of those within it, whose value its declaration excludes."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        check_value(type(config), field.name, value, at)
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{at}{field.name}.")
        for i, item in enumerate(value if isinstance(value, list) else ()):
            if dataclasses.is_dataclass(item):
                check_ranges(item, f"{at}{field.name}[{i}].")


def check_value(section: type, name: str, value: Any, at: str = "") -> None:
    """InputError unless the declaration of key `name` in a section's dataclass allows the value.

    Public functions check arguments of the same meaning with it: `check_value(PartitionConfig, "theta", theta)`.
    """
    about = section.__dataclass_fields__[name].metadata  # type: ignore[attr-defined]
    hint = typing.get_type_hints(section)[name]
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else about.get("one_of")
    if choices:
        require(value in choices, f"{at}{name}", value, any_of(choices))
    if about.get("not_empty"):
        require(len(value) > 0, f"{at}{name}", value, about["not_empty"])
    bounded = any(about.get(bound) is not None for bound in ("at_least", "more_than", "at_most"))
    items = value.items() if isinstance(value, Mapping) else ()
    for place, number in [(f"{at}{name}", value), *((f"{at}{name}.{inner}", item) for inner, item in items)]:
        if bounded and number is not None and not isinstance(number, str | Mapping):
            require(_within(number, about), place, number, range_of(about))


def _within(number: Any, about: Mapping[str, Any]) -> bool:
    """NaN is within no bound."""
    low, above, high = about.get("at_least"), about.get("more_than"), about.get("at_most")
    return (low is None or number >= low) and (above is None or number > above) and (high is None or number <= high)


def range_of(about: Mapping[str, Any]) -> str:
    """The numbers that a key's declaration allows, in words; empty where it allows all."""
    low, above, high = about.get("at_least"), about.get("more_than"), about.get("at_most")
    if high is not None:
        interval = f"({above}, {high}]" if low is None else f"[{low}, {high}]"
        return f"{about['kind']} in {interval}" if about["kind"] else f"{low} to {high}"
    if low is not None:
        return f"at least {low}"
    return "" if above is None else f"more than {above}"


def any_of(choices: Sequence[Any]) -> str:
    """Choices as in a sentence: element, tile or rank."""
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}" if others else last


def check_trainer_keys(stage: str, values: Mapping[str, Any]) -> None:
    """Refuse a trainer's settings that would change the tokens of one stage alone, and those of the tables above;
    `values`: what is given."""
    for name, place in OF_THE_MODEL.items():
        if values.get(name):
            raise InputError(f"{stage}.{name}: got {values[name]!r}, which one stage alone would use; set {place}, "
                             "which holds for every stage and for what is exported")  # fmt: skip
    for name in STOPPING:
        if name in (values.get("generation_kwargs") or {}):
            raise InputError(
                f"{stage}.generation_kwargs.{name}: not allowed; every stage stops at the same tokens: "
                "model.eos_token, those of generation_config.json, and the one that ends a turn in the chat template"
            )
    strategy = values.get("eval_strategy")
    if stage == "grpo" and (getattr(strategy, "value", strategy) not in (None, "no") or values.get("eval_on_start")):
        key = "eval_on_start" if values.get("eval_on_start") else "eval_strategy"
        raise InputError(f"grpo.{key}: got {getattr(values[key], 'value', values[key])!r}, but stage 2 rolls out "
                         "nothing beside its own prompts; leave it out: grpo.watch_rows watches System 1's loss at "
                         "each checkpoint, and the stage evaluate answers the held-out rows")  # fmt: skip
    if stage == "grpo" and values.get("load_best_model_at_end"):
        raise InputError("grpo.load_best_model_at_end: got true, expected false; grpo.watch_rows chooses among "
                         "stage 2's checkpoints")  # fmt: skip
    for name, why in REFUSED_TRAINER_KEYS.items():
        if values.get(name):
            given = "a value" if name == "hub_token" else repr(values[name])
            raise InputError(f"{stage}.{name}: got {given}: {why}")
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float) and value is not True}
    for names, allowed, holds in TRAINER_NUMBERS:
        for name in names:
            require(name not in numbers or holds(numbers[name]), f"{stage}.{name}", values.get(name), allowed)
    for what, strategy in (("eval", "no"), ("save", "steps"), ("logging", "steps")):
        steps = numbers.get(f"{what}_steps")
        unused = steps == 0 and values.get(f"{what}_strategy", strategy) != "steps"
        require(steps is None or unused or 0 < steps < 1 or (steps >= 1 and float(steps).is_integer()),
                f"{stage}.{what}_steps", steps, "a number of steps, or a share of all of them below 1")  # fmt: skip
    epochs = numbers.get("num_train_epochs", 1)
    require(0 < epochs < math.inf or values.get("max_steps", -1) != -1, f"{stage}.num_train_epochs", epochs,
            "a finite number above 0 where max_steps is -1")  # fmt: skip
    for name, choices in TRAINER_CHOICES[stage].items():
        require(values.get(name) in (None, *choices), f"{stage}.{name}", values.get(name), any_of(choices))
    for name, allowed in (("dataloader_persistent_workers", "false"), ("dataloader_prefetch_factor", "nothing")):
        require(not values.get(name) or bool(values.get("dataloader_num_workers")), f"{stage}.{name}", values.get(name),
                f"{allowed} where dataloader_num_workers is 0")  # fmt: skip


def check_label(label: LabelConfig) -> None:
    """InputError for the first value of the section `label` that is not allowed."""
    check_ranges(label, "label.")
    require(label.column is None or not label.teachers, "label.column", label.column,
            "nothing beside label.teachers, or {name: column, column: ...} among label.voters")  # fmt: skip
    for i, teacher in enumerate(label.teachers):
        _check_no_key(teacher, f"label.teachers[{i}]")


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
    targets = values.get("target_modules", True)
    require(bool(targets) or targets is None, "lora.target_modules", targets, "at least one module's name")
