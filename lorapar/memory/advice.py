"""What the plan says to a person: a table, whether it fits, and the cheapest changes that make it fit."""

import copy
import functools
import logging
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import InputError
from ..model.load import choose_device
from ..recipe.sections import Recipe
from .needs import (
    COLUMNS,
    Lengths,
    Model,
    Need,
    completion_tokens,
    describe,
    lengths_of,
    limits,
    max_length,
    need,
    needs,
    sft_step,
)
from .process import available_bytes, resident_bytes
from .step import NotSimulated
from .work import Rates, Work, flops, hours, works

log = logging.getLogger("lorapar")

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# An option of `plan`: what it is in, and a value that a person may give.
RATES = {"tflops": ("TFLOP/s", "250"), "gbytes": ("GB/s, for decoding", "2000")}
NO_RATES = Rates()
NEEDS_MODEL = ("score", "sft", "renew", "grpo", "evaluate")


def parse_bytes(text: str) -> int:
    """Bytes of "8GB" (10⁹), "8GiB" (2³⁰) or a plain number; InputError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = match[2].upper() if match else ""
    if match is None or (unit and unit not in UNITS) or float(match[1]) <= 0:
        raise InputError(f"--vram: got {text!r}, expected a size such as 8GB or 24GiB")
    return int(float(match[1]) * UNITS[unit or "B"])


def parse_rate(option: str, text: str) -> float:
    """The number of "250"; InputError for what is none, and for none above 0."""
    unit, example = RATES[option]
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not (0 < rate < math.inf):
        raise InputError(f"--{option}: got {text!r}, expected a number above 0, the {unit} that the machine sustains, "
                         f"such as {example}")  # fmt: skip
    return rate


def table(
    recipe: Recipe, room: int | None = None, lengths: Lengths | None = None, rates: Rates = NO_RATES
) -> tuple[str, bool]:
    """The plan for a person, and whether every stage is known to fit in `room` bytes (None: what this machine has).

    lengths: of the labelled rows; None: of the recipe's data, without their labels.
    What could not be found is said, and is not taken to fit.
    """
    lengths, room = lengths or lengths_of(recipe), room or available(recipe)
    try:
        model, rows = describe(recipe), needs(recipe, lengths)
    except InputError:
        raise
    except Exception as error:  # the model's own code, which may be anybody's
        why = f"{recipe.model.name} could not be made without its weights ({_in_a_line(error)})"
        return f"{why}, so its memory is not known", False
    form = recipe.lora.get("base") or str(model.dtype).removeprefix("torch.")
    lines = [
        f"{recipe.model.name}, {form}, on {model.device}; {model.elements:,} LoRA elements; longest row "
        f"{lengths.whole} tokens, longest prompt {lengths.prompt} ({lengths.of})",
        f"lora: {model.adapted}",
        "",
        "GB at the peak of each stage",
        f"{'':<10}" + "".join(f"{column:>13}" for column in (*COLUMNS, "total")),
    ]
    for row in rows:
        values = [f"{getattr(row, column) / 1e9:.3f}" for column in COLUMNS] + [f"{row.total / 1e9:.3f}"]
        if row.unknown:
            values[COLUMNS.index("activations")], values[-1] = "?", f"> {values[-1]}"
        lines.append(f"{row.stage:<10}" + "".join(f"{value:>13}" for value in values))
    lines += ["", *work_lines(works(recipe, lengths, model), model, rates)]
    unknown = {
        row.unknown: [other.stage for other in rows if other.unknown == row.unknown] for row in rows if row.unknown
    }
    most = f"{'more than ' if unknown else ''}{max(row.total for row in rows) / 1e9:.3f}"
    lines += ["", f"{most} GB needed of {room / 1e9:.3f} GB"]
    lines += [f"{', '.join(stages)}: activations not counted, the model does not run without data ({why})"
              for why, stages in unknown.items()]  # fmt: skip
    lines += [line for row in rows if row.total > room for line in advice(recipe, lengths, row, room)]
    if "sft" in recipe.stages and not unknown:
        tokens = sft_step(recipe, lengths, model.device).tokens
        try:
            batch, context = limits(recipe, lengths, room)
            lines.append(f"sft: up to {batch:,} rows of {tokens} tokens at once, or one row of {context:,} tokens")
        except NotSimulated as error:  # MPT's table of positions ends at its max_seq_len
            lines.append(f"sft: the most rows and tokens are not known, as longer rows do not run ({error})")
    if any(row.total > room for row in rows):
        return "\n".join([*lines, "does not fit"]), False
    return "\n".join([*lines, "not known to fit" if unknown else "fits"]), not unknown


def work_lines(counted: list[Work], model: Model, rates: Rates) -> list[str]:
    """What each stage has to do, a line each, and what the figures take for granted."""
    timed = ["compute h", "decode h", "hours"] if rates != NO_RATES else []
    headings = ["rows", "steps", "forward", "decoded", "with backward", "PFLOP", *timed]
    widths = [9, 8, 14, 14, 15, 12, 12, 11, 11]

    def line(name: str, cells: list[str]) -> str:
        return f"{name:<10}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))

    what = "an estimate, no measurement: rows, steps, tokens through the model, and operations (PFLOP)"
    lines = [f"Work of each stage, {what}", line("", headings)]
    totals: list[float | None] = [0.0, 0.0, 0.0, 0.0]
    for work in counted:
        operations, spent = sum(flops(work, model)) / 1e15, hours(work, model, rates)
        both = None if None in spent else sum(part or 0 for part in spent)
        figures = [None] * 4 if work.unknown else [operations, *spent, both]
        totals = [None if None in (total, more) else (total or 0) + (more or 0) for total, more in zip(totals, figures)]
        most = "≤" if work.at_most else ""
        tokens = [None if work.unknown else one.tokens for one in (work.forward, work.decoded, work.trained)]
        cells = [_cell(work.rows), _cell(work.steps), *(_cell(n and round(n), most if n else "") for n in tokens),
                 *(_cell(figure, most if figure else "") for figure in figures[: 1 + len(timed)])]  # fmt: skip
        lines.append(line(work.stage, cells))
    most = "≤" if any(work.at_most for work in counted) else ""
    lines.append(line("all", [""] * 5 + [_cell(total, most if total else "") for total in totals[: 1 + len(timed)]]))
    reasons = list(dict.fromkeys(reason for work in counted for reason in (*work.at_most, work.unknown) if reason))
    for reason in reasons:
        stages = [work.stage for work in counted if reason in (*work.at_most, work.unknown)]
        lines.append(f"{', '.join(stages)}: {reason}")
    if model.all_experts:
        lines.append(
            "every expert is counted for every token, as the model's configuration does not say how many it meets"
        )
    missing = [f"--{option} ({unit})" for option, (unit, _) in RATES.items() if getattr(rates, option) is None]
    if missing:
        lines.append(
            f"for {'hours' if not timed else 'all hours'}, say what the machine sustains: {', '.join(missing)}"
        )
    return lines


def _cell(value: float | None, mark: str = "") -> str:
    if value is None:
        return "?"
    if isinstance(value, int):
        return f"{mark}{value:,}"
    return f"{mark}{value:,.1f}" if value >= 100 else f"{mark}{value:.3g}"


def _in_a_line(error: BaseException) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


Change = tuple[str, Callable[[Recipe], None]]


def changes(recipe: Recipe, stage: str) -> Iterator[Change]:
    """What would lower a stage's need, the cheapest first: those that change no result, then time, then precision, then
    what is trained on."""

    def halved(section: str, key: str, value: int) -> Iterator[tuple[int, Callable[[Recipe], None]]]:
        while value > 1:
            value //= 2
            yield value, functools.partial(_set, section=section, key=key, value=value)

    if stage in ("score", "renew", "evaluate"):
        section = "evaluate" if stage == "evaluate" else "score"
        for value, change in halved(section, "batch_size", getattr(recipe, section).batch_size):
            yield f"{section}.batch_size: {value} (same result)", change
    if stage == "sft":
        yield (
            "sft.micro_batch_tokens: 1 (a row at a time; same result)",
            lambda r: setattr(r.sft, "micro_batch_tokens", 1),
        )
    if stage == "grpo":
        rows = recipe.grpo.setting("per_device_train_batch_size")
        before = recipe.grpo.setting("gradient_accumulation_steps")
        for value, _ in halved(stage, "per_device_train_batch_size", rows):
            more = before * rows // value
            text = f"grpo.per_device_train_batch_size: {value} with gradient_accumulation_steps: {more} (same result)"
            yield text, functools.partial(_set_both, stage=stage, rows=value, accumulated=more)
    if stage in ("sft", "grpo"):
        yield (f"{stage}.gradient_checkpointing: true (about a third more time)",
               functools.partial(_set, section=stage, key="gradient_checkpointing", value=True))  # fmt: skip
    if stage in ("sft", "grpo") and describe(recipe).device == "cuda":
        yield (f"{stage}.activation_offloading: true (same result; the host's memory and its bus bear it)",
               functools.partial(_set, section=stage, key="activation_offloading", value=True))  # fmt: skip
    for base in ("int8", "nf4"):
        yield f"lora.base: {base} (less precision)", functools.partial(_set, section="lora", key="base", value=base)
    if stage == "sft":
        for value, change in halved(stage, "max_length", max_length(recipe)):
            yield f"sft.max_length: {value} (longer rows are left out)", change
    if stage == "grpo":
        for value, change in halved(stage, "max_completion_length", completion_tokens(recipe)):
            yield f"grpo.max_completion_length: {value} (longer completions are cut)", change


def _set(recipe: Recipe, section: str, key: str, value: Any) -> None:
    part = getattr(recipe, section)
    if isinstance(part, dict):
        part[key] = value
    elif hasattr(part, key):
        setattr(part, key, value)
    else:
        part.trainer[key] = value


def _set_both(recipe: Recipe, stage: str, rows: int, accumulated: int) -> None:
    _set(recipe, stage, "per_device_train_batch_size", rows)
    _set(recipe, stage, "gradient_accumulation_steps", accumulated)


def remedies(recipe: Recipe, lengths: Lengths, stage: str, room: int, count: int = 3) -> list[str]:
    """The cheapest changes, at most `count`, each of which makes the stage fit; where none does, several together."""
    found: list[str] = []
    together, helpful, smallest = copy.deepcopy(recipe), {}, need(recipe, lengths, stage).total
    for text, change in changes(recipe, stage):
        key = text.split(":")[0]
        changed = copy.deepcopy(recipe)
        change(changed)
        if not any(line.startswith(f"{key}:") for line in found) and need(changed, lengths, stage).total <= room:
            found.append(text)
        if len(found) == count:
            return found
        change(together)
        total = need(together, lengths, stage).total
        if total < smallest:
            smallest, helpful[key] = total, text
        if not found and total <= room:
            return [" and ".join(helpful.values())]
    return found


def advice(recipe: Recipe, lengths: Lengths, row: Need, room: int) -> list[str]:
    """What would make a stage fit, a line each."""
    changed = remedies(recipe, lengths, row.stage, room) or ["no change of the recipe does"]
    more = f"more than {row.total / 1e9:.2f}" if row.unknown else f"{row.total / 1e9:.2f}"
    first = f"{row.stage} needs {more} GB of {room / 1e9:.2f} GB; to make it fit, the cheapest first:"
    return [first] + [f"  {number}. {line}" for number, line in enumerate(changed, 1)]


def available(recipe: Recipe) -> int:
    """Bytes that a run of the recipe can have where its model goes."""
    return available_bytes(choose_device(recipe.model.device))


def check_memory(stage: str, recipe: Recipe, lengths: Lengths) -> None:
    """Refuse a stage that needs more memory than there is, before its weights are loaded.

    `lengths`: of the labelled rows. Raises InputError with the cheapest remedies. A recipe far from the limit is not
    simulated. Where the need cannot be found, one line of the log says so and the run goes on.
    """
    try:
        room = available(recipe)
        if _at_most(recipe, lengths, describe(recipe)) < room:
            return
        row = need(recipe, lengths, stage)
        refusal = " ".join(advice(recipe, lengths, row, room)) if row.total > room else None
        unknown = row.unknown
    except InputError:
        raise
    except Exception as error:  # the model's own code, which may be anybody's
        refusal, unknown = None, _in_a_line(error)
    if refusal is not None:
        raise InputError(refusal)
    if unknown is not None:
        log.warning("%s: not known to fit in memory, as the model does not run without data (%s)", stage, unknown)


def check_targets(recipe: Recipe) -> None:
    """Refuse target modules that the model does not have; a model that cannot be made without weights is let pass."""
    try:
        describe(recipe)
    except InputError:
        raise
    except Exception as error:  # the model's own code, which may be anybody's
        log.debug("target modules are checked when the adapter is attached (%s)", _in_a_line(error))


def out_of_memory(stage: str, recipe: Recipe, lengths: Lengths | None) -> str:
    """The message when a stage's memory ran out: the cheapest changes that lower its need by a fifth.

    `lengths`: of the labelled rows; None for a stage that is not planned for.
    """
    message = f"{stage}: out of memory; what was finished and the last checkpoint are kept, the same command resumes"
    if stage == "benchmark":
        # Its prompts are the tasks' own, so that nothing is planned for.
        return f"{message}; a smaller evaluate.batch_size needs less"
    if lengths is None:
        return message
    try:
        row = need(recipe, lengths, stage)
        room = min(available(recipe), row.total * 4 // 5)
        lines = advice(recipe, lengths, row, room)
    except Exception as error:  # of the model's own code; the message must come nevertheless
        lines = [
            f"what would lower its need is not known, as the model does not run without data ({_in_a_line(error)})"
        ]
    return "\n".join([message, *lines])


def _at_most(recipe: Recipe, lengths: Lengths, model: Model) -> int:
    """More than any stage can need: a hundred numbers a hidden unit, token and layer, and logits at every position."""
    text = model.config.get_text_config()
    trained = [getattr(recipe, stage).setting("per_device_train_batch_size") for stage in recipe.stages]
    evaluated = [recipe.sft.setting("per_device_eval_batch_size")] if recipe.sft.evaluates() else []
    batches = [recipe.score.batch_size, recipe.evaluate.batch_size, *trained, *evaluated]
    new = max(recipe.evaluate.max_new_tokens, completion_tokens(recipe))
    tokens = max(batches) * (lengths.whole + new)
    more = 100 * text.num_hidden_layers * text.hidden_size + 2 * text.vocab_size
    return model.weights + 40 * model.elements + 4 * tokens * more + resident_bytes()
