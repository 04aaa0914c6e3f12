"""`data.loss`: the last answer's tokens or those of every turn of the assistant, whatever the chat template."""

import logging
import re

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

import lorapar
from lorapar import InputError
from lorapar.data import tokens
from lorapar.data.tokens import IGNORED, encode, render, turn_end_token
from lorapar.data.turns import labelled
from lorapar.memory.needs import lengths_of
from lorapar.pipeline.order import stages_of
from lorapar.pipeline.records import fingerprint
from lorapar.recipe.reading import load_recipe
from lorapar.scoring.batches import read_examples
from lorapar.stage import Run
from tests.lorapar.driver import refused, skipped, succeeds
from tests.lorapar.test_adapter import config, random_partition
from tests.lorapar.test_tokens import TEMPLATES, call, of_library, run_recipe, tool, user
from tests.lorapar.test_training import sft_config
from tests.tiny import CHATML, chat_tokenizer, tiny_model, tiny_tokenizer


def said(words):
    return {"role": "assistant", "content": words}


LOOKED = {"role": "tool", "name": "look", "content": "7"}
MULTI = {"id": "7", "prompt": [user("Q0"), said("A0"), user("Q1"), said("A1 "), user("Q2")], "completion": [said("A2")]}
TOOLS = {"tools": [tool("look", {"x": {"type": "integer"}})]}
MIXED = {**TOOLS, "prompt": [user("Q0"), call("look", {"x": 1}), LOOKED, said("A0"), user("Q1")],
         "completion": [said("A2")]}  # fmt: skip
SEVERAL = {**TOOLS, "prompt": [user("Q0"), said("A0"), user("Q1")],
           "completion": [call("look", {"x": 1}), LOOKED, said("A2")]}  # fmt: skip
MARKED = CHATML.replace(
    "{{ m['content'] }}<|im_end|>\n",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}",
)
# As Llama 2 writes them: no generation prompt, and an EOS behind an answer.
INST = ("{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} "
        "{{ m['content'] }}<|endoftext|>{% endif %}{% endfor %}")  # fmt: skip
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def learned(row, tokenizer, turns="assistant"):
    """The runs of tokens that carry a loss, as text."""
    ids, labels = labelled(row, tokenizer, turns)
    assert ids == encode(row, tokenizer)[0]
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels))
    runs: list[list[int]] = [[]]
    for token, label in zip(ids, labels):
        runs = [*runs[:-1], [*runs[-1], token]] if label != IGNORED else [*runs, []] if runs[-1] else runs
    return [tokenizer.decode(run) for run in runs if run]


# Template and row → what is trained on.
WRITTEN = {
    ("qwen2_5", "multi"): ["A0<|im_end|>\n", "A1 <|im_end|>\n", "A2<|im_end|>\n"],
    ("llama3", "multi"): ["A0<|eot_id|>", "A1<|eot_id|>", "A2<|eot_id|>"],
    ("gemma", "multi"): ["A0<end_of_turn>\n", "A1<end_of_turn>\n", "A2<end_of_turn>\n"],
    ("cohere2", "multi"): [f"{a}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>" for a in ("A0", "A1 ", "A2")],
    # It ends the text with an EOS of its own, which no earlier turn has.
    ("phi3", "multi"): ["A0<|end|>\n", "A1 <|end|>\n", "A2<|end|>\n<|endoftext|>"],
    ("smolvlm", "multi"): [" A0<end_of_utterance>\n", " A1 <end_of_utterance>\n", " A2<end_of_utterance>\n"],
    # These leave thoughts out of earlier turns, or write an empty one.
    ("qwen3", "multi"): ["A0<|im_end|>\n", "A1 <|im_end|>\n", "<think>\n\n</think>\n\nA2<|im_end|>\n"],
    ("qwen3", "thought"): ["A0<|im_end|>\n", "<think>\n\n</think>\n\nA2<|im_end|>\n"],
    ("qwen3_5_think", "thought"): ["A0<|im_end|>\n", "\n</think>\n\nA2<|im_end|>\n"],
    ("nemotron_3_nano", "multi"): [
        "<think></think>A0<|im_end|>\n",
        "<think></think>A1<|im_end|>\n",
        "</think>A2<|im_end|>\n",
    ],
    ("deepseek_r1_distill", "multi"): [f"{a}<｜end▁of▁sentence｜>" for a in ("A0", "A1 ", "</think>\n\nA2")],
    # A call is a turn; what the tool says is none.
    ("llama3_1", "mixed"): ['{"name": "look", "parameters": {"x": 1}}<|eot_id|>', "A0<|eot_id|>", "A2<|eot_id|>"],
    ("qwen2_5", "several"): ["A0<|im_end|>\n",
        '<tool_call>\n{"name": "look", "arguments": {"x": 1}}\n</tool_call><|im_end|>\n', "A2<|im_end|>\n"],
    ("qwen3_5_think", "several"): [
        "A0<|im_end|>\n",
        "\n</think>\n\n<tool_call>\n<function=look>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call><|im_end|>\n",
        "<think>\n\n</think>\n\nA2<|im_end|>\n",
    ],
    # By the template's own marks, which for gpt-oss hold the turn's beginning and another end than the last turn's.
    ("qwen3_training", "multi"): [f"<think>\n\n</think>\n\n{a}<|im_end|>\n" for a in ("A0", "A1 ", "A2")],
    ("gptoss_training", "multi"): [f"<|start|>assistant<|channel|>final<|message|>{a}<|end|>" for a in ("A0", "A1 ")]
    + ["<|channel|>final<|message|>A2<|return|>"],
    ("qwen2_5_training", "several"): ["\nA0<|im_end|>\n",
        '<tool_call>\n{"name": "look", "arguments": {"x": 1}}\n</tool_call><|im_end|>\n', "\nA2<|im_end|>\n"],
}  # fmt: skip
ROWS = {
    "multi": MULTI,
    "mixed": MIXED,
    "several": SEVERAL,
    "thought": {"prompt": [user("Q0"), said("<think>\nR0\n</think>\n\nA0"), user("Q1")], "completion": [said("A2")]},
}


@pytest.mark.parametrize(("template", "row"), WRITTEN)
def test_every_turn_of_the_assistant_is_trained_on_with_its_end(template, row):
    assert learned(ROWS[row], of_library(template)) == WRITTEN[template, row]


@pytest.mark.parametrize("template", sorted({template for template, _ in WRITTEN}))
def test_one_turn_is_the_same_to_the_token(template):
    tokenizer = of_library(template)
    for completion in (said("A1"), said("<think>\nR\n</think>\n\nA1")):
        row = {"prompt": [user("Q")], "completion": [completion]}
        try:
            last = labelled(row, tokenizer)
        except InputError:
            continue
        assert labelled(row, tokenizer, "assistant") == last
        ids, n_prompt = encode(row, tokenizer)
        assert last == (ids, [IGNORED] * n_prompt + ids[n_prompt:])


@pytest.mark.parametrize("template", ["qwen2_5", "qwen2_5_training", "gptoss_training"])
def test_a_turn_of_the_weight_0_is_not_learned(template):
    tokenizer = of_library(template)
    for row, weightless in (
        (MULTI, (1,)),
        (MULTI, (3, 5)),
        *([(SEVERAL, (1, 3))] if template != "gptoss_training" else []),
    ):
        turns = [*row["prompt"], *row["completion"]]
        weighed = [{**turn, "weight": 0} if i in weightless else turn for i, turn in enumerate(turns)]
        n = len(row["prompt"])
        expected, places = learned(row, tokenizer), [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        given = {**row, "prompt": weighed[:n], "completion": weighed[n:]}
        assert learned(given, tokenizer) == [run for run, i in zip(expected, places) if i not in weightless]
        assert encode(given, tokenizer) == encode(row, tokenizer)
    answered = {"id": "7", "messages": [user("Q"), {**said("A"), "weight": 0}]}
    with pytest.raises(InputError, match="row 7: the last answer has the weight 0"):
        labelled(answered, tokenizer)
    with pytest.raises(InputError, match="row 7: every turn of the assistant has the weight 0"):
        labelled(answered, tokenizer, "assistant")


def test_a_plain_completion_is_the_assistants_only_turn():
    row, tokenizer = {"prompt": "ab", "completion": "c"}, tiny_tokenizer()
    assert labelled(row, tokenizer, "assistant") == labelled(row, tokenizer)


@pytest.mark.parametrize("template", ["qwen2_5", "llama3", "llama3_1", "gemma", "gemma3", "cohere2", "idefics3", "lfm2",
                                      "qwen3_instruct_2507", "gemma4_v2", "muse_glimmer"])  # fmt: skip
def test_an_earlier_turn_is_what_the_last_one_would_be(template):
    """Where a template writes a turn alike wherever it stands: the tokens are those of `last` with the rest cut off."""
    tokenizer = of_library(template)
    ids, labels = labelled(MULTI, tokenizer, "assistant")
    turns = [*MULTI["prompt"], *MULTI["completion"]]
    expected = [IGNORED] * len(ids)
    for i in (1, 3, 5):
        whole, n_prompt = encode({"prompt": turns[:i], "completion": [turns[i]]}, tokenizer)
        assert ids[: len(whole)] == whole
        expected[n_prompt : len(whole)] = whole[n_prompt:]
    assert labels == expected


@pytest.mark.parametrize("name", sorted(
    path.stem.removesuffix("_training") for path in TEMPLATES.glob("*_training.jinja")
))  # fmt: skip
def test_what_is_found_is_what_trls_marks_say(name):
    """TRL has many templates once more with marks. Where those write the same text, the same tokens are learned."""
    own, marked = of_library(name), of_library(f"{name}_training")
    compared = 0
    for row in (MULTI, {**MULTI, "prompt": MULTI["prompt"][:3]}, MIXED, SEVERAL):
        try:
            one, other = labelled(row, own, "assistant"), labelled(row, marked, "assistant")
        except InputError:
            continue
        if one[0] == other[0]:
            compared += 1
            assert {own.decode([a]) for a, b, c in zip(one[0], one[1], other[1]) if b > c} <= {" "}
            # Some mark the header, or its end, too.
            extra = {own.decode([a]) for a, b, c in zip(one[0], one[1], other[1]) if b < c}
            assert extra <= {"<｜Assistant｜>", "<|start|>", "\n", " ", *"assistant"}, extra
    assert compared or name.startswith(("gptoss", "qwen3", "glm4moe")), name


def test_the_marks_are_read_as_transformers_reads_them():
    tokenizer = chat_tokenizer(MARKED)
    turns = [*MULTI["prompt"], *MULTI["completion"]]
    made = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    ids, labels = labelled(MULTI, tokenizer, "assistant")
    assert ids == made["input_ids"]
    assert [int(label != IGNORED) for label in labels] == made["assistant_masks"]
    assert learned(MULTI, tokenizer) == learned(MULTI, chat_tokenizer())


def test_a_mark_without_the_end_of_the_turn_gets_it():
    short = MARKED.replace("<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>\n")
    assert learned(MULTI, chat_tokenizer(short)) == ["A0<|im_end|>", "A1 <|im_end|>", "A2<|im_end|>\n"]
    assert turn_end_token(chat_tokenizer(short)) == 259


def test_a_template_without_a_generation_prompt():
    assert learned(MULTI, chat_tokenizer(INST)) == [" A0<|endoftext|>", " A1 <|endoftext|>", " A2<|endoftext|>"]


@pytest.mark.parametrize("words", [
    "A<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nB", "<|im_start|>assistant\n", "lorapar3word",
    "",
    "\n\nA", "user\n", "Q1", '{"a": "<|im_end|>"}',
])  # fmt: skip
@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_words_that_look_like_the_template_do_not_mislead(words, template):
    row = {"prompt": [user("Q0"), said(words), user(words or "Q"), said("A1"), user("Q1")], "completion": [said("A2")]}
    assert learned(row, chat_tokenizer(template)) == [f"{words}<|im_end|>\n", "A1<|im_end|>\n", "A2<|im_end|>\n"]


def sentencepiece(template):
    """Words that begin with a space of their own, as those of Llama 2 and Gemma do."""
    letters = {letter: i for i, letter in enumerate(["<unk>", "<eos>", "▁", *"ABQ012:\nusertain", "▁A", "▁B", "▁Q"])}
    merges = [("▁", "A"), ("▁", "B"), ("▁", "Q")]
    built = Tokenizer(models.BPE(vocab=letters, merges=merges, unk_token="<unk>"))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<eos>")
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    ("template", "pieces"),
    [
        # A header that ends with a space: it is part of the first word's token.
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
         "{% if add_generation_prompt %}assistant: {% endif %}", ["▁A", "0", "<eos>"]),
        ("{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}{{ eos_token }}{% endfor %}"
         "{% if add_generation_prompt %}assistant:\n{% endif %}", ["A", "0", "<eos>"]),
    ],
)  # fmt: skip
def test_sentencepiece_words_are_whole(template, pieces):
    tokenizer = sentencepiece(template)
    row = {"prompt": [user("Q0"), said("A0"), user("Q1")], "completion": [said("B2")]}
    ids, labels = labelled(row, tokenizer, "assistant")
    n_prompt = encode(row, tokenizer)[1]
    kept = [token for token, label in zip(ids[:n_prompt], labels) if label != IGNORED]
    assert tokenizer.convert_ids_to_tokens(kept) == pieces


class Slow:
    """A tokenizer that knows nothing of places in its text, as some models' own are."""

    is_fast = False

    def __init__(self, of):
        self.of = of

    def __getattr__(self, name):
        return getattr(self.of, name)

    def __call__(self, text, **options):
        return {"input_ids": self.of(text, **options)["input_ids"]}


@pytest.mark.parametrize("template", [CHATML, MARKED, INST])
def test_a_slow_tokenizer_gives_the_same(template):
    fast = chat_tokenizer(template)
    assert labelled(MULTI, Slow(fast), "assistant") == labelled(MULTI, fast, "assistant")


# What cannot be trusted

CANNOT = "row 7: data.loss: assistant: the assistant's earlier turns cannot be told from the rest in this chat template"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        # Its words depend on what was said before.
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper }}"), "it changes"),
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m['content'] | length }}"), "it changes message 1"),
        ("{% for m in messages %}{% if m['role'] == 'user' or loop.last %}<|im_start|>{{ m['role'] }}\n"
         "{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
         "it does not write message 2 in one piece"),
        # The last turn alone has an end.
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
         "{% if loop.last and m['role'] == 'assistant' %}<|im_end|>{% endif %}\n{% endfor %}"
         "{% if add_generation_prompt %}assistant: {% endif %}", "it ends message 2 otherwise than a last answer"),
        # Nothing stands between a question and its answer.
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}",
         "it writes nothing that shows where message 2 begins"),
        # Marks around the last turn alone, and around other tokens.
        (MARKED.replace("m['role'] == 'assistant' %}{% gen", "m['role'] == 'assistant' and loop.index > 3 %}{% gen"),
         "it marks 1 of 2 turns"),
    ],
)  # fmt: skip
def test_what_cannot_be_trusted_is_refused(template, says):
    tokenizer = chat_tokenizer(template)
    labelled(MULTI, tokenizer)
    with pytest.raises(InputError, match=f"{re.escape(CANNOT)}: {says}.*use data.loss: last"):
        labelled(MULTI, tokenizer, "assistant")


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_template_without_calls_is_named(template, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lorapar"), "propagate", True)
    tokenizer = chat_tokenizer(template)
    row = {"id": "7", "prompt": MIXED["prompt"], "completion": MIXED["completion"]}
    tokens._warn_of_calls.cache_clear()
    assert learned(row, tokenizer, "last") == ["A2<|im_end|>\n"]
    assert caplog.text.count("rows have tool calls, which the chat template does not write") == 1
    with pytest.raises(
        InputError, match="row 7: data.loss: assistant: the chat template does not write tool calls; use"
    ):
        labelled(row, tokenizer, "assistant")


@pytest.mark.parametrize("template", sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
def test_whether_a_template_writes_calls(template):
    tokenizer = of_library(template)
    try:
        text = render([user("Q0"), call("looking", {"x": 1})], {}, tokenizer)
    except InputError:
        return
    assert tokens.writes_calls(tokenizer) == ("looking" in text)


def test_arguments_that_hold_the_end_of_a_turn_are_refused():
    row = {**MIXED, "id": "7", "prompt": [user("Q0"), call("look", {"x": "<|im_end|>"}), *MIXED["prompt"][2:]]}
    with pytest.raises(InputError, match=f"{re.escape(CANNOT)}: it ends message 2 otherwise"):
        labelled(row, of_library("qwen2_5"), "assistant")


def test_a_template_without_an_end_of_turn_trains_on_the_words():
    tokenizer = chat_tokenizer(PLAIN + "{% if add_generation_prompt %}assistant: {% endif %}")
    assert [words.strip() for words in learned(MULTI, tokenizer)] == ["A0", "A1", "A2"]


# Through the stages


def test_scoring_and_sft_learn_the_same_tokens(tmp_path):
    tokenizer = chat_tokenizer()
    model = lorapar.attach(tiny_model(vocabulary=len(tokenizer)), config(), start="twin")
    rows = [MULTI, {**MULTI, "id": "8", "prompt": MULTI["prompt"][:3]}]
    data = Dataset.from_list(rows)
    expected = [labelled(row, tokenizer, "assistant") for row in rows]
    examples = read_examples(rows, tokenizer, None, "assistant")
    assert [([*e.ids], [*e.targets]) for e in examples] == [(ids, [*labels[1:], IGNORED]) for ids, labels in expected]
    settings = sft_config(tmp_path, max_steps=1, max_length=None)
    made = random_partition(model, 0.4)
    trainer, _ = lorapar.sft(model, tokenizer, data, made, settings, turns="assistant")
    assert [*zip(trainer.train_dataset["input_ids"], trainer.train_dataset["labels"])] == expected
    one, two = (lorapar.score(model, tokenizer, rows, turns=turns) for turns in ("last", "assistant"))
    given = [{"input_ids": ids, "labels": labels} for ids, labels in expected]
    three = lorapar.score(model, None, given)
    assert any(not torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(three[name], two[name]) for name in two)
    settings = sft_config(tmp_path, completion_only_loss=False)
    with pytest.raises(InputError, match="sft.completion_only_loss: got False, expected nothing beside data.loss"):
        lorapar.sft(model, tokenizer, data, made, settings, turns="assistant")
    with pytest.raises(InputError, match="loss: got 'all', expected last or assistant"):
        lorapar.score(model, tokenizer, rows, turns="all")


def conversations(count=28):
    return [{"messages": [user(f"Q{i}"), said(f"A{i}"), user("And?"), said(str(i))], "answer": str(i), "sys": 1 + i % 2}
            for i in range(count)]  # fmt: skip


def test_labels_stay_and_what_learns_from_tokens_is_made_again(tmp_path):
    recipe = run_recipe(tmp_path, chat_tokenizer(), conversations())
    values = load_recipe(recipe, [("stages", "[sft]")])
    folder = tmp_path / "run"
    succeeds("label", recipe, "--output_dir", folder)
    before = (folder / "labels.jsonl").read_bytes()
    for loss in ("last", "assistant"):
        made = load_recipe(recipe, [("stages", "[sft]"), ("data.loss", loss)])
        assert "loss" in made.as_dict()["data"]
    of = {}
    for loss in ("last", "assistant"):
        made = load_recipe(recipe, [("stages", "[sft]"), ("data.loss", loss)])
        run = Run(made, folder)
        stages = {stage.name: stage for stage in stages_of(made)}
        of[loss] = [stages["label"].inputs(run), stages["score"].inputs(run), stages["sft"].inputs(run)]
        of[loss].append(fingerprint(stages["label"], run))
        whole = lengths_of(made, run.labels(), run.tokenizer)
        of[loss].append(sum(row.answers for row in whole.rows))
    assert values.data.loss == "last"
    last, all_turns = of["last"], of["assistant"]
    assert last[:3] == [last[0], {}, {}]
    assert all_turns[1:3] == [{"loss": "assistant"}] * 2
    assert last[3] == all_turns[3]
    assert all_turns[4] == last[4] + sum(len(f"A{i}") + 2 for i in range(28))
    log = succeeds("label", recipe, "--output_dir", folder, "--data.loss", "assistant", "--update")
    assert skipped(log) == ["label"]
    assert (folder / "labels.jsonl").read_bytes() == before


def test_rows_that_cannot_be_told_apart_are_refused_before_teachers_are_asked(tmp_path):
    template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper }}")
    recipe = run_recipe(tmp_path, chat_tokenizer(template), conversations(), data={"loss": "assistant"})
    refused("label", recipe, "--output_dir", tmp_path / "run", says=("data.loss: assistant", "it changes"))
    assert not (tmp_path / "run" / "labels.jsonl").exists()


def test_keys_beside_it(tmp_path, changed_recipe):
    refused("plan", changed_recipe(sft={"assistant_only_loss": True}), says=("data.loss: assistant",))
    recipe = changed_recipe(data={"loss": "assistant"}, sft={"completion_only_loss": False})
    refused("plan", recipe, says=("sft.completion_only_loss: got False",))
    refused("plan", changed_recipe(data={"loss": "all"}), says=("data.loss: got 'all', allowed: last, assistant",))
