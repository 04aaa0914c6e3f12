"""One prompt everywhere: the same tokens and the same stop tokens in every stage, whatever the chat template."""

import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import lorapar
import lorapar.evaluating.evaluate
import lorapar.scoring.score
import lorapar.training.grpo
import lorapar.training.sft
from lorapar import InputError
from lorapar.data.labels import load_labels
from lorapar.data.rows import to_dataset
from lorapar.data.tokens import encode, prompt_ids, turn_end, turn_end_token
from lorapar.model.generate import stop_tokens
from lorapar.model.load import load_tokenizer
from lorapar.pipeline import records
from lorapar.recipe.sections import ModelConfig
from lorapar.training.grpo import PartitionedGRPOTrainer
from lorapar.training.sft import PartitionedSFTTrainer
from tests.lorapar.driver import recipe_values, refused, succeeds, write_recipe
from tests.lorapar.test_adapter import config, random_partition
from tests.lorapar.test_training import grpo_config, letters, sft_config
from tests.tiny import CHAT_TOKENS, CHATML, chat_tokenizer, tiny_model, tiny_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
ANSWER = [{"role": "assistant", "content": "A1"}]
THOUGHT = [{"role": "assistant", "content": "<think>\nR1\n</think>\n\nA1"}]
OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}


def user(text):
    return {"role": "user", "content": text}


def call(name, arguments):
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": name,
            "arguments": arguments}}]}  # fmt: skip


def tool(name, properties):
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": {"type": "object",
            "properties": properties}}}  # fmt: skip


def of_library(name):
    """A tokenizer with a template out of TRL, which has those of many models, and each of its marks as a token."""
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    marks = set(re.findall(r"<\|[^<>|\s'\"]+\|?>|<(?:start|end)_of_turn>|<[｜|][^>]{1,30}[｜|]>", template))
    tokenizer = chat_tokenizer(template, more=tuple(sorted(marks - set(CHAT_TOKENS))))
    tokenizer.bos_token = "<pad>"
    return tokenizer


# Row → the end of the prompt, and what is trained on behind it.
WRITTEN = {
    # The generation prompt opens a thought; a finished answer has an empty one, whose tokens would merge otherwise.
    ("qwen3_5_think", "plain"): ("assistant\n<think>\n", "\n</think>\n\nA1<|im_end|>\n"),
    ("qwen3_5_think", "thought"): ("assistant\n<think>\n", "R1\n</think>\n\nA1<|im_end|>\n"),
    ("qwen3_5_think", "off"): ("<think>\n\n</think>\n\n", "A1<|im_end|>\n"),
    ("qwen3_5_nothink", "plain"): ("<think>\n\n</think>\n\n", "A1<|im_end|>\n"),
    # This one reads thoughts under a key of their own, and doubles those in the content.
    ("qwen3_8", "thought"): ("assistant\n<think>\n", "R1\n</think>\n\nA1<|im_end|>\n"),
    ("qwen3", "plain"): ("assistant\n", "<think>\n\n</think>\n\nA1<|im_end|>\n"),
    ("qwen3", "thought"): ("assistant\n", "<think>\nR1\n</think>\n\nA1<|im_end|>\n"),
    ("qwen3", "off"): ("<think>\n\n</think>\n\n", "A1<|im_end|>\n"),
    # These leave the thought out of a finished answer.
    ("deepseek_r1_distill", "thought"): ("<think>\n", "R1\n</think>\n\nA1<｜end▁of▁sentence｜>"),
    ("deepseek_r1_distill", "plain"): ("<think>\n", "</think>\n\nA1<｜end▁of▁sentence｜>"),
    ("deepseek_r1_distill", "apart"): ("<think>\n", "R1\n</think>\n\nA1<｜end▁of▁sentence｜>"),
    ("nemotron_3_nano", "plain"): ("<think>\n", "</think>A1<|im_end|>\n"),
    ("gptoss", "plain"): ("<|start|>assistant", "<|channel|>final<|message|>A1<|return|>"),
    ("gemma3", "plain"): ("<start_of_turn>model\n", "A1<end_of_turn>\n"),
    ("llama3_1", "plain"): ("<|end_header_id|>\n\n", "A1<|eot_id|>"),
    # Messages are lists of blocks there.
    ("smolvlm", "plain"): ("Assistant:", " A1<end_of_utterance>\n"),
}


@pytest.mark.parametrize(("template", "row"), WRITTEN)
def test_a_row_is_trained_on_behind_the_prompt_that_generation_sees(template, row):
    tokenizer = of_library(template)
    completion = {"thought": THOUGHT, "apart": [{**ANSWER[0], "reasoning_content": "R1"}]}.get(row, ANSWER)
    turns = {"prompt": [user("Q1")], "completion": completion}
    turns |= {"chat_template_kwargs": OFF} if row == "off" else {}
    ids, n_prompt = encode(turns, tokenizer)
    assert ids[:n_prompt] == prompt_ids(turns, tokenizer)
    prompt, answer = tokenizer.decode(ids[:n_prompt]), tokenizer.decode(ids[n_prompt:])
    ends, written = WRITTEN[template, row]
    assert "Q1" in prompt
    assert prompt.endswith(ends)
    assert answer == written


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "gptoss", "llama3_1", "glm4moe", "gemma4"])
def test_tools_and_several_turns_keep_the_prompt(name):
    tokenizer, tools = of_library(name), [tool("look", {"x": {"type": "integer"}})]
    asked = [user("Q1"), call("look", {"x": 1}), {"role": "tool", "name": "look", "content": "7"}]
    for prompt, completion in (
        ([user("Q1")], [call("look", {"x": 1})]),
        (asked, ANSWER),
        ([user("Q0"), *THOUGHT, user("Q1")], ANSWER),
    ):
        row = {"prompt": prompt, "completion": completion, "tools": tools}
        ids, n_prompt = encode(row, tokenizer)
        assert ids[:n_prompt] == prompt_ids(row, tokenizer)
        shown, answer = tokenizer.decode(ids[:n_prompt]), tokenizer.decode(ids[n_prompt:])
        assert "look" in shown
        assert ("look" in answer) == (completion is not ANSWER)
        assert prompt_ids({**row, "tools": json.dumps(tools)}, tokenizer) == ids[:n_prompt]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_5_think", "llama3_1", "gptoss", "glm4moe", "gemma4"])
def test_arguments_may_be_json_text(name):
    """OpenAI's form; most templates wrote a quoted string of it, or refused it."""
    tokenizer, given = of_library(name), {"city": "Oslo", "deep": {"k": [1, 2]}}
    rows = [{"prompt": [user("Q")], "completion": [call("look", form)], "tools": [tool("look", {})]}
            for form in (given, json.dumps(given))]  # fmt: skip
    assert encode(rows[0], tokenizer) == encode(rows[1], tokenizer)
    assert "Oslo" in tokenizer.decode(encode(rows[1], tokenizer)[0])


def test_a_template_that_wants_text_gets_text():
    rows = [{"prompt": [user("Q")], "completion": [call("look", form)]} for form in ({"x": 1}, '{"x": 1}')]
    for row in rows:
        ids, n_prompt = encode(row, of_library("deepseekv3"))
        assert '{"x": 1}' in of_library("deepseekv3").decode(ids[n_prompt:])


def test_what_a_template_cannot_write_is_refused():
    """By name and in one line: a thought that the prompt has closed, a dropped call, a role."""
    closed = {"id": "7", "prompt": [user("Q")], "completion": THOUGHT, "chat_template_kwargs": OFF}
    with pytest.raises(InputError, match=r"row 7: its answer holds a thought.*enable_thinking: true"):
        encode(closed, of_library("qwen3_5_think"))
    assert encode({**closed, "chat_template_kwargs": ON}, of_library("qwen3_5_think"))
    with pytest.raises(InputError, match="row 7: the chat template does not write its call of 'look'"):
        encode({"id": "7", "prompt": [user("Q")], "completion": [call("look", {})]}, of_library("phi3"))
    # The words of an answer are no call.
    worded = [{**call("look", {}), "content": "I look"}]
    with pytest.raises(InputError, match="row 7: the chat template does not write its call of 'look'"):
        encode({"id": "7", "prompt": [user("Q")], "completion": [*ANSWER, user("Q"), *worded]}, of_library("phi3"))
    system = {"role": "system", "content": "S"}
    with pytest.raises(InputError, match="row 7: the chat template refuses its messages: System role not supported"):
        encode({"id": "7", "prompt": [system, user("Q")], "completion": ANSWER}, of_library("gemma"))
    counted = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    with pytest.raises(InputError, match="row 7: the chat template writes the prompt differently"):
        encode({"id": "7", "prompt": [user("Q")], "completion": ANSWER}, chat_tokenizer(counted))


def test_thoughts_of_several_turns_are_written_once():
    tools = [tool("look", {"x": {"type": "integer"}})]
    thinking = {**call("look", {"x": 1}), "content": "<think>\nR0\n</think>\n\n"}
    completion = [thinking, {"role": "tool", "name": "look", "content": "7"}, *THOUGHT]
    tokenizer = of_library("qwen3_8")
    ids, n_prompt = encode({"prompt": [user("Q")], "completion": completion, "tools": tools}, tokenizer)
    assert tokenizer.decode(ids[:n_prompt]).endswith("<think>\n")
    answer = tokenizer.decode(ids[n_prompt:])
    assert answer.startswith("R0\n</think>\n\n<tool_call>")
    assert answer.endswith("assistant\n<think>\nR1\n</think>\n\nA1<|im_end|>\n")
    assert answer.count("<think>") == 1
    # In the prompt too.
    asked = prompt_ids({"prompt": [user("Q0"), *THOUGHT, user("Q1")]}, tokenizer)
    assert "assistant\n<think>\nR1\n</think>\n\nA1<|im_end|>" in tokenizer.decode(asked)


@pytest.mark.parametrize(
    ("template", "completion", "says"),
    [
        ("gemma3", [{**ANSWER[0], "reasoning_content": "R1"}], "an answer's thought"),
        ("llama3_1", [{**call("look", {}), "content": "Wait."}], "words beside a tool call"),
        # It ends no turn, though what begins the next stops generation.
        ("glm4moe", ANSWER, "no row teaches the model to stop"),
        ("plain", "A1", "rows have `tools`, which a plain prompt does not write"),
    ],
)
def test_what_a_template_leaves_out_of_an_answer_is_said(template, completion, says, caplog):
    tokens = lorapar.data.tokens
    for warning in (tokens._warn_of_loss, tokens._warn_of_end, tokens._warn_of_tools):
        warning.cache_clear()
    plain, row = template == "plain", {"completion": completion, "tools": [tool("look", {})]}
    tokenizer = chat_tokenizer() if plain else of_library(template)
    encode({**row, "prompt": "Q1" if plain else [user("Q1")]}, tokenizer)
    assert says in caplog.text


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"tools": "look"}, "column 'tools': got 'look', expected JSON text, or its value"),
        ({"tools": tool("look", {})}, "column 'tools': got .*, expected a list of tools"),
        ({"tools": [1]}, "column 'tools': got 1, expected a list of tools"),
        ({"chat_template_kwargs": "[1]"}, r"column 'chat_template_kwargs': got \[1\], expected an object"),
        ({"chat_template_kwargs": {"tokenize": True}}, "column 'chat_template_kwargs': 'tokenize' is no variable"),
        ({"chat_template_kwargs": {"continue_final_message": True}}, "'continue_final_message' is no variable"),
        ({"completion": "A1"}, "must both be text, or both be lists of messages; got list and 'A1'"),
        ({"completion": None}, "must both be text, or both be lists of messages; got list and None"),
        ({"completion": []}, r"must both be text, or both be lists of messages; got list and \[\]"),
    ],
)
def test_columns_that_no_template_takes_are_refused_by_name(columns, says):
    with pytest.raises(InputError, match=f"row 7: .*{says}"):
        encode({"id": "7", "prompt": [user("Q")], "completion": ANSWER, **columns}, of_library("qwen3"))


def test_tools_may_be_json_text_each_and_an_empty_cell_is_none():
    tokenizer, tools = of_library("qwen3"), [tool("look", {"x": {"type": "integer"}})]
    row = {"prompt": [user("Q")], "completion": ANSWER}
    listed = encode({**row, "tools": tools}, tokenizer)
    assert encode({**row, "tools": [json.dumps(tools[0])]}, tokenizer) == listed
    for empty in (None, "", " ", "null", float("nan"), []):
        assert encode({**row, "tools": empty, "chat_template_kwargs": empty or None}, tokenizer) == encode(
            row, tokenizer
        )


def test_a_plain_prompt_does_not_end_with_a_token_that_the_tokenizer_adds():
    tokenizer = chat_tokenizer(eos="<eos>")
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    assert tokenizer("a")["input_ids"][-1] == 1
    ids, n_prompt = encode({"prompt": "ab", "completion": "c"}, tokenizer)
    assert (len(ids), n_prompt, ids.count(1)) == (4, 2, 1)


def test_an_answer_has_no_space_that_sentencepiece_begins_a_text_with():
    """A prompt that ends with a space: its last token merges with the answer's first, so they are tokenized apart."""
    letters = {letter: i for i, letter in enumerate(["<unk>", "<eos>", "<0x0A>", "▁", *"abcdQ:\n", "▁a", "▁ab", "ab"])}
    merges = [("▁", "a"), ("a", "b"), ("▁", "ab")]
    built = Tokenizer(models.BPE(vocab=letters, merges=merges, unk_token="<unk>"))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<eos>")
    ids, n_prompt = encode({"prompt": "Q: ", "completion": "ab"}, tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids[:n_prompt]) == ["▁", "Q", ":", "▁"]
    assert tokenizer.convert_ids_to_tokens(ids[n_prompt:]) == ["ab", "<eos>"]


# Through the stages


def rows_with_tools(count=28):
    """Each row has tools and arguments of its own schema, the rows of System 1 no thinking."""
    rows = []
    for i in range(count):
        named = {"x": i} if i % 3 == 0 else {"city": "Oslo", "deep": {"k": [1, "a"]}} if i % 3 == 1 else {"x": "a"}
        history = [call(f"f{i % 3}", named), {"role": "tool", "name": f"f{i % 3}", "content": "7"}]
        rows.append(
            {
                "messages": [
                    *([{"role": "system", "content": "Be brief."}] if i % 4 == 0 else []),
                    user(f"Do {i}"),
                    *(history if i % 2 else []),
                    {"role": "assistant", "content": str(i)},
                ],
                "answer": str(i),
                "tools": [tool(f"f{i % 3}", {f"p{i % 3}": {"type": "integer"}})],
                "sys": 1 + i % 2,
                **({} if i % 2 else {"chat_template_kwargs": OFF}),
            }
        )
    return rows


def spied(monkeypatch):
    """{stage: every list of ids that it took}, filled while a run goes on."""
    seen: dict[str, list[list[int]]] = {stage: [] for stage in ("score", "sft", "grpo", "evaluate")}
    read, init = lorapar.scoring.score.read_examples, PartitionedSFTTrainer.__init__
    roll, answer = PartitionedGRPOTrainer._generate_single_turn, lorapar.evaluating.evaluate.answer_greedily

    def score(*args, **kwargs):
        examples = read(*args, **kwargs)
        seen["score"] += [example.ids for example in examples]
        return examples

    def sft(self, *args, **kwargs):
        init(self, *args, **kwargs)
        seen["sft"] += list(self.train_dataset["input_ids"])

    def grpo(self, prompts, *args, **kwargs):
        seen["grpo"] += prompts
        return roll(self, prompts, *args, **kwargs)

    def evaluate(model, tokenizer, ids, *args, **kwargs):
        seen["evaluate"] += ids
        return answer(model, tokenizer, ids, *args, **kwargs)

    monkeypatch.setattr(lorapar.scoring.score, "read_examples", score)
    monkeypatch.setattr(PartitionedSFTTrainer, "__init__", sft)
    monkeypatch.setattr(PartitionedGRPOTrainer, "_generate_single_turn", grpo)
    monkeypatch.setattr(lorapar.evaluating.evaluate, "answer_greedily", evaluate)
    return seen


def run_recipe(folder, tokenizer, rows, **sections):
    model = folder / "model"
    tiny_model(vocabulary=len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = recipe_values(model)
    values["data"] = {"sources": [str(folder / "rows.jsonl")], "held_out": 6}
    values["label"] = {"column": "sys"}
    values["score"]["max_length"] = 4096
    for stage, steps in (("sft", 2), ("grpo", 2)):
        values[stage] |= {"max_steps": steps, "save_strategy": "no"}
    values["sft"]["max_length"] = None
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    return write_recipe(folder / "recipe.yaml", values)


@pytest.mark.slow
def test_every_stage_takes_the_same_tokens(tmp_path, monkeypatch):
    seen = spied(monkeypatch)
    model = {"name": str(tmp_path / "model"), "dtype": "float32", "eos_token": "<|im_end|>"}
    rows = rows_with_tools()
    recipe = run_recipe(tmp_path, of_library("qwen3_5_think"), rows, export={"merged": True}, model=model)
    succeeds("run", recipe, "--output_dir", tmp_path / "run")
    lines = (tmp_path / "run" / "labels.jsonl").read_text(encoding="utf-8").splitlines()
    # By what was exported, loaded as anybody would.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "merged")
    assert tokenizer.eos_token == "<|im_end|>"
    wholes, prompts = {1: [], 2: []}, {"train": [], "held_out": []}
    for row in map(json.loads, lines):
        ids, n_prompt = encode(row, tokenizer)
        wholes[row["system"]] += [ids] if row["split"] == "train" else []
        prompts[row["split"]] += [ids[:n_prompt]]
    assert sorted(seen["sft"]) == sorted(wholes[1])
    assert len(seen["score"]) == 16
    assert all(ids in wholes[1] + wholes[2] for ids in seen["score"])
    assert len(seen["grpo"]) > 0
    assert all(ids in prompts["train"] for ids in seen["grpo"])
    assert sorted(seen["evaluate"]) == sorted(prompts["held_out"] * 3)
    texts = [tokenizer.decode(ids) for stage in seen.values() for ids in stage]
    assert not any("null" in text or "None" in text for text in texts)
    assert all("<tools>" in text for text in texts)
    assert {"<think>\n\n</think>" in text for text in map(tokenizer.decode, wholes[1])} == {True}
    card = (tmp_path / "run" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert tokenizer.decode(prompt_ids({"prompt": [user("What is 2 + 3?")]}, tokenizer)) in card
    stops = json.loads((tmp_path / "run" / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert set(tokenizer.convert_ids_to_tokens(stops)) == {"<|im_end|>", "<eos>"}


def test_template_and_tokens_of_the_section_model_hold_everywhere(tmp_path):
    """A template in place of the tokenizer's own, its variables set, and other tokens, in what is saved too."""
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    tiny_model(vocabulary=len(tokenizer)).save_pretrained(tmp_path)
    template = tmp_path / "mine.jinja"
    shown = "assistant\n{{ [nothing, some] | tojson }}{{ mood }}{%"
    template.write_text(CHATML.replace("assistant\n{%", shown).replace("{% for", "\n  {% for", 1))
    values = {"mood": 'calm "quotes"', "nothing": None, "some": [1, {"a": True}]}
    given = ModelConfig(str(tmp_path), chat_template=str(template), chat_template_kwargs=values,
                        eos_token="<|im_end|>", pad_token="<|endoftext|>")  # fmt: skip
    made = load_tokenizer(given)
    made.save_pretrained(tmp_path / "saved")
    for each in (made, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert (each.eos_token, each.pad_token) == ("<|im_end|>", "<|endoftext|>")
        row = {"prompt": [user("Q")]}
        plain = chat_tokenizer(template.read_text())
        expected = prompt_ids({**row, "chat_template_kwargs": values}, plain)
        assert prompt_ids(row, each) == expected
        assert each.decode(expected).endswith('[null, [1, {"a": true}]]calm "quotes"')
        # A row's own win.
        assert each.decode(prompt_ids({**row, "chat_template_kwargs": {"mood": "mad"}}, each)).endswith("mad")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"eos_token": "<|imend|>"}, "model.eos_token: got '<|imend|>', which is no token of .* nearest: <|im_end|>"),
        ({"pad_token": "nothing"}, "model.pad_token: got 'nothing'"),
        ({"pad_token": "<new>"}, "model.pad_token: the token '<new>' .263. is none of the model's 263"),
        ({"eos_token": "<new>"}, "model.eos_token: the token '<new>' .263. is none of the model's 263"),
        ({"chat_template": "mine.txt"}, "model.chat_template: got 'mine.txt', expected a .jinja file"),
        ({"chat_template": "gone.jinja"}, "gone.jinja: no such file"),
        ({"chat_template": "{{ broken"}, "model.chat_template: does not write a question and its answer"),
        (
            {"chat_template": "<new>" + CHATML},
            "model.chat_template: the token '<new>' .263. is none of the model's 263",
        ),
        ({"chat_template_kwargs": {"a b": 1}}, "model.chat_template_kwargs: 'a b' is no variable .* it reads none"),
        # Given by transformers, or set by the template: a default would never hold.
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "'add_generation_prompt' is no variable"),
        ({"chat_template_kwargs": {"m": 1}}, "'m' is no variable"),
        (
            {"chat_template": "{{ enable_thinking }}" + CHATML, "chat_template_kwargs": {"enable_thinkin": 1}},
            "'enable_thinkin' is no variable that the chat template reads; nearest: enable_thinking",
        ),
    ],
)
def test_unusable_tokens_and_templates_are_refused(tmp_path, keys, says):
    tokenizer = chat_tokenizer()
    tiny_model(vocabulary=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=says.replace("|", r"\|")):
        load_tokenizer(ModelConfig(str(tmp_path), **keys))


def test_a_row_with_a_token_that_the_model_lacks_is_refused_by_every_stage(tmp_path):
    tokenizer = chat_tokenizer()
    model = lorapar.attach(tiny_model(vocabulary=len(tokenizer)), config(), start="twin")
    tokenizer.add_tokens(["<new>"])
    made = random_partition(model, 0.4)
    rows = [{"id": f"r{i}", "prompt": [user("a<new>")], "completion": ANSWER, "answer": "1"} for i in range(8)]
    data = Dataset.from_list(rows)
    says = r"row r0: the token '<new>' \(263\) is none of the model's 263"
    for stage in (
        lambda: lorapar.score(model, tokenizer, rows),
        lambda: lorapar.sft(model, tokenizer, data, made, sft_config(tmp_path)),
        lambda: lorapar.grpo(model, tokenizer, data, made, grpo_config(tmp_path), [letters]),
        lambda: lorapar.evaluate(model, tokenizer, rows),
    ):
        with pytest.raises(InputError, match=says):
            stage()


@pytest.mark.parametrize(
    ("stage", "key", "value", "remedy"),
    [
        ("sft", "eos_token", "<|im_end|>", "model.eos_token"),
        ("sft", "pad_token", "<pad>", "model.pad_token"),
        ("sft", "chat_template_path", "mine.jinja", "model.chat_template"),
        ("sft", "assistant_only_loss", True, "leave it out"),
        ("sft", "model_init_kwargs", {"dtype": "float16"}, "the section model"),
        ("grpo", "chat_template_kwargs", OFF, "model.chat_template_kwargs"),
        ("grpo", "generation_kwargs", {"eos_token_id": 2}, "model.eos_token"),
        ("grpo", "generation_kwargs", {"ignore_eos": True}, "model.eos_token"),
    ],
)
def test_the_trainers_keys_for_one_stage_alone_are_refused(changed_recipe, stage, key, value, remedy):
    refused("plan", changed_recipe(**{stage: {key: value}}), says=(f"{stage}.{key}", remedy))
    made = {"sft": sft_config, "grpo": grpo_config}[stage]("out", **{key: value})
    model = lorapar.attach(tiny_model(), config(), start="twin")
    arguments = model, chat_tokenizer(), Dataset.from_list([{"prompt": "a", "completion": "b"}]), None, made
    with pytest.raises(InputError, match=f"{stage}.{key}"):
        lorapar.sft(*arguments) if stage == "sft" else lorapar.grpo(*arguments, [letters])


def test_messages_are_a_prompt_and_the_last_answer(tmp_path):
    """In scoring, SFT and evaluation alike, and as in a source's rows."""
    tokenizer = chat_tokenizer()
    model = lorapar.attach(tiny_model(vocabulary=len(tokenizer)), config(), start="twin")
    rows = [{"messages": [user("Q"), *ANSWER, user("Thanks")], "answer": "1"}]
    expected = encode({"prompt": [user("Q")], "completion": ANSWER}, tokenizer)
    assert encode(rows[0], tokenizer) == expected
    assert [e.ids for e in lorapar.scoring.batches.read_examples(rows, tokenizer, None)] == [expected[0]]
    assert prompt_ids(rows[0], tokenizer) == expected[0][: expected[1]]
    trainer, _ = lorapar.sft(
        model, tokenizer, Dataset.from_list(rows), random_partition(model, 0.4), sft_config(tmp_path, max_steps=1)
    )
    assert trainer.train_dataset["input_ids"][:] == [expected[0]]
    for row, says in (
        ({"messages": [user("Q")]}, "row 7: expected a prompt of at least one message, then an assistant's"),
        ({"messages": ANSWER}, "row 7: expected a prompt of at least one message, then an assistant's"),
        ({"prompt": [user("Q")], "completion": [user("A")]}, "row 7: expected a prompt of at least one message"),
        ({"prompt": [user("Q")]}, "row 7: no completion; a row holds"),
    ):
        with pytest.raises(InputError, match=says):
            encode({"id": "7", **row}, tokenizer)


# Where an answer ends


@pytest.mark.parametrize(
    ("eos", "of_model", "expected"),
    [
        # A ChatML base model, whose EOS ends a document and not a turn.
        ("<|endoftext|>", 260, ["<|endoftext|>", "<|im_end|>"]),
        ("<|im_end|>", 260, ["<|im_end|>", "<|endoftext|>"]),
        ("<|im_end|>", [260, 1], ["<|im_end|>", "<|endoftext|>", "<eos>"]),
        ("<|endoftext|>", None, ["<|endoftext|>", "<|im_end|>"]),
    ],
)
def test_the_stop_tokens_are_those_of_tokenizer_model_and_template(eos, of_model, expected):
    tokenizer, model = chat_tokenizer(eos=eos), tiny_model(vocabulary=263)
    model.generation_config.eos_token_id = of_model
    assert tokenizer.convert_ids_to_tokens(stop_tokens(model, tokenizer)) == expected


@pytest.mark.parametrize(
    ("template", "token"),
    [("gptoss", "<|return|>"), ("phi3", "<|end|>"), ("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>"),
     # It ends no last turn; the next one's beginning ends one.
     ("glm4moe", "<|user|>")],
)  # fmt: skip
def test_the_end_of_a_turn_is_found_in_the_template(template, token):
    tokenizer = of_library(template)
    assert tokenizer.convert_ids_to_tokens(turn_end_token(tokenizer)) == token


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n### End<|im_end|>{% endfor %}",
        # It asks for a system turn.
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML,
    ],
)
def test_the_end_of_a_turn_is_found_behind_words_and_a_system_turn(template):
    tokenizer = chat_tokenizer(template)
    assert tokenizer.convert_ids_to_tokens(turn_end_token(tokenizer)) == "<|im_end|>"


def test_the_end_of_a_turn_follows_a_changed_eos_token():
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}")
    assert turn_end(tokenizer) == "<|endoftext|>"
    tokenizer.eos_token = "<|im_end|>"
    assert turn_end(tokenizer) == "<|im_end|>"


def test_text_is_no_stop_token():
    lines = chat_tokenizer("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    assert turn_end(lines).startswith("\nuser: ")
    assert turn_end_token(lines) is None
    lines.chat_template = None
    assert turn_end_token(lines) is None


def saying(token):
    """A model that says `token` at every position."""
    model = tiny_model(vocabulary=263)
    with torch.no_grad():
        model.get_input_embeddings().weight += 3.0
        model.get_output_embeddings().weight[token] = 1.0
    return model


def test_rollouts_and_evaluation_end_with_the_turn(tmp_path):
    """Both ran on to their limit behind the end of the turn where the tokenizer's EOS is another token."""
    tokenizer, end = chat_tokenizer(), 259
    base = saying(end)
    lengths = []
    generate = base.generate

    def counted(**kwargs):
        out = generate(**kwargs)
        lengths.append(out.shape[1] - kwargs["input_ids"].shape[1])
        return out

    base.generate = counted
    rows = [{"prompt": [user(f"{i}+1=")], "answer": "1"} for i in range(4)]
    assert lorapar.evaluate(base, tokenizer, rows, max_new_tokens=8)["answers"][0]["completion"] == ""
    assert lengths == [1]
    del base.generate
    model = lorapar.attach(base, config(), start="twin")
    made = random_partition(model, 0.4)
    settings = grpo_config(tmp_path, max_steps=1, mask_truncated_completions=True)
    rewards = [lambda completions, **_: [float(i) for i in range(len(completions))]]
    data = Dataset.from_list(rows)
    trainer, trained = lorapar.grpo(model, tokenizer, data, made, settings, rewards, longest_first=False)
    assert end in trainer.eos_token_ids
    logged = trained.history[0]
    assert (logged["completions/max_length"], logged["completions/clipped_ratio"]) == (1, 0)


@pytest.mark.parametrize("chat", [True, False])
def test_rewards_do_not_see_what_ends_an_answer(tmp_path, chat):
    """Decoding leaves out special tokens alone, and the end of a turn need not be one."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(CHAT_TOKENS), special_tokens=False)
    tokenizer.chat_template = CHATML if chat else None
    end, seen = 259, []
    base = saying(end)
    base.generation_config.eos_token_id = [1, end]
    tokenizer.pad_token = None
    rows = [{"prompt": [user(f"{i}+1=")] if chat else f"{i}+1=", "answer": "1"} for i in range(4)]
    rows[0]["prompt"] = [user("longer")] if chat else "longer"
    assert {a["completion"] for a in lorapar.evaluate(base, tokenizer, rows, max_new_tokens=4)["answers"]} == {""}

    def reward(completions, **_):
        seen.extend(completions)
        return [0.0 for _ in completions]

    model = lorapar.attach(base, config(), start="twin")
    tokenizer.pad_token = "<pad>"
    settings = grpo_config(tmp_path, max_steps=1)
    lorapar.grpo(model, tokenizer, Dataset.from_list(rows), random_partition(model, 0.4), settings, [reward])
    assert seen
    assert all((made[0]["content"] if chat else made) == "" for made in seen)


# What a table does to rows


def test_objects_stay_as_they_were_in_a_data_set():
    """Arrow gives every object the keys of all others, as nulls, and refuses keys of two types."""
    rows = [
        {"id": "a", "prompt": [call("f", {"x": 1})], "meta": {"x": 1}, "tags": [1, "b"], "n": 1, "source": "s"},
        {"id": "b", "prompt": [user("q")], "meta": {"x": "a", "none": None}, "tags": [], "n": 2, "source": "s"},
        {"id": "c", "prompt": [call("f", {"city": "Oslo"})], "meta": None, "tags": None, "n": None, "source": "s"},
    ]
    made = to_dataset(rows)
    assert list(made) == rows
    assert made.select([2])[0] == rows[2]
    assert made.features["n"].dtype == "int64"


@pytest.mark.parametrize(
    "values",
    [
        [["1", 2], ["null"]],
        [{"x": 1}, "x", "1"],
        [[{"x": 1}], '[{"x": 1}]'],
        [[[1], ["a"]], [[]], None],
        [{}, {"a": 0.1 + 0.2, "b": 1e-7, "ü": "\u2028"}],
    ],
)
def test_text_that_is_json_itself_stays_text(values):
    """`datasets` takes such a text in a column of JSON for what it says."""
    rows = [{"id": str(i), "value": value, "source": "s"} for i, value in enumerate(values)]
    assert list(to_dataset(rows)) == rows


def test_an_older_files_nulls_are_left_out(tmp_path):
    """Every call's arguments had the keys of all others'; a null of one's own, in a file of today, stays."""
    facts = {"answer": "1", "split": "train", "source": "s", "system": 1, "completion": ANSWER}
    asked = {**call("f", {"x": 1, "city": None}), "name": None}
    old = {"id": "a", "prompt": [asked], "tools": [tool("f", {"x": None})], **facts}
    new = {"id": "a", "prompt": [call("f", {"city": None})], "tools": [tool("f", {"x": None})], **facts}
    path = tmp_path / "labels.jsonl"
    for row in (old, new):
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        assert ("null" in json.dumps(load_labels(path)[0])) == (row is new)


def test_a_parquet_files_nulls_are_left_out(tmp_path):
    rows = [{"messages": [user("q"), call("f", args)], "tools": [tool("f", {name: {"type": "string"}})], "answer": "1"}
            for name, args in (("x", {"x": "1"}), ("city", {"city": "Oslo"}))]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    source = lorapar.recipe.sections.SourceConfig(str(tmp_path / "rows.parquet"))
    read = [row for _, row in lorapar.data.sources.read_source(source)]
    assert "null" not in json.dumps(read)
    assert [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in read] == [
        {"x": "1"},
        {"city": "Oslo"},
    ]


def test_a_callers_data_set_is_read_without_arrows_nulls(tmp_path):
    tokenizer = of_library("qwen3")
    rows = [{"id": str(i), "prompt": [user("q"), call("f", args), {"role": "tool", "name": "f", "content": "7"}],
             "completion": ANSWER, "answer": "1", "tools": [tool("f", {name: {"type": "string"}})]}
            for i, (name, args) in enumerate([("x", {"x": "1"}), ("city", {"city": "Oslo"})])]  # fmt: skip
    table = Dataset.from_list(rows)
    assert table[0]["tools"] != rows[0]["tools"]
    model = lorapar.attach(tiny_model(vocabulary=len(tokenizer)), config(), start="twin")
    expected = [encode(row, tokenizer)[0] for row in rows]
    assert [e.ids for e in lorapar.scoring.batches.read_examples(table, tokenizer, None)] == expected
    settings = sft_config(tmp_path, max_steps=1, max_length=None)
    trainer, _ = lorapar.sft(model, tokenizer, table, random_partition(model, 0.4), settings)
    assert trainer.train_dataset["input_ids"][:] == expected


def test_a_folder_made_before_these_keys_still_holds(changed_recipe, tiny_folder, monkeypatch):
    """A fingerprint has the keys only where they are set, and then the file's content too."""
    from lorapar.pipeline.order import stages_of
    from lorapar.recipe.reading import load_recipe
    from lorapar.stage import Run

    taken = []
    monkeypatch.setattr(records, "sha256_json", lambda inputs: taken.append(inputs) or "x")
    template = tiny_folder.parent / "t.jinja"
    for home in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(home, str(tiny_folder.parent))
    for keys in ({}, {"chat_template": "~/t.jinja"}, {"chat_template": "~/t.jinja"}):
        template.write_text(CHATML + " " * len(taken))
        recipe = load_recipe(changed_recipe(model={"name": str(tiny_folder), **keys}))
        records.fingerprint(stages_of(recipe)[0], Run(recipe, tiny_folder))
    assert set(taken[0]["model"]) == {"name", "dtype", "revision", "trust_remote_code", "device", "attn_implementation"}
    assert "chat_template" not in taken[0]
    assert taken[1]["chat_template"] != taken[2]["chat_template"]
