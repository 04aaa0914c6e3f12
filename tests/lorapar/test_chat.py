"""`lorapar chat`: the answers are evaluation's, token by token and side by side, and the run's folder is only read."""

import codecs
import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from lorapar.adapter.attach import attach, load_adapter, save_adapter
from lorapar.adapter.layers import lora_parameters
from lorapar.chatting.asking import Conversation, around, notes
from lorapar.chatting.columns import Screen, layout, painted, shown, width_of, wrapped
from lorapar.chatting.models import Models
from lorapar.chatting.streaming import tokens_of
from lorapar.data.tokens import prompt_ids
from lorapar.files import read_json, read_jsonl
from lorapar.logs import RUN_LOCK
from lorapar.model.generate import answer_greedily, set_stop_tokens
from lorapar.model.load import load_model, load_tokenizer
from lorapar.pipeline.order import stages_of
from lorapar.pipeline.records import made_with
from lorapar.recipe.reading import load_recipe
from lorapar.recipe.sections import ModelConfig
from lorapar.stage import Run
from tests.architectures import ARCHITECTURES, save
from tests.tiny import CHATML

from .driver import lorapar, refused, succeeds, tree, write_recipe

NAMES = ["base", "sft", "grpo"]
TITLES = ["base", "after SFT", "after GRPO"]


def sections(out: str) -> dict[str, str]:
    """The answers that the plain form holds, by their titles; of several questions, the last ones."""
    found: dict[str, list[str]] = {}
    for line in out.splitlines():
        if line and not line.startswith(" "):
            found[line] = []
        elif found:
            found[list(found)[-1]].append(line.removeprefix("  "))
    return {title: "\n".join(lines).strip() for title, lines in found.items()}


def changed(folder: Path, **sections: Any) -> Path:
    """The recipe of a finished run with some keys set otherwise, as if it had been run so."""
    values = yaml.safe_load((folder / "recipe.yaml").read_text())
    for name, value in sections.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    path = write_recipe(folder / "recipe.yaml", values)
    as_done_now(folder)
    return path


def as_done_now(folder: Path) -> None:
    """Have the records say that each stage was done with the recipe and the files that are there."""
    path, recipe = folder / "stages.json", load_recipe(folder / "recipe.yaml")
    there, run = read_json(path), Run(recipe, folder)
    now = {stage.name: made_with(stage, run) for stage in stages_of(recipe) if stage.name in there}
    path.write_text(json.dumps({name: {**record, "made_with": now[name]} for name, record in there.items()}))


def forget(folder: Path, *stages: str) -> None:
    """As if these stages had not been done."""
    path = folder / "stages.json"
    path.write_text(json.dumps({name: record for name, record in read_json(path).items() if name not in stages}))


def tell_apart(folder: Path) -> None:
    """Move the stages' adapters far from the base and from each other: four steps of training change no answer."""
    for seed, name in enumerate(NAMES[1:]):
        path = folder / name / "adapter_model.safetensors"
        generator = torch.Generator().manual_seed(seed)
        tensors = {key: torch.randn(tensor.shape, generator=generator) * 0.15
                   for key, tensor in sorted(load_file(path).items())}  # fmt: skip
        save_file(tensors, path, {"format": "pt"})
    path = folder / "stages.json"
    path.write_text(json.dumps({name: {**record, "files": {}} for name, record in read_json(path).items()}))
    as_done_now(folder)


# What is refused


def test_help():
    code, out, err = lorapar("chat", "--help")
    assert (code, err) == (0, "")
    assert out.startswith("usage: lorapar chat RECIPE.yaml")
    for word in ("--once", "--max_new_tokens", "--temperature", "--output_dir", "--section.key"):
        assert word in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--max_new_tokens", "0"), "--max_new_tokens: got '0', expected a whole number above 0"),
        (("--max_new_tokens", "many"), "--max_new_tokens: got 'many'"),
        (("--max_new_tokens", "1.5"), "--max_new_tokens: got '1.5'"),
        (("--temperature", "0"), "--temperature: got '0', expected a number above 0"),
        (("--temperature", "nan"), "--temperature: got 'nan'"),
        (("--temperature", "warm"), "--temperature: got 'warm'"),
        (("--once", "  "), "--once: the question is empty"),
        (("--once", "a\udce9"), "--once: the question holds U+DCE9"),
        (("--once", "hi", "--evaluate.max_new_tokns", "3"), "evaluate.max_new_tokns: unknown key; did you mean"),
        (("--once", "hi", "--output_dir", "gone"), "gone: not a run's output folder"),
        (("--once", "hi", "--partition.theta", "0.5"), "made by another recipe (partition.theta was 0.9, is 0.5)"),
        (("--once",), "--once: expected one argument"),
    ],
)
def test_unusable_arguments_are_one_line(recipe_file: Path, finished: Path, words, says):
    given = words if "--output_dir" in words else (*words, "--output_dir", finished)
    if words == ("--once",):
        given = ("--output_dir", finished, "--once")
    before = tree(finished)
    refused("chat", recipe_file, *given, says=(says,), alone=True)
    assert tree(finished) == before


def test_a_recipe_that_is_not_there_and_a_run_without_a_trained_stage(recipe_file: Path, finished: Path):
    refused("chat", "gone.yaml", "--once", "hi", says=("gone.yaml: no such recipe",), alone=True)
    forget(finished, "sft", "grpo", "evaluate", "export", "report")
    says = "no stage has been trained there; run sft first"
    refused("chat", recipe_file, "--output_dir", finished, "--once", "hi", says=(says,), alone=True)


def test_a_stage_of_another_training_is_left_out(recipe_file: Path, finished: Path, changed_recipe):
    """GRPO's adapter grew out of the SFT before this one; beside the new SFT it would say nothing of this run."""
    other = changed_recipe(sft={"learning_rate": 2e-3})
    succeeds("sft", other, "--output_dir", finished, "--update")
    code, out, err = lorapar("chat", other, "--output_dir", finished, "--once", "What is 1 + 2?")
    assert code == 0, err
    assert "grpo is left out: it is of another sft/adapter_model.safetensors; `lorapar run` trains it again" in err
    assert re.findall(r"^\S.*", out, re.M) == ["base", "after SFT"]


def test_bytes_that_are_no_text_are_one_line(recipe_file: Path, finished: Path):
    for words in ([], ["--once", "-"]):
        done = subprocess.run(
            [sys.executable, "-m", "lorapar", "chat", str(recipe_file), "--output_dir", str(finished), *words],
            input=b"h\xff\n", capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        )  # fmt: skip
        assert done.returncode == 2, done.stderr.decode()
        assert b"the question holds U+DCFF, which is no character" in done.stderr.splitlines()[-1]


def test_an_adapter_that_is_not_what_its_stage_wrote_is_refused(recipe_file: Path, finished: Path):
    weights = finished / "grpo" / "adapter_model.safetensors"
    weights.write_bytes((finished / "sft" / "adapter_model.safetensors").read_bytes())
    refused("chat", recipe_file, "--output_dir", finished, "--once", "hi", says=(str(weights), "corrupt"), alone=True)


def test_a_question_that_takes_all_positions_is_refused(recipe_file: Path, finished: Path):
    words = ("chat", recipe_file, "--output_dir", finished, "--once", "x" * 8192)
    refused(*words, says=("the prompt has 8192 tokens, and the model's 8192 positions leave none to answer",))


def test_a_gpu_without_room_is_one_line(recipe_file: Path, finished: Path, monkeypatch):
    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Models, "answers", fails)
    code, out, err = lorapar("chat", recipe_file, "--output_dir", finished, "--once", "hi")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("lorapar: error: chat: the GPU's memory is full")


# Its answers


def test_the_answers_are_those_of_evaluate_and_nothing_is_written(recipe_file: Path, finished: Path):
    """Each in one question, with the folder's lock held as by a run that goes on."""
    answers = read_jsonl(finished / "answers.jsonl")
    rows = [row for row in read_jsonl(finished / "labels.jsonl") if row["split"] == "held_out"][:3]
    before, log = tree(finished), (finished / "run.log").read_bytes()
    with FileLock(finished / RUN_LOCK):
        for row in rows:
            code, out, _ = lorapar("chat", recipe_file, "--output_dir", finished, "--once", row["prompt"])
            assert code == 0
            expected = {answer["model"]: answer["completion"] for answer in answers if answer["id"] == row["id"]}
            assert set(expected) == set(NAMES)
            given = sections(out)
            assert list(given) == TITLES
            assert [given[title] for title in TITLES] == [shown(expected[name]) for name in NAMES]
    assert tree(finished) == before
    assert (finished / "run.log").read_bytes() == log


def test_once_reads_stdin_and_says_nothing_to_a_terminal_alone(recipe_file: Path, finished: Path, monkeypatch):
    words = ("chat", recipe_file, "--output_dir", finished, "--once")
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 1 + 2?\n"))
    from_stdin = lorapar(*words, "-")
    assert from_stdin[:2] == lorapar(*words, "What is 1 + 2?")[:2]
    assert "\x1b" not in from_stdin[1]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    refused(*words, "-", says=("--once: the question is empty",), alone=True)


def test_before_evaluate_and_with_one_stage_alone(recipe_file: Path, finished: Path):
    whole = sections(lorapar("chat", recipe_file, "--output_dir", finished, "--once", "1 + 2")[1])
    forget(finished, "grpo", "evaluate", "export", "report")
    for name in ("answers.jsonl", "metrics.json"):
        (finished / name).unlink()
    code, out, _ = lorapar("chat", recipe_file, "--output_dir", finished, "--once", "1 + 2")
    assert code == 0
    assert sections(out) == {title: whole[title] for title in TITLES[:2]}
    alone = changed(finished, stages=["sft"])
    assert lorapar("chat", alone, "--output_dir", finished, "--once", "1 + 2")[1] == out


def test_stages_in_the_other_order(recipe_file: Path, finished: Path):
    tell_apart(finished)
    words = ("--output_dir", finished, "--once", "1 + 2", "--max_new_tokens", 12)
    whole = sections(lorapar("chat", recipe_file, *words)[1])
    swapped = sections(lorapar("chat", changed(finished, stages=["grpo", "sft"]), *words)[1])
    assert list(swapped) == ["base", "after GRPO", "after SFT"]
    assert swapped == whole
    assert len(set(whole.values())) == 3


def test_answers_drawn_at_a_temperature_follow_the_seed(recipe_file: Path, finished: Path):
    words = ("--output_dir", finished, "--once", "1 + 2", "--max_new_tokens", 16)
    greedy, first, second = (lorapar("chat", recipe_file, *words, *more)[1]
                             for more in ((), ("--temperature", 1), ("--temperature", 1)))  # fmt: skip
    assert first == second != greedy
    other = lorapar("chat", changed(finished, seed=1), *words, "--temperature", 1)[1]
    assert list(sections(other)) == TITLES
    assert other != first


@pytest.fixture
def two_stages(tmp_path: Path) -> Callable[..., Models]:
    """Makes the models of a base with two random adapters, far from it and from each other."""

    def make(config: ModelConfig, base: str | None = None) -> Models:
        tokenizer = load_tokenizer(config)
        for seed, name in enumerate(NAMES[1:]):
            model = attach(load_model(config, base), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM"), "peft")
            generator = torch.Generator().manual_seed(seed)
            for parameter in lora_parameters(model).values():
                noise = torch.randn(parameter.shape, generator=generator) * 0.15
                parameter.data = noise.to(parameter)
            save_adapter(model, tmp_path / name)
        model = load_model(config, base)
        set_stop_tokens(model, tokenizer)
        return Models(model, tokenizer, tmp_path, NAMES[1:])

    return make


@torch.no_grad()
def held_against_evaluation(models: Models, config: ModelConfig, base: str | None, folder: Path, new: int) -> None:
    """The answers of all models equal those of `answer_greedily` with each adapter alone, as evaluation loads it.

    So do the logits: some of the tiny models repeat a token whatever their adapter is.
    """
    rows = [{"prompt": text} for text in ("What is 1 + 2?", "Name a river in Europe, and say why it matters.")]
    ids = [prompt_ids(row, models.tokenizer) for row in rows]
    given = [models.answers(dict.fromkeys(NAMES, prompt), new, None, lambda _: None) for prompt in ids]
    alone = load_adapter(load_model(config, base), folder / "sft").eval()
    tokens, logits = torch.tensor(ids[:1]), []
    for name in NAMES:
        if name == "grpo":
            alone = load_adapter(alone.unload(), folder / name).eval()
        models.switch(name)
        with alone.disable_adapter() if name == "base" else contextlib.nullcontext():
            assert [answer[name] for answer in given] == answer_greedily(alone, models.tokenizer, ids, new, 1), name
            logits.append(models.model(input_ids=tokens).logits)
            assert torch.equal(logits[-1], alone(input_ids=tokens).logits), name
    assert min(float((logits[i] - logits[j]).abs().max()) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_answers_as_evaluation_does(name: str, two_stages, tmp_path: Path):
    save(name, tmp_path / "model")
    config = ModelConfig(name=str(tmp_path / "model"), dtype="float32", device="cpu")
    held_against_evaluation(two_stages(config), config, None, tmp_path, 12)


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_quantised_base_too(base: str, two_stages, tiny_folder: Path, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    config = ModelConfig(name=str(tiny_folder), dtype="float32", device="cpu")
    held_against_evaluation(two_stages(config, base), config, base, tmp_path, 12)


@pytest.mark.slow
def test_smollm2_answers_as_evaluation_does(two_stages, tmp_path: Path):
    config = ModelConfig(name="smollm2-135m", dtype="float32", device="cpu")
    held_against_evaluation(two_stages(config), config, None, tmp_path, 24)


# As they are made


def test_several_calls_take_turns_and_never_run_together():
    running, most, order = 0, 0, []

    def generate(name: str, count: int) -> Callable[[Any], None]:
        def call(streamer: Any) -> None:
            nonlocal running, most
            streamer.put(torch.tensor([[7, 7]]))
            for i in range(count):
                running += 1
                most = max(most, running)
                time.sleep(0.002)
                order.append(name)
                running -= 1
                streamer.put(torch.tensor([i]))
            streamer.end()

        return call

    streams = {name: tokens_of(generate(name, count)) for name, count in (("a", 2), ("b", 3))}
    said: dict[str, list[int]] = {"a": [], "b": []}
    for _ in range(4):
        for name, stream in streams.items():
            said[name] += [token for token in [next(stream, None)] if token is not None]
    assert said == {"a": [0, 1], "b": [0, 1, 2]}
    assert order == ["a", "b", "a", "b", "b"]
    assert most == 1


def test_what_a_call_raises_is_raised_and_a_closed_one_ends():
    def fails(streamer: Any) -> None:
        streamer.put(torch.tensor([[1]]))
        streamer.put(torch.tensor([5]))
        raise ZeroDivisionError

    stream = tokens_of(fails)
    assert next(stream) == 5
    with pytest.raises(ZeroDivisionError):
        next(stream)

    made = []

    def endless(streamer: Any) -> None:
        for i in range(10**6):
            made.append(i)
            streamer.put(torch.tensor([i]))

    before = threading.active_count()
    stream: Any = tokens_of(endless)
    assert [next(stream) for _ in range(3)] == [1, 2, 3]  # the first is taken for the prompt
    stream.close()
    assert threading.active_count() == before
    assert len(made) <= 5


def test_a_character_is_shown_once_its_last_byte_is_there(two_stages, tiny_folder: Path, monkeypatch):
    models = two_stages(ModelConfig(name=str(tiny_folder), dtype="float32", device="cpu"))
    text = "né 世界  🐉 \ufffd."

    def generate(self: Models, ids: list[int], new: int, temperature: float | None, streamer: Any) -> None:
        streamer.put(torch.tensor([ids]))
        for token in self.tokenizer(text)["input_ids"]:
            streamer.put(torch.tensor([token]))

    monkeypatch.setattr(Models, "_generate", generate)
    seen: list[str] = []
    given = models.answers({"base": [40]}, 99, None, lambda said: seen.append(said["base"]))
    assert given == {"base": text}
    assert all(text.startswith(shorter) or text.startswith(shorter + " ") for shorter in seen)
    assert "né 世界" in seen
    assert "né 世" in seen


# The prompt


def test_a_question_is_put_as_the_rows_were():
    assert around("Q: {prompt}\nA:", "1 + {2}") == "Q: 1 + {2}\nA:"
    assert around("Compute: {expression} =", "1 + 2") == "Compute: 1 + 2 ="
    assert around("{context}\n{prompt}", "why") == "\nwhy"
    assert around("{a} and {b}", "why") == "why"
    assert around("as it is", "why") == "why"
    assert notes("{prompt}", True) == []
    assert notes("Q: {prompt}", True) == ["a question is put into data.prompt: 'Q: {prompt}'"]
    assert notes("{context}\n{prompt}", True) == [
        "a question is put into data.prompt: '{context}\\n{prompt}'",
        "data.prompt has columns besides the question, which are left empty: {context}",
    ]
    assert "is left out, since it has no {prompt} but {a}, {b}" in notes("{a} and {b}", True)[0]
    assert notes("{prompt}", False) == ["the model was trained without a chat template: each question stands alone"]


@pytest.mark.parametrize(
    ("template", "typed", "asked"),
    [
        ("Compute: {expression} =", "3 + 4", "Compute: 3 + 4 ="),
        ("Compute: {expression} =", "Compute: 3 + 4 =", "Compute: 3 + 4 ="),
        ("Compute: {expression} =", "Compute: =", "Compute: Compute: = ="),
        ("Q: {prompt}\nA:", "Q: why?", "Q: Q: why?\nA:"),
        ("Q: {prompt}\nA:", "Q: why?\nA:", "Q: why?\nA:"),
        ("{prompt}?", "Why?", "Why?"),
        ("{prompt!r}", "a", "'a'"),
        ("{prompt} and {prompt}", "a and a", "a and a and a and a"),
    ],
)
def test_a_question_with_the_templates_words_gets_them_once(template: str, typed: str, asked: str):
    """As a card shows the prompt; it was asked as "Compute: Compute: 3 + 4 = =", and answered worse."""
    assert around(template, typed) == asked


def test_a_conversation_goes_on_with_the_template_around_the_last_question():
    talk = Conversation("Q: {prompt}", "Be brief.", is_chat=True)
    talk.add("one", "1")
    assert talk.prompt("two") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Q: two"},
    ]
    plain = Conversation("Q: {prompt}", "Be brief.", is_chat=False)
    plain.add("one", "1")
    assert plain.prompt("two") == "Be brief.\n\nQ: two"


def test_lines_of_stdin_are_one_conversation_until_reset(finished: Path, monkeypatch):
    recipe = changed(finished, model={"chat_template": CHATML})
    prompts: list[dict[str, str]] = []
    answers = Models.answers

    def kept(self: Models, ids: dict[str, list[int]], *rest: Any) -> dict[str, str]:
        prompts.append({name: self.tokenizer.decode(tokens) for name, tokens in ids.items()})
        return {name: f"{text}!{name}" for name, text in answers(self, ids, *rest).items()}

    monkeypatch.setattr(Models, "answers", kept)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n two \n/help\n/reset\none\n/quit\nnever\n"))
    code, out, err = lorapar("chat", recipe, "--output_dir", finished)
    assert (code, err) == (0, "")
    assert [len(asked) for asked in prompts] == [3, 3, 3]
    assert prompts[2] == prompts[0]
    for name in NAMES:
        assert prompts[0][name] == "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
        assert prompts[1][name].startswith(prompts[0][name])
        assert prompts[1][name].endswith(f"!{name}<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n")
    assert out.count("after GRPO\n") == 3
    assert "/reset   begin a new conversation" in out

    monkeypatch.setattr(sys, "stdin", io.StringIO("/hlep\n"))
    refused("chat", recipe, "--output_dir", finished, says=("/hlep: no such command; allowed: /reset",), alone=True)


# How it looks


def test_words_are_wrapped_by_the_columns_that_they_take():
    assert wrapped("one two three", 7) == ["one two", "three"]
    assert wrapped("one  two", 8) == ["one  two"]
    assert wrapped("  indented", 12) == ["  indented"]
    assert wrapped("a\n\nb\n", 5) == ["a", "", "b", ""]
    assert wrapped("abcdefgh ij", 3) == ["abc", "def", "gh", "ij"]
    assert wrapped("世界世界", 5) == ["世界", "世界"]
    assert wrapped("", 5) == [""]
    assert width_of("e\u0301世a🐉") == 6
    long = "words of several lengths, 世界 and 🐉🐉🐉🐉🐉🐉 too; " * 9
    for width in (2, 3, 7, 20):
        lines = wrapped(long, width)
        assert max(map(width_of, lines)) <= width
        assert "".join("".join(lines).split()) == "".join(long.split())


def test_answers_stand_side_by_side_where_there_is_room():
    assert layout(TITLES, ["4", "It is 4, which is 2 + 2.", "世界"], 62) == [
        "base                 after SFT            after GRPO",
        "----                 ---------            ----------",
        "4                    It is 4, which is    世界",
        "                     2 + 2.",
    ]
    assert layout(TITLES, ["4", "5", "世界"], 59) == ["base", "4", "", "after SFT", "5", "", "after GRPO", "世界"]
    assert layout(TITLES[:2], ["a", "b"], 40)[0] == "base                 after SFT"
    for width in (20, 59, 60, 100, 200):
        lines = layout(TITLES, ["世 " * 90, "word " * 90, "x" * 300], width)
        assert max(map(width_of, lines)) <= width


def test_growing_answers_show_their_ends_where_the_terminal_is_low():
    texts = ["\n".join(f"{i}" for i in range(count)) for count in (3, 30, 9)]
    lines = layout(TITLES, texts, 100, height=8)
    assert len(lines) == 8
    assert lines[-1].split() == ["29", "8"]
    assert lines[2].split() == ["0", "24", "3"]
    stacked = layout(TITLES, texts, 40, height=11)
    assert stacked == ["base", "1", "2", "", "after SFT", "28", "29", "", "after GRPO", "7", "8"]


def test_control_characters_of_an_answer_do_nothing():
    assert shown("a\x1b[2Jb\r\nd\x07\n\te") == "a\ufffd[2Jb\nd\ufffd\n\te"
    # What would write the columns beside it from right to left; letters that are written so themselves stay.
    assert shown("a\u202eb\u2067c \u05d0\u05d1") == "a\ufffdb\ufffdc \u05d0\u05d1"
    assert layout(["base"], ["a\tb"], 30)[2] == "a   b"
    assert "\x1b" not in "".join(layout(TITLES, ["\x1b[31m", "\x9b2J", "\x00"], 100))


class Terminal:
    """As much of a terminal as the screen asks of one: lines, the cursor's line, and what is cleared."""

    encoding = "utf-8"

    def __init__(self, height: int):
        self.height, self.lines, self.row = height, [""], 0

    def write(self, text: str) -> None:
        for part in filter(None, re.split(r"(\x1b\[\d*[A-Za-z]|\r|\n)", text)):
            if part.endswith("A") and part.startswith("\x1b["):
                self.row -= int(part[2:-1])
                assert self.row >= max(0, len(self.lines) - self.height), "above what is on the screen"
            elif part == "\x1b[K":
                continue
            elif part == "\r":  # what follows is a line up to its end
                self.lines[self.row] = ""
            elif part == "\x1b[J":
                del self.lines[self.row + 1 :]
                self.lines[self.row] = ""
            elif part == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            else:
                self.lines[self.row] = part

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("size", [(100, 24), (100, 9), (50, 30), (50, 9)])
def test_a_redrawn_screen_ends_as_the_whole_layout(size: tuple[int, int], monkeypatch):
    monkeypatch.setattr("lorapar.chatting.columns.SECONDS", 0.0)
    terminal: Any = Terminal(size[1])
    screen = Screen(terminal, TITLES, lambda: size, lambda title, text: text)
    words = [f"word{i}" for i in range(90)]
    for i in range(90):
        texts = [" ".join(words[:i]), " ".join(words[: i // 3]), "\n".join(words[: i // 2])]
        screen.draw(texts)
        assert len(terminal.lines) <= size[1]
    screen.draw(texts, is_last=True)
    assert terminal.lines == [*layout(TITLES, texts, size[0] - 1), ""]


def test_headings_have_the_colours_of_the_report():
    lines = layout(TITLES, ["a", "b", "c"], 100, paint=painted)
    assert lines[0].startswith("\x1b[1mbase\x1b[0m   ")
    assert lines[1:] == layout(TITLES, ["a", "b", "c"], 100)[1:]


# At a terminal


class Session:
    """`lorapar chat` in a process of its own, at a terminal of its own."""

    def __init__(self, *words: object, **environment: str):
        self.handle, theirs = pty.openpty()
        self.said = ""
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        unset = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lorapar", "chat", *map(str, words)],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=_take_terminal,
            env={**unset, "TERM": "xterm", "COLUMNS": "100", "LINES": "30", **environment},
        )  # fmt: skip
        os.close(theirs)

    def type(self, text: str) -> None:
        # As a person does, some time after the prompt is there: input() writes it before it waits for keys or signals.
        time.sleep(1)
        os.write(self.handle, text.encode())

    def until(self, words: str, seconds: float = 90) -> str:
        """What it says up to these words, from where the last call ended."""
        end = time.monotonic() + seconds
        while words not in self.said and time.monotonic() < end:
            if select.select([self.handle], [], [], 0.2)[0]:
                try:
                    self.said += self._decode(os.read(self.handle, 65536))
                except OSError:  # it has ended
                    break
        before, found, self.said = self.said.partition(words)
        assert found, f"{words!r} is not in {before!r}"
        return before + found


def _take_terminal() -> None:
    import fcntl
    import termios

    # Of the session that has just begun; Ctrl-C then goes to it.
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def session() -> Iterator[Callable[..., Session]]:
    made: list[Session] = []

    def start(*words: object, **environment: str) -> Session:
        made.append(Session(*words, **environment))
        return made[-1]

    yield start
    for one in made:
        one.process.kill()
        one.process.wait()
        os.close(one.handle)


@pytest.mark.slow
def test_at_a_terminal(recipe_file: Path, finished: Path, session):
    """Answers grow in place; Ctrl-C stops them, two end with 130, Ctrl-D with 0; NO_COLOR leaves the colours out."""
    plain = lorapar("chat", recipe_file, "--output_dir", finished, "--once", "1 + 2", "--max_new_tokens", 30)[1]
    chat = session(recipe_file, "--output_dir", finished, "--max_new_tokens", 30)
    assert "stands alone" in chat.until("base, after SFT, after GRPO, of ")
    chat.until("> ")
    chat.type("1 + 2\n")
    drawn = chat.until("\r\n> ")
    assert "\x1b[1;38;5;166mafter GRPO\x1b[0m" in drawn
    # Drawn, and drawn again over itself.
    assert drawn.count("after GRPO") >= 3
    assert drawn.count("A\r") >= 2
    for answer in sections(plain).values():
        for line in wrapped(shown(answer), 30):
            assert line in drawn
    chat.type("\x03")
    chat.until("stopped; Ctrl-C again ends")
    chat.type("\x03")
    assert chat.process.wait(30) == 130

    quiet = session(recipe_file, "--output_dir", finished, "--max_new_tokens", 2000, NO_COLOR="1")
    quiet.until("> ")
    quiet.type("1 + 2\n")
    quiet.until("after GRPO")
    quiet.type("\x03")
    assert "\x1b[1m" not in quiet.until("stopped; Ctrl-C again ends")
    quiet.until("> ")
    quiet.type("/help\n")
    quiet.until("with a space before it.")
    quiet.until("> ")
    quiet.type("\x04")
    assert quiet.process.wait(30) == 0
