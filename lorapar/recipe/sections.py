"""The recipe: one YAML file that says everything about a run.

A recipe is read into the dataclasses below, each key checked by name and type before anything else happens. The
sections `lora`, `sft` and `grpo` take the keys of `peft.LoraConfig`, `trl.SFTConfig` and `trl.GRPOConfig` verbatim,
plus the few of ours: `lora.base` (bases.py), and what `StageConfig` and `GRPOStageConfig` list. `extends: other.yaml`
starts from another recipe; a command-line `--section.key VALUE` wins over both.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


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
class PriceConfig:
    """Money per million tokens, in the currency that `label.budget.cost` is in."""

    input: float
    output: float


@dataclass
class TeacherConfig:
    """A teacher LLM behind `base_url`, an OpenAI-compatible endpoint; without one, a local transformers model.

    `api_key_env`: the name of the environment variable that holds the key. `parameters` go into the request as they
    are. `in_flight` calls at a time (a local model's batch), at most `per_minute`; a call has `timeout` seconds and a
    vote `attempts` calls, `backoff` seconds apart at first, then twice that, and so on. `context`: in tokens.
    `structured`: ask with a JSON schema, without, or as the endpoint takes it. `check_model`: refuse a model that the
    endpoint does not list. `reserve`: asked only to break a tie.
    """

    model: str
    name: str | None = None
    base_url: str | None = None
    api_key_env: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    price: PriceConfig | None = None
    in_flight: int = 8
    per_minute: float | None = None
    timeout: float = 60.0
    attempts: int = 8
    backoff: float = 0.5
    context: int | None = None
    structured: Literal["auto", "schema", "none"] = "auto"
    check_model: bool = True
    reserve: bool = False


@dataclass
class BudgetConfig:
    """The most calls and the most money that a store of votes may ever have cost; labelling stops there cleanly."""

    calls: int | None = None
    cost: float | None = None


@dataclass
class LabelConfig:
    """`column`: labels that exist already; otherwise `voters` and `teachers` vote and `ties` go by the rule named.

    `voters` are rules that need no network (["operations"] where there is neither voter nor teacher). Teachers play the
    `target` model (the recipe's, unless named here) with its `habits`, or judge the question as such (`role_play:
    false`), in the words of `template`, a file. `weights`: of voters by name, else 1. `stop_early`: ask no further once
    votes of this weight agree. `enough`: how many voters must be left when teachers fail (more than half). `reask`: how
    often a teacher is asked again for a reply that is no vote. `set_aside`: after so many failed calls in a row.
    `store`: the database of votes (votes.sqlite in the output folder). `corrections`: a CSV that a person has filled in
    (review.csv in the output folder, where it is there).
    """

    column: str | None = None
    voters: list[str | dict[str, Any]] | None = None
    ties: Literal["system1", "system2", "drop", "ask"] = "system2"
    teachers: list[TeacherConfig] = field(default_factory=list)
    role_play: bool = True
    target: str | None = None
    habits: str | None = None
    template: str | None = None
    weights: dict[str, float] = field(default_factory=dict)
    stop_early: float | None = None
    enough: int | None = None
    reask: int = 2
    set_aside: int = 12
    store: str | None = None
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    corrections: str | None = None

    def __post_init__(self) -> None:
        if self.voters is None:
            self.voters = [] if self.teachers else ["operations"]


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
