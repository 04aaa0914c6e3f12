"""A stage, and a run: what the stages of one recipe share.

Each stage is declared in the `stage.py` of its folder, the only file there that knows recipe and output folder: it
takes from the `Run` what its method needs and calls the method with plain arguments.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data.labels import eval_rows, load_labels, put_aside
from .data.rows import load_rows
from .distributed.launch import shares
from .model.generate import set_stop_tokens
from .model.load import best_dtype, choose_device, load_config, load_model, load_tokenizer
from .model.positions import positions_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from .memory.needs import Lengths
    from .recipe.sections import Recipe

Facts = dict[str, Any]  # what a stage records of itself in stages.json

LABELS = "labels.jsonl"
SCORES = "scores.safetensors"
PARTITION = "partition.safetensors"
# With score.renew: of the second training stage, and what its partition was made of.
SCORES_RENEWED = "scores_renewed.safetensors"
PARTITION_RENEWED = "partition_renewed.safetensors"


class Run:
    """A recipe and its output folder, with what several stages need; each is loaded when it is first asked for."""

    def __init__(self, recipe: "Recipe", folder: Path):
        self.recipe, self.folder = recipe, folder
        self._labels: tuple[int, Dataset] | None = None
        self._lengths: tuple[Dataset, Lengths] | None = None

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, shared by the stages. Trainers modify theirs, so the training stages copy this one."""
        return load_tokenizer(self.recipe.model)

    @functools.cached_property
    def positions(self) -> int | None:
        """The tokens that the model has positions for, by its configuration alone; None: no limit."""
        return positions_of(load_config(self.recipe.model))

    def load_rows(self) -> "tuple[Dataset, dict[str, dict[str, int]]]":
        """Every source's rows that the model has positions for, and what became of them (`data.rows.load_rows`)."""
        return load_rows(self.recipe.data, self.tokenizer, self.positions)

    def labels(self) -> "Dataset":
        """The labelled rows, read and checked once; read again only where the file has changed since."""
        path = self.folder / LABELS
        changed = path.stat().st_mtime_ns if path.is_file() else 0
        if self._labels is None or self._labels[0] != changed:
            self._labels = changed, load_labels(path)
        return self._labels[1]

    def put_aside(self) -> "tuple[Dataset, Dataset | None]":
        """(the labelled rows without those that `grpo.watch_rows` puts aside, those); None where it puts none aside."""
        system = self.recipe.watched_system()
        return (
            (self.labels(), None) if system is None else put_aside(self.labels(), [system], self.recipe.grpo.watch_rows)
        )

    def rows_of_sft(self) -> "tuple[Dataset, Dataset | None]":
        """(the labelled rows that stage 1 may train on, those that it evaluates on; None where it does not)."""
        rows, config = self.put_aside()[0], self.recipe.sft
        return eval_rows(rows, config.systems, config.eval_rows) if config.evaluates() else (rows, None)

    def lengths(self) -> "Lengths":
        """Tokens of the longest labelled row and of the longest prompt, counted once."""
        from .memory.needs import lengths_of

        labels = self.labels()
        if self._lengths is None or self._lengths[0] is not labels:
            self._lengths = labels, lengths_of(self.recipe, labels, self.tokenizer)
        return self._lengths[1]

    def load_model(self) -> "PreTrainedModel":
        """The base model, loaded for one stage: what the stage does to it (adapters, trainers' hooks) ends with it."""
        model = load_model(self.recipe.model, self.recipe.lora.get("base"), shard=self.is_sharded())
        set_stop_tokens(model, self.tokenizer)
        return model

    def load_whole_model(self) -> "PreTrainedModel":
        """The same in the main process alone: in main memory where no device holds all of a base that is sharded."""
        config, base = self.recipe.model, self.recipe.lora.get("base")
        if self.is_sharded():
            dtype = config.dtype
            if dtype == "auto" and base != "bf16":
                dtype = str(best_dtype(choose_device(config.device))).removeprefix("torch.")
            config = dataclasses.replace(config, device="cpu", dtype=dtype)
        model = load_model(config, base)
        set_stop_tokens(model, self.tokenizer)
        return model

    def is_sharded(self) -> bool:
        """Whether the base is sharded over the processes of the launch."""
        return shares(self.recipe.model.fsdp) > 1


def do_nothing(run: Run) -> None:
    """A stage that has nothing to check, or nothing unfinished to remove."""


def no_inputs(run: Run) -> Facts:
    """A stage whose inputs are its sections and files alone."""
    return {}


def tokens_learned(run: Run) -> Facts:
    """What decides, beside the labelled rows, which rows a stage scores or trains on, and which of their tokens."""
    system = run.recipe.watched_system()
    aside = {} if system is None else {"put_aside": {"system": system, "rows": run.recipe.grpo.watch_rows}}
    return {**aside, **_loss(run)}


def tokens_watched(run: Run) -> Facts:
    """As `tokens_learned`, for the stage that watches rows: its own section says which."""
    return {} if run.recipe.watched_system() is None else _loss(run)


def _loss(run: Run) -> Facts:
    # Left out where it is what it was before the key was there.
    return {} if run.recipe.data.loss == "last" else {"loss": run.recipe.data.loss}


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        run: does the work and gives the facts for the record.
        sections: the recipe's sections that the outcome depends on. inputs: what else it depends on, beside the files.
        outside: the same, of what lies outside the run's folder, or may be asked otherwise of the same result.
        reads, writes: files in the output folder. folders: those that it writes whole, with files of any name.
        optional_reads: files that it reads where they exist.
        check: raises InputError for settings that the stage cannot run with, before any work is done.
        check_rows: the same for the labelled rows, before the first stage that uses them.
        discard: removes what an attempt with other inputs has left unfinished; in the main process alone.
        together: every process of a launch takes part, and the main one writes; in the other stages it works alone.
        trains: it has a trainer, whose settings are checked.
    """

    name: str
    run: Callable[[Run], Facts]
    sections: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    optional_reads: tuple[str, ...] = ()
    inputs: Callable[[Run], Facts] = no_inputs
    outside: Callable[[Run], Facts] = no_inputs
    check: Callable[[Run], None] = do_nothing
    check_rows: Callable[[Run], None] = do_nothing
    discard: Callable[[Run], None] = do_nothing
    together: bool = False
    trains: bool = False


# Sections that change what an adapter computes and are not in its weights (lora_alpha, lora_dropout).
ADAPTED = ("model", "lora", "start")


def adapter_files(folder: str) -> tuple[str, ...]:
    """The files without which an adapter folder loads neither here nor in PEFT, the weights first."""
    return tuple(f"{folder}/{name}" for name in ("adapter_model.safetensors", "adapter_config.json", "lorapar.json"))


def partition_of(recipe: "Recipe", name: str) -> str:
    """The file of the partition that a training stage goes by; the last stage's holds what both have trained."""
    return PARTITION_RENEWED if recipe.score.renew and name == recipe.stages[-1] else PARTITION


def weights_of(folder: str) -> str:
    """The weights of an adapter folder."""
    return adapter_files(folder)[0]
