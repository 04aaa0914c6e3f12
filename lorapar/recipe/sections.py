"""The recipe: one YAML file that says everything about a run.

A recipe is read into the dataclasses below, each key checked by name and type before anything else happens. The
sections `lora`, `sft` and `grpo` take the keys of `peft.LoraConfig`, `trl.SFTConfig` and `trl.GRPOConfig` verbatim,
plus the few of ours: `lora.base` (bases.py), and what `StageConfig` and `GRPOStageConfig` list. `extends: other.yaml`
starts from another recipe; a command-line `--section.key VALUE` wins over both.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..errors import InputError, require
from ..model.quantised import BASES
from .label import LabelConfig, check_label
from .reading import parse_yaml, read_recipe
from .values import build, check_keys, convert

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
# Set by the pipeline itself, so a recipe that sets them would be overruled in silence.
RESERVED_TRAINER_KEYS = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "do_train", "seed",
                         "data_seed", "optim", "optim_args")  # fmt: skip


@dataclass
class ModelConfig:
    """`name`: a folder, a hub id, a `.gguf` file or the alias `smollm2-135m`."""

    name: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    device: str | None = None
    attn_implementation: str | None = None


@dataclass
class SourceConfig:
    """`name`: a .jsonl, .json, .csv or .parquet file, a hub id, or `reasoning_gym:<task>[,<task>...]`."""

    name: str
    split: str = "train"
    size: int | None = None
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    held_out: int | float | bool | None = None


@dataclass
class DataConfig:
    sources: list[SourceConfig]
    columns: dict[str, str] = field(default_factory=dict)
    prompt: str = "{prompt}"
    completion: str = "{completion}"
    system_prompt: str | None = None
    chat: bool | None = None
    held_out: int | float = 0.1
    max_prompt_length: int | None = None
    seed: int = 0


@dataclass
class ScoreConfig:
    """`examples` a system at most (None: all); `method`: the paper's I(φ), |Σgφ| alone, or shuffled as a control.

    `until_stable`: a Jaccard index; a system's scoring stops once its kept set at `partition.theta` has at least that
    index with the kept set at half as many examples.
    """

    examples: int | None = 100
    batch_size: int = 8
    method: Literal["taylor", "first_order", "random"] = "taylor"
    max_length: int = 512
    until_stable: float | None = None


@dataclass
class PartitionConfig:
    """`selection`: by scores, a random choice of the same share, or everything (plain LoRA)."""

    theta: float = 0.9
    alpha: float = 1.0
    beta: float = 1.0
    granularity: Literal["element", "tile", "rank"] = "element"
    selection: Literal["scores", "random", "all"] = "scores"


@dataclass
class StageConfig:
    """Our keys in `sft` and `grpo`, beside the trainer's own.

    `systems`: whose rows the stage sees. `longest_first`: go through the longest rows once before the first step, so
    that what cannot fit fails at once (rehearsal.py).
    """

    systems: list[int]
    longest_first: bool = True
    trainer: dict[str, Any] = field(default_factory=dict)


@dataclass
class SFTStageConfig(StageConfig):
    """`micro_batch_tokens`: a batch goes through the model in parts of at most so many tokens, for the same losses and
    gradients in less memory. "auto": 512 on a CPU, but the whole batch on a GPU and where a model's loss is no sum over
    tokens (refused with a number); null: the whole batch."""

    micro_batch_tokens: int | Literal["auto"] | None = "auto"


@dataclass
class GRPOStageConfig(StageConfig):
    """`rewards`: names out of `lorapar.rewards`, or `module:function`.

    `rollout_batch_size`: completions generated at once (None: all of a generation batch). `logprob_tokens`: tokens
    whose log-probabilities are taken at once (None: 256 on a CPU, TRL's 4,096 on a GPU). `activation_offloading`: what
    the backward needs waits in the host's memory, as `sft.activation_offloading`, which is TRL's own key.
    """

    rewards: list[str] = field(default_factory=lambda: ["accuracy"])
    rollout_batch_size: int | None = None
    logprob_tokens: int | None = None
    activation_offloading: bool = False


@dataclass
class EvaluateConfig:
    """Greedy answers on held-out rows; `limit` rows a system (None: all)."""

    max_new_tokens: int = 256
    batch_size: int = 64
    limit: int | None = None


@dataclass
class ExportConfig:
    """`merged`: also write the model with the adapter merged in (`dtype`: of the merged weights)."""

    merged: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


@dataclass
class Recipe:
    model: ModelConfig
    data: DataConfig
    output_dir: str = "runs/lorapar"
    seed: int = 0
    start: Literal["paper", "twin", "pissa", "olora", "peft"] = "twin"
    stages: list[Literal["sft", "grpo"]] = field(default_factory=lambda: ["sft", "grpo"])
    lora: dict[str, Any] = field(default_factory=dict)
    label: LabelConfig = field(default_factory=LabelConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    sft: SFTStageConfig = field(default_factory=lambda: SFTStageConfig(systems=[1]))
    grpo: GRPOStageConfig = field(default_factory=lambda: GRPOStageConfig(systems=[2]))
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def as_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain values; `parse` of it gives the same recipe."""
        values = dataclasses.asdict(self)
        for stage in ("sft", "grpo"):
            values[stage].update(values[stage].pop("trainer"))
        return values


def load_recipe(path: Path | str, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Read a recipe file, apply `("section.key", "yaml text")` overrides, check everything.

    Raises InputError, one line, for an unknown key (with the nearest right one), a wrong type or a value out of range.
    """
    values = read_recipe(Path(path))
    for dotted, text in overrides:
        try:
            value = parse_yaml(text)
        except yaml.YAMLError:
            raise InputError(f"--{dotted}: {text!r} is not a YAML value") from None
        _set(values, dotted, value)
    return parse(values)


def parse(values: Mapping[str, Any]) -> Recipe:
    """A checked Recipe from plain values (what the YAML holds)."""
    # A section whose keys are all commented out reads as nothing, and means its defaults.
    sections = {f.name for f in dataclasses.fields(Recipe) if f.default_factory is not dataclasses.MISSING} - {"stages"}
    values = {key: {} if value is None and key in sections else value for key, value in values.items()}
    for stage, config_class, ours in (("sft", "SFTConfig", SFTStageConfig), ("grpo", "GRPOConfig", GRPOStageConfig)):
        if isinstance(values.get(stage), Mapping):
            values[stage] = _split_trainer_keys(stage, values[stage], config_class, ours)
    recipe = build(Recipe, values, at="")
    _check_values(recipe)
    return recipe


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for at, section in enumerate(sections):
        inner = values.get(section)
        if at == 0 and section == "model" and isinstance(inner, str):
            inner = {"name": inner}
        inner = {} if inner is None else inner
        if not isinstance(inner, dict):
            raise InputError(f"--{dotted}: {section!r} is not a section")
        values[section] = dict(inner)
        values = values[section]
    values[key] = value


def _split_trainer_keys(stage: str, values: Mapping[str, Any], config_class: str, ours: type) -> dict[str, Any]:
    """Sort a stage's keys into ours and the trainer's, checking the trainer's against TRL's dataclass."""
    import trl

    fields = {f.name: f for f in dataclasses.fields(getattr(trl, config_class)) if f.init}
    own = [f.name for f in dataclasses.fields(ours) if f.name != "trainer"]
    check_keys(values, [*own, *fields], f"{stage}.")
    for key in RESERVED_TRAINER_KEYS:
        if key in values:
            raise InputError(f"{stage}.{key}: set by the run itself; the optimizer is PartitionedAdamW, "
                             "output_dir and seed are top-level keys")  # fmt: skip
    hints = typing.get_type_hints(getattr(trl, config_class))
    trainer = {key: convert(hints[key], value, f"{stage}.{key}") for key, value in values.items() if key not in own}
    defaults = {"systems": [1] if stage == "sft" else [2]}
    return defaults | {key: values[key] for key in own if key in values} | {"trainer": trainer}


def _check_values(recipe: Recipe) -> None:
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
