"""The recipe: one YAML file that describes a whole run.

Each key is declared once below: its type, default, allowed range, one line of help, and whether it changes a result or
only how the result is computed. The sections `lora`, `sft` and `grpo` also take the keys of `peft.LoraConfig`,
`trl.SFTConfig` and `trl.GRPOConfig` verbatim. `extends: other.yaml` starts from another recipe; a command-line
`--section.key VALUE` wins over both.
"""

import dataclasses
import re
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from .values import key, nested_class

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Base = Literal["nf4", "int8", "bf16"]
BASES: tuple[Base, ...] = typing.get_args(Base)  # of lora.base
Start = Literal["paper", "twin", "pissa", "olora", "peft"]
Method = Literal["taylor", "first_order", "random"]
Granularity = Literal["element", "tile", "rank"]
Selection = Literal["scores", "random", "all"]
SYSTEMS = ([1], [2], [1, 2])
# TRL's keys that trade time for memory and leave the result as it is.
SAME_RESULT = ("gradient_checkpointing", "activation_offloading")


@dataclass
class ModelConfig:
    """The base model."""

    name: str = key(help="a folder, a hub id, a .gguf file or the alias smollm2-135m")
    dtype: Dtype = key("auto", "of the weights; auto: the checkpoint's precision, or the best one of the device")
    revision: str | None = key(None, "branch, tag or commit on the hub")
    trust_remote_code: bool = key(False, "run the model's own code from the hub")
    device: str | None = key(None, "cpu, cuda or cuda:<number>; by default the GPU where there is one")
    attn_implementation: str | None = key(None, "transformers' name of the attention implementation")
    fsdp: bool = key(
        False, "shard the frozen base over the processes of a launch (FSDP2); one process holds all of it",
        changes_result=False,
    )  # fmt: skip
    chat_template: str | None = key(
        None, "a .jinja file, or a template's text, in place of the tokenizer's chat template"
    )
    chat_template_kwargs: dict[str, Any] = key(
        dict, "set in the chat template of every row that does not set them itself: {enable_thinking: false}"
    )
    eos_token: str | None = key(None, "in place of the tokenizer's EOS token")
    pad_token: str | None = key(None, "in place of the tokenizer's padding token")


@dataclass
class SourceConfig:
    """One source of rows."""

    name: str = key(help="a data file, a folder or pattern of such, a hub id, or reasoning_gym:<task>[,<task>...]")
    split: str = key("train", "which split of a hub dataset, or of a folder with several")
    size: int | None = key(None, "use only the first rows; by default all, or 1,000 of reasoning_gym")
    seed: int = key(0, "of the rows that reasoning_gym generates")
    config: dict[str, Any] = key(dict, "options of the reasoning_gym tasks")
    held_out: int | float | bool | None = key(None, "as data.held_out, for this source; true: all rows")


@dataclass
class DataConfig:
    """Where the rows come from, and how they become prompts and completions."""

    sources: list[SourceConfig] = key(help="the datasets", not_empty="at least one source")
    columns: dict[str, str] = key(dict, "names that the dataset gives to our columns: {prompt: question}")
    prompt: str = key("{prompt}", "template of the prompt, with columns in braces")
    completion: str = key("{completion}", "template of the completion")
    system_prompt: str | None = key(None, "put before every prompt")
    chat: bool | None = key(None, "use the chat template; by default where the tokenizer has one")
    held_out: int | float = key(0.1, "prompts of each source kept for evaluation: a number, or a share")
    loss: Literal["last", "assistant"] = key(
        "last", "which turns of a conversation are scored and trained on: the last answer, or all of the assistant's"
    )
    max_prompt_length: int | None = key(None, "tokens; rows with a longer prompt are left out", at_least=1)
    seed: int = key(0, "of the split into training and held-out rows")


@dataclass
class PriceConfig:
    """Money per million tokens, in the currency of `label.budget.cost`."""

    input: float = key(help="of the prompt", at_least=0)
    output: float = key(help="of the reply", at_least=0)


@dataclass
class TeacherConfig:
    """A teacher LLM: behind `base_url`, else a local transformers model."""

    model: str = key(help="the model's name", not_empty="the name of a model")
    name: str | None = key(None, "what the votes are called; by default the model's name")
    base_url: str | None = key(None, "an OpenAI-compatible endpoint; without one the model runs here")
    api_key_env: str | None = key(None, "the environment variable that holds the API key", changes_result=False)
    parameters: dict[str, Any] = key(dict, "sent with each request as they are, such as temperature")
    price: PriceConfig | None = key(None, "what tokens cost", changes_result=False)
    in_flight: int = key(8, "calls at a time; of a local model, its batch", at_least=1, changes_result=False)
    per_minute: float | None = key(None, "calls a minute at most", more_than=0, changes_result=False)
    timeout: float = key(60.0, "seconds that a call may take", more_than=0, changes_result=False)
    attempts: int = key(8, "calls that a vote may take", at_least=1, changes_result=False)
    backoff: float = key(0.5, "seconds between two attempts at first; doubled each time", more_than=0,
                         changes_result=False)  # fmt: skip
    context: int | None = key(None, "tokens that the model can read; by default as the endpoint says", more_than=0)
    structured: Literal["auto", "schema", "none"] = key(
        "auto", "ask with a JSON schema, without one, or as the endpoint allows"
    )
    check_model: bool = key(True, "refuse a model that the endpoint does not list", changes_result=False)
    reserve: bool = key(False, "asked only to break a tie")


@dataclass
class BudgetConfig:
    """What a store of votes may cost in all; labelling stops cleanly there."""

    calls: int | None = key(None, "calls at most", at_least=1)
    cost: float | None = key(None, "money at most", more_than=0)


@dataclass
class LabelConfig:
    """Which rows are System 1 and which System 2: existing labels, or a vote of rules and teachers."""

    column: str | None = key(None, "the column that holds labels already; nobody votes then")
    voters: list[str | dict[str, Any]] | None = key(
        None, "voters that need no network; by default [operations] where there is no teacher"
    )
    ties: Literal["system1", "system2", "drop", "ask"] = key(
        "system2", "what a tie becomes; ask: ask the teachers in reserve"
    )
    teachers: list[TeacherConfig] = key(list, "LLMs that vote")
    role_play: bool = key(True, "teachers play the target model; false: they judge the question as such")
    target: str | None = key(None, "the model that teachers play; by default model.name")
    habits: str | None = key(None, "what teachers are told of the target's habits")
    template: str | None = key(None, "a file with the words that teachers are asked in")
    weights: dict[str, float] = key(dict, "the weight of a voter's vote, by name; otherwise 1", more_than=0)
    stop_early: float | None = key(None, "ask nobody else once votes of this weight agree", more_than=0)
    enough: int | None = key(None, "stop when fewer voters than this are left; by default more than half are needed",
                             at_least=1, changes_result=False)  # fmt: skip
    reask: int = key(2, "times that a teacher is asked again when a reply is no vote", at_least=0)
    set_aside: int = key(12, "failed calls in a row after which a teacher is asked no more", at_least=1,
                         changes_result=False)  # fmt: skip
    store: str | None = key(None, "the database of votes; by default votes.sqlite in the output folder",
                            changes_result=False)  # fmt: skip
    budget: BudgetConfig = key(BudgetConfig, "what asking may cost", changes_result=False)
    corrections: str | None = key(None, "a CSV that a person has filled in; by default review.csv in the output folder")

    def __post_init__(self) -> None:
        if self.voters is None:
            self.voters = [] if self.teachers else ["operations"]


@dataclass
class ScoreConfig:
    """How important each LoRA element is to each system.

    `renew: true` (not in the paper) adds the stage `renew` between the two training stages. It scores the second
    stage's system again, on the adapter that the first stage left, with the same rows and settings
    (`scores_renewed.safetensors`), and the second stage trains by the partition that follows from it
    (`partition_renewed.safetensors`): the first stage's sets as they were, the second system's kept set and the second
    stage's elements by the renewed scores. `stages.json` and `metrics.json` hold the Jaccard index of the old kept set
    and the renewed one. With one training stage, `partition.selection: all` or `score.method: random` it is refused.
    """

    examples: int | None = key(100, "rows of each system at most; null: all", at_least=1)
    batch_size: int = key(8, "rows at a time", at_least=1, changes_result=False)
    method: Method = key("taylor", "the paper's I(φ); first_order: |Σgφ|; random: shuffled scores, as a control")
    max_length: int = key(512, "tokens; a longer row is refused", at_least=1)
    until_stable: float | None = key(
        None,
        "stop once doubling the rows hardly changes the selected elements: their Jaccard index is at least this",
        more_than=0, at_most=1, kind="a Jaccard index",
    )  # fmt: skip
    renew: bool = key(
        False, "score the second training stage's system again, on the first stage's result, and train that stage by it"
    )


@dataclass
class PartitionConfig:
    """Which elements each stage trains.

    With `system1_cost: λ` above 0 (not in the paper) an element is worth its share of System 2's total score less λ
    times its share of System 1's, and `grpo` trains the elements of highest worth: as many as it would otherwise train,
    among all that can train. What `sft` trains and both kept sets stay as they are. With granularity `tile` or `rank`
    whole tiles or ranks are chosen so, as many as otherwise. At 0 the paper's rule holds, which at `beta: 1` is what a
    λ near 0 gives too.
    """

    theta: float = key(0.9, "share of a system's total score that its selected elements hold", more_than=0, at_most=1,
                       kind="a share")  # fmt: skip
    alpha: float = key(1.0, "share of the shared elements that sft trains", at_least=0, at_most=1, kind="a share")
    beta: float = key(1.0, "share of the shared elements that grpo trains", at_least=0, at_most=1, kind="a share")
    granularity: Granularity = key("element", "select single elements, whole tiles, or whole ranks")
    selection: Selection = key("scores", "by scores; random: as many at random; all: everything (plain LoRA)")
    system1_cost: float = key(
        0.0,
        "above 0, grpo trains as many elements as otherwise, those whose share of System 2's score less so many times "
        "their share of System 1's is highest",
        at_least=0,
    )


@dataclass
class StageConfig:
    """Our keys in `sft` and `grpo`; the trainer's own are in `trainer`."""

    config_class: ClassVar[str]  # TRL's

    systems: list[int]
    longest_first: bool = key(True, "try the largest batch first, so that running out of memory shows immediately",
                              changes_result=False)  # fmt: skip
    trainer: dict[str, Any] = key(dict)

    def setting(self, name: str) -> Any:
        """The trainer's setting: the recipe's, else TRL's default."""
        return self.trainer[name] if name in self.trainer else self.trainer_default(name)

    @classmethod
    def trainer_default(cls, name: str) -> Any:
        # Imported only here: a machine without TRL can plan a recipe that gives every setting that is asked for.
        import trl

        return getattr(trl, cls.config_class).__dataclass_fields__[name].default


@dataclass
class SFTStageConfig(StageConfig):
    """Stage 1, supervised.

    With `eval_strategy: steps` or `epoch` the stage evaluates while it trains, on `eval_rows` of its own train rows,
    which it then does not train on: those with the smallest hash of their id, whatever their order. Scoring uses them
    as before, so scores and partition are the same with or without; the rows of `data.held_out` are for the stage
    `evaluate` alone. `load_best_model_at_end: true` keeps the checkpoint with the best `metric_for_best_model`
    (`eval_loss` by default), and `early_stopping_patience` stops training once it no longer improves.
    """

    config_class: ClassVar[str] = "SFTConfig"

    systems: list[int] = key(lambda: [1], "whose rows the stage trains on", one_of=SYSTEMS)
    micro_batch_tokens: int | Literal["auto"] | None = key(
        "auto",
        "a batch goes through the model in parts of at most so many tokens, with the same losses; auto: 512 on a CPU, "
        "the whole batch on a GPU and for models whose loss cannot be split over a batch; null: the whole batch",
        at_least=1, changes_result=False,
    )  # fmt: skip
    eval_rows: int | float | None = key(
        None, "rows put aside where eval_strategy is set: a number, or a share below 1; null: a tenth, at most 256",
        more_than=0,
    )  # fmt: skip
    early_stopping_patience: int | None = key(
        None, "stop once so many evaluations in a row were no better than the best; takes load_best_model_at_end",
        at_least=1,
    )  # fmt: skip

    def evaluates(self) -> bool:
        """Whether the stage evaluates while it trains."""
        strategy = self.trainer.get("eval_strategy")
        return getattr(strategy, "value", strategy) not in (None, "no") or bool(self.trainer.get("eval_on_start"))


@dataclass
class GRPOStageConfig(StageConfig):
    """Stage 2, by reinforcement.

    `watch_rows` puts that many System 1 train rows aside: neither scoring nor stage 1 uses them. Their mean loss is
    computed before the first step of stage 2 and at each of its checkpoints (every `save_steps`, and the last step).
    One checkpoint becomes the result: the last of those whose loss is at most `watch_rise` above its value at the
    start; if there is none, the one with the lowest loss, and a warning says so. Prediction: where the loss rises late,
    System 1 falls less in stage 2, at the price of what System 2 would have gained in the steps that are given up. Rows
    put aside also teach stage 1 nothing. The paper has no such rule.
    """

    config_class: ClassVar[str] = "GRPOConfig"

    systems: list[int] = key(lambda: [2], "whose rows the stage trains on", one_of=SYSTEMS)
    rewards: list[str] = key(lambda: ["accuracy"], "names of lorapar.rewards, or module:function")
    rollout_batch_size: int | None = key(
        None, "completions generated at a time; null: all of a generation batch", at_least=1, changes_result=False
    )
    logprob_tokens: int | None = key(
        None, "tokens whose log-probabilities are computed at a time; null: 256 on a CPU, TRL's 4,096 on a GPU",
        at_least=1, changes_result=False,
    )  # fmt: skip
    activation_offloading: bool = key(
        False, "keep activations in host memory until the backward, as TRL's sft.activation_offloading does",
        changes_result=False,
    )  # fmt: skip
    watch_rows: int = key(
        0, "System 1 train rows put aside, whose loss decides which checkpoint is kept; 0: the last one is", at_least=0
    )
    watch_rise: float = key(
        0.1,
        "nats per answer token that the watched loss may rise above its value at the start",
        at_least=0,
        at_most=100,
    )


@dataclass
class EvaluateConfig:
    """Greedy answers to the held-out rows."""

    max_new_tokens: int = key(256, "an answer's length at most", at_least=1)
    batch_size: int = key(64, "answers at a time", at_least=1, changes_result=False)
    limit: int | None = key(None, "rows of each system at most; null: all", at_least=1)
    metric: str | None = key(
        None, "what an answer is worth: a name of lorapar.rewards, or module:function; null: accuracy, right or wrong"
    )
    tasks: list[str] = key(
        list, "benchmarks of lm-evaluation-harness for the base and each stage: a task's name, or its .yaml file",
        changes_result=False,
    )  # fmt: skip
    task_limit: int | None = key(None, "documents of each task at most; null: all", at_least=1, changes_result=False)
    task_shots: int | None = key(
        None, "worked examples before each question of a task; null: as the task says", at_least=0, changes_result=False
    )
    task_chat: bool = key(False, "ask a task's questions through the chat template", changes_result=False)
    run_code: bool = key(
        False, "let a task execute the code that the model writes (HumanEval, MBPP), in a process without network",
        changes_result=False,
    )  # fmt: skip


@dataclass
class ExportConfig:
    """The finished adapter, and the merged model."""

    merged: bool = key(False, "also write the model with the adapter merged in")
    dtype: Dtype = key("auto", "of the merged weights")
    gguf: list[Literal["adapter", "f16", "q8_0", "base"]] = key(
        list, "also write for llama.cpp and Ollama: the adapter, the merged model in f16 or q8_0, the base in f16; "
        "gguf/ holds those that were asked for last",
        changes_result=False,
    )  # fmt: skip


@dataclass
class Recipe:
    model: ModelConfig = key(help="the base model")
    data: DataConfig = key(help="the rows")
    output_dir: str = key("runs/lorapar", "where the artefacts go", not_empty="a folder", changes_result=False)
    seed: int = key(0, "random seed of everything outside `data`", at_least=0, at_most=2**32 - 1)
    start: Start = key("twin", "how A and B begin; peft: as lora.init_lora_weights says")
    stages: list[Literal["sft", "grpo"]] = key(lambda: ["sft", "grpo"], "the training stages, in order")
    lora: dict[str, Any] = key(
        dict,
        "keys of peft.LoraConfig, and base: nf4, int8 or bf16; without target_modules the paper's six projections "
        "where every layer has them all, else every linear layer of the language model but its head and routers",
    )
    label: LabelConfig = key(LabelConfig, "who labels the rows")
    score: ScoreConfig = key(ScoreConfig, "how elements are scored")
    partition: PartitionConfig = key(PartitionConfig, "how elements are selected")
    sft: SFTStageConfig = key(SFTStageConfig, "stage 1, and keys of trl.SFTConfig")
    grpo: GRPOStageConfig = key(GRPOStageConfig, "stage 2, and keys of trl.GRPOConfig")
    evaluate: EvaluateConfig = key(EvaluateConfig, "answers to the held-out rows")
    export: ExportConfig = key(ExportConfig, "what is written at the end")

    def watched_system(self) -> int | None:
        """The system that sft has trained and grpo does not, where `grpo.watch_rows` watches it; else None.

        None also where there is no such system, which `check_values` refuses.
        """
        left = [system for system in self.sft.systems if system not in self.grpo.systems]
        return left[0] if self.grpo.watch_rows and self.stages == ["sft", "grpo"] and left else None

    def as_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain values; `parse` of it gives the same recipe."""
        values = dataclasses.asdict(self)
        for stage in ("sft", "grpo"):
            values[stage].update(values[stage].pop("trainer"))
        return values


def changes_result(dotted: str) -> bool:
    """Whether a key such as label.teachers[0].price changes what a run makes, and not only how it is computed."""
    section: Any = Recipe
    for name in re.sub(r"\[\d+\]", "", dotted).split("."):
        if issubclass(section, StageConfig) and name in SAME_RESULT:
            return False
        declared = section.__dataclass_fields__.get(name)
        if declared is None:
            return True
        if not declared.metadata.get("changes_result", True):
            return False
        section = nested_class(typing.get_type_hints(section)[name])
        if section is None:
            return True
    return True
