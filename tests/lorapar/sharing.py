"""What test_processes.py does in one process and, by `launched.launch`, in several: `python -m tests.lorapar.sharing
<folder> <what> ...`. Each function writes what it found into the folder, and fails where the processes do not agree."""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState

import lorapar
from lorapar.adapter.layers import MaskedLayer
from lorapar.distributed import processes
from lorapar.files import load_tensors
from lorapar.labeling import local
from lorapar.labeling.stage import label_stage
from lorapar.model import generate
from lorapar.recipe.reading import parse
from lorapar.scoring import batches
from lorapar.scoring import score as scoring
from lorapar.scoring import sums as score_sums
from lorapar.scoring.batches import mean_answer_loss, read_examples
from lorapar.scoring.scores import Scores, save_scores
from lorapar.stage import Run
from tests.lorapar.test_adapter import config
from tests.lorapar.test_scoring import rows
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = 70  # in an odd number of batches
STABLE = {"batch_size": 4, "until_stable": 1.0}


def model():
    return lorapar.attach(tiny_model(), config(), start="paper")


def agreed(value):
    """`value`, where it is the same in every process."""
    everybodys = processes.gather(value)
    assert all(other == everybodys[0] for other in everybodys), everybodys
    return value


def same_in_all(scores: Scores) -> Scores:
    agreed([scores.metadata, [(name, tensor.tolist()) for name, tensor in scores.items()]])
    return scores


def save_one(path: Path, scores: Scores) -> None:
    """A file of scores, in the place of both systems'."""
    save_scores(path, scores, Scores({name: tensor.clone() for name, tensor in scores.items()}, scores.metadata))


def scored(folder: Path) -> None:
    """Scores and partition of two systems; and under `until_stable`, a second time by the file of the first's sums."""
    one, two = (same_in_all(lorapar.score(model(), None, rows(ROWS, seed), 4)) for seed in (0, 1))
    stable = same_in_all(lorapar.score(model(), None, rows(ROWS), **STABLE, checkpoint=folder / "stable.safetensors"))
    taken: list[int] = []
    again = lorapar.score(model(), None, rows(ROWS), **STABLE, checkpoint=folder / "stable.safetensors",
                          on_batch=partial(note, taken))  # fmt: skip
    assert not taken
    assert same_in_all(again).metadata == stable.metadata
    # The first look that reaches the level of the second: the third rows are never taken.
    early = same_in_all(lorapar.score(model(), None, rows(ROWS), 4, until_stable=stable.metadata["looks"][0][1]))
    if processes.is_main():
        save_scores(folder / "scores.safetensors", one, two)
        save_scores(folder / "stable_scores.safetensors", stable, early)
        lorapar.partition(one, two, theta=0.9, alpha=0.5, beta=0.5).save(folder / "partition.safetensors")


PASSES = {"plain": {"batch_size": 4}, "stable": STABLE}


def killed(folder: Path, which: str) -> None:
    """A pass that dies in its main process; where there is another, that one has saved its sums by then, and stands
    still. Under `until_stable` it has been at a look, which the main one's file of sums does not know of."""
    score_sums.SAVE_SECONDS, score_sums.SAVE_SHARE = 0.0, float("inf")
    path = folder / f"{which}.safetensors"

    def on_batch(running: score_sums.RunningSums) -> None:
        if which == "stable" and processes.is_main() and processes.count() > 1 and running.batches == 2:
            score_sums.SAVE_SECONDS = float("inf")
        if running.batches < (3 if which == "plain" else 6):
            return
        while processes.count() > 1 and not (processes.is_main() and seen(score_sums.file_of(path, 1), which)):
            time.sleep(0.05)
        os._exit(9)

    lorapar.score(model(), None, rows(ROWS), checkpoint=path, on_batch=on_batch, **PASSES[which])


def seen(file: Path, which: str) -> bool:
    return file.exists() and (which == "plain" or load_tensors(file)[1]["looked"] > 0)


def note(taken: list[int], running: score_sums.RunningSums) -> None:
    taken.append(running.batches)


def resumed(folder: Path, which: str) -> None:
    """Go on from what `killed` left, and take no batch that was done then."""
    path, taken = folder / f"{which}.safetensors", []
    done = [place for file in score_sums.files_of(path) for place in load_tensors(file)[1]["done"]]
    assert len(done) == len(set(done)) > 1
    processes.wait()
    scores = same_in_all(lorapar.score(
        model(), None, rows(ROWS), checkpoint=path, on_batch=partial(note, taken), **PASSES[which]
    ))  # fmt: skip
    whole = len(batches.plan_batches([len(row["input_ids"]) for row in rows(ROWS)], 4,
                                     [] if which == "plain" else score_sums.marks_of(ROWS), padded=True))  # fmt: skip
    assert sum(processes.gather(len(taken))) == whole - len(done)
    if processes.is_main():
        save_one(folder / f"{which}_scores.safetensors", scores)


def read_back(folder: Path) -> None:
    """The scores of a pass that is done, out of its files alone."""
    taken: list[int] = []
    scores = lorapar.score(model(), None, rows(ROWS), 4, checkpoint=folder / "plain.safetensors",
                           on_batch=partial(note, taken))  # fmt: skip
    assert not taken
    save_one(folder / "read_back.safetensors", scores)


def kept_in_step(folder: Path) -> None:
    """As with a sharded base: every process makes as many forwards and backwards, and the scores are the same."""
    for module in (scoring, batches, generate):
        module.is_sharded = lambda model: True
    assert len(batches.plan_batches([len(row["input_ids"]) for row in rows(ROWS)], 4, [], True)) % processes.count()
    whole = model()
    forwards, backwards, steps = [], [], []
    layer = next(module for module in whole.modules() if isinstance(module, MaskedLayer))
    layer.register_forward_hook(lambda *_: forwards.append(1))
    layer.register_full_backward_hook(lambda *_: backwards.append(1))
    scores = same_in_all(lorapar.score(whole, None, rows(ROWS), 4))
    agreed((len(forwards), len(backwards)))
    produce = whole.generate

    def in_step(*args, synced_gpus, **kwargs):
        steps.append(synced_gpus)
        return produce(*args, **kwargs)

    whole.generate = in_step
    rows_of_one = [{"id": str(i), "prompt": "?" * (i + 1), "answer": "1"} for i in range(5)]
    lorapar.evaluate(whole, tiny_tokenizer(), rows_of_one, 4, 1)
    assert agreed(steps) == [True] * (-(-5 // processes.count()))
    before = len(forwards)
    mean_answer_loss(whole, read_examples(rows(5), None, None), 1)
    assert agreed(len(forwards) - before) == -(-5 // processes.count())
    if processes.is_main():
        save_one(folder / "in_step.safetensors", scores)


def evaluated(folder: Path) -> None:
    """Answers, a metric that notes each of its calls, and the mean loss of a watched system."""

    def letters(prompts, completions, **columns):
        with open(folder / "called.txt", "a") as file:
            file.write(f"{processes.rank()} {len(completions)}\n")
        return [len(text) / 7 for text in completions]

    asked = [{"id": str(i), "prompt": "x" * (1 + i * 5 % 13), "answer": "1", "system": 1 + i % 2} for i in range(23)]
    torch.manual_seed(processes.rank())
    result = agreed(lorapar.evaluate(model(), tiny_tokenizer(), asked, 6, 4, metric=letters))
    by_accuracy = agreed(lorapar.evaluate(model(), tiny_tokenizer(), asked, 6, 4))
    loss = agreed(mean_answer_loss(model(), read_examples(rows(ROWS), None, None), 4))
    if processes.is_main():
        (folder / "evaluated.json").write_text(json.dumps([result, by_accuracy, loss]))


def labelled(folder: Path) -> None:
    """A panel of two local teachers behind a voter, with early stops and a reserve; each question is noted."""

    def says(loaded, tokenizer, ids, max_new_tokens, batch_size, stopped):
        assert len(ids) <= batch_size
        answers = []
        with open(folder / f"asked{processes.rank()}.txt", "a") as file:
            for prompt in ids:
                text = tokenizer.decode(prompt)
                number = int(text.rpartition("no. ")[2].split(":")[0])
                file.write(f"{loaded.config.vocab_size} {number}\n")
                # One teacher votes by the number's parity, the other by its remainder of 3.
                answers.append(f"System{1 + number % (2 if loaded.config.vocab_size == 258 else 3) % 2}")
        return answers

    local.answer_greedily = says
    values = json.loads((folder / "recipe.json").read_text())
    facts = agreed(label_stage(Run(parse(values), folder)))
    if processes.is_main():
        (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    PartialState(cpu=True)
    for said in sys.argv[2:]:
        what, *options = said.split(":")
        globals()[what](Path(sys.argv[1]), *options)
