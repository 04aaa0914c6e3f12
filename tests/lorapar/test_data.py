"""Every form of row, the split by content, and `encode` held equal to TRL's own preparation."""

import json
import os
from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorapar.data.rows import load_rows
from lorapar.data.tokens import encode, prompt_ids
from lorapar.errors import InputError
from lorapar.model.load import load_tokenizer
from lorapar.recipe.sections import DataConfig, ModelConfig, SourceConfig

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE over a few words, with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["What is the answer to the question? The answer is 42."] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


@pytest.fixture
def plain_tokenizer(tokenizer):
    class Plain:
        chat_template = None
        eos_token = tokenizer.eos_token

        def __call__(self, text):
            return tokenizer(text)

    return Plain()


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(tokenizer, *sources, **settings):
    sources = [source if isinstance(source, SourceConfig) else SourceConfig(str(source)) for source in sources]
    return load_rows(DataConfig(sources, **{"held_out": 0, **settings}), tokenizer)


def load_error(tokenizer, *sources, **settings):
    with pytest.raises(InputError) as caught:
        load(tokenizer, *sources, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Forms

QUESTIONS = [{"prompt": f"Add {i} and 1", "completion": str(i + 1), "level": i} for i in range(20)]


def test_prompt_completion_as_text_becomes_a_chat(tmp_path, tokenizer, plain_tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", QUESTIONS)
    row = load(tokenizer, path)[0][3]
    assert row["prompt"] == [{"role": "user", "content": "Add 3 and 1"}]
    assert row["completion"] == [{"role": "assistant", "content": "4"}]
    assert (row["answer"], row["level"], row["split"], row["source"]) == ("4", 3, "train", path)
    assert len(row["id"]) == 16
    for form in (load(tokenizer, path, chat=False), load(plain_tokenizer, path)):
        assert (form[0][3]["prompt"], form[0][3]["completion"]) == ("Add 3 and 1", "4")
        assert form[0][3]["id"] == row["id"]


def test_messages_and_conversational_prompt_completion(tmp_path, tokenizer, plain_tokenizer):
    user, reply = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
    more = [{"role": "user", "content": "and 3 + 3?"}, {"role": "assistant", "content": r"It is \boxed{6}."}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [user, reply, *more], "text": "kept"}])
    row = load(tokenizer, path)[0][0]
    assert row["prompt"] == [user, reply, more[0]]
    assert (row["completion"], row["answer"]) == ([more[1]], "6")
    # TRL would put the EOS token on a column called "text".
    assert row["original_text"] == "kept"
    assert not {"text", "messages"} & set(row)
    path = write_jsonl(tmp_path / "b.jsonl", [{"prompt": [user], "completion": [reply]}])
    row = load(tokenizer, path, prompt="{prompt} Number only.", system_prompt="Be short.")[0][0]
    assert [turn["content"] for turn in row["prompt"]] == ["Be short.", "2 + 2? Number only."]
    assert "chat: false does not allow" in load_error(plain_tokenizer, path)
    path = write_jsonl(tmp_path / "c.jsonl", [{"messages": [user]}])
    assert "row 1: column 'messages' has no assistant's turn after a prompt" in load_error(tokenizer, path)


def test_question_and_worked_answer(tmp_path, tokenizer):
    worked = "He buys 4*3 = <<4*3=12>>12 apples.\nHe has 12/2 = $<<12/2=6>>6 left.\n#### 1,006"
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "How many?", "answer": worked}])
    row = load(tokenizer, path, chat=False)[0][0]
    assert row["completion"] == "He buys 4*3 = 12 apples.\nHe has 12/2 = $6 left.\n#### 1,006"
    assert (row["answer"], row["question"]) == ("1,006", "How many?")


def test_an_answer_is_mapped_or_marked_or_short_or_counted_as_missing(tmp_path, tokenizer):
    rows = [
        {"prompt": "a", "completion": "long " * 30, "gold": 7},
        {"prompt": "b", "completion": "long " * 30 + "#### 8", "gold": None},
        {"prompt": "c", "completion": "short", "gold": ""},
        {"prompt": "d", "completion": "long " * 30, "gold": None},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", [{**row, "gold": row["gold"] and str(row["gold"])} for row in rows])
    loaded, report = load(tokenizer, path, columns={"answer": "gold"})
    assert loaded["answer"] == ["7", "8", "short", ""]
    assert report[path]["no_answer"] == 1


def test_columns_are_mapped_and_missing_ones_named(tmp_path, tokenizer):
    path = tmp_path / "rows.csv"
    path.write_text('\ufeffproblem,solution,persona,id\n"What, is 1+1?",2,You are terse.,x7\n', encoding="utf-8")
    columns = {"prompt": "problem", "completion": "solution", "system": "persona"}
    row = load(tokenizer, path, columns=columns)[0][0]
    assert [turn["content"] for turn in row["prompt"]] == ["You are terse.", "What, is 1+1?"]
    assert (row["answer"], row["original_id"]) == ("2", "x7")
    there = "problem, solution, persona, id"
    assert f"has no column 'problm'; it has {there}" in load_error(tokenizer, path, columns={"prompt": "problm"})
    assert "unknown key 'promt'; allowed: prompt" in load_error(tokenizer, path, columns={"promt": "problem"})


def test_the_template_takes_other_columns_and_keeps_the_ids(tmp_path, tokenizer):
    rows = [{"prompt": "Who?", "completion": "x", "context": context} for context in ("Anna {ran}", "Bob sat")]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    loaded, report = load(tokenizer, path, prompt="{context}\n{prompt}", chat=False)
    assert loaded["prompt"] == ["Anna {ran}\nWho?", "Bob sat\nWho?"]
    assert report[path]["duplicates"] == 0
    # Without the column that tells the two apart they are one question.
    assert load(tokenizer, path)[1][path]["duplicates"] == 1
    # The same fields in other words around them: the same rows.
    assert load(tokenizer, path, prompt="Read: {context}. {prompt}")[0]["id"] == loaded["id"]
    assert "names {contxt}" in load_error(tokenizer, path, prompt="{contxt}{prompt}")
    assert "is no template" in load_error(tokenizer, path, prompt="{prompt")


def test_files_of_every_form_hold_the_same_rows(tmp_path, tokenizer):
    # U+2028 ends a line for str.splitlines(), not for JSON lines; the last line is blank.
    rows = [{"prompt": "a\u2028b", "completion": "c"}, {"prompt": "d", "completion": "e"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write("\n")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text("prompt,completion\na\u2028b,c\nd,e\n", encoding="utf-8")
    for name in ("rows.jsonl", "rows.json", "rows.parquet", "rows.csv"):
        loaded, _ = load(tokenizer, tmp_path / name, chat=False)
        assert loaded["prompt"] == ["a\u2028b", "d"], name
        assert loaded["completion"] == ["c", "e"], name


def test_a_hub_data_set_is_asked_for_by_name_config_and_split(tokenizer, monkeypatch):
    asked = []

    def load_dataset(repository, configuration, split):
        asked.append((repository, configuration, split))
        if split == "gone":
            raise ValueError("Unknown split 'gone'.\nShould be one of ['train']")
        return Dataset.from_list(QUESTIONS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    loaded, report = load(tokenizer, "owner/rows", SourceConfig("owner/rows:main", split="test", held_out=True))
    assert asked == [("owner/rows", None, "train"), ("owner/rows", "main", "test")]
    assert (len(loaded), report["owner/rows:main"]["held_out"]) == (20, 20)
    error = load_error(tokenizer, SourceConfig("owner/rows", split="gone"))
    assert "'owner/rows' (split 'gone') could not be read from the hub: Unknown split" in error


def test_unusable_sources_are_named(tmp_path, tokenizer):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": ')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 cut off")
    (tmp_path / "bad.csv").write_text("prompt,completion\na\n")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text('{"prompt": "a", "completion": " "}\n')
    (tmp_path / "rows.txt").write_text("a")
    for name, message in [
        ("bad.jsonl", "line 2 is corrupt or truncated JSON"),
        ("bad.parquet", "corrupt or truncated parquet"),
        ("bad.csv", "row 1 has another number of fields than the header"),
        ("list.jsonl", "row 1 is not an object"),
        ("empty.jsonl", "has no rows"),
        ("blank.jsonl", "row 1: column 'completion' is empty"),
        ("rows.txt", "not a data file; allowed: .jsonl, .json, .csv, .parquet"),
        ("missing.jsonl", "no such file"),
    ]:
        error = load_error(tokenizer, tmp_path / name)
        assert message in error
        assert name in error
    assert "is no file" in load_error(tokenizer, "what is this?")
    assert "at least one source" in load_error(tokenizer)
    path = write_jsonl(tmp_path / "rows.jsonl", QUESTIONS)
    other = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "p", "completion": "c", "level": "high"}])
    assert "column 'level' is int in" in load_error(tokenizer, path, other)
    assert "no chat template; allowed: false" in load_error(type("T", (), {"chat_template": None})(), path, chat=True)


# Split


def test_duplicates_go_across_sources_and_whole_held_out_sources_win(tmp_path, tokenizer):
    first = write_jsonl(tmp_path / "first.jsonl", [*QUESTIONS, {**QUESTIONS[4], "prompt": "  ADD 4\nand 1 "}])
    second = write_jsonl(tmp_path / "second.jsonl", [QUESTIONS[0], {"prompt": "new", "completion": "x", "level": 0}])
    loaded, report = load(tokenizer, first, SourceConfig(second, held_out=True), held_out=5)
    assert report[first] == dict(read=21, duplicates=2, too_long=0, train=14, held_out=5, no_answer=0)
    assert report[second] == dict(read=2, duplicates=0, too_long=0, train=0, held_out=2, no_answer=0)
    assert len(set(loaded["id"])) == len(loaded) == 21
    split = {row["prompt"][0]["content"]: row["split"] for row in loaded}
    assert split["Add 0 and 1"] == split["new"] == "held_out"


def test_the_split_depends_on_content_and_seed_not_on_order(tmp_path, tokenizer):
    def held_out(path, **settings):
        return {row["id"] for row in load(tokenizer, path, held_out=0.25, **settings)[0] if row["split"] == "held_out"}

    there = write_jsonl(tmp_path / "there.jsonl", QUESTIONS)
    back = write_jsonl(tmp_path / "back.jsonl", QUESTIONS[::-1])
    assert len(held_out(there)) == 5
    assert held_out(there) == held_out(back) == held_out(there, prompt="{prompt} - in one word")
    assert held_out(there) != held_out(there, seed=1)
    assert "21 rows of" in load_error(tokenizer, there, held_out=21)
    assert "must lie in [0, 1]" in load_error(tokenizer, there, held_out=1.5)


def test_prompts_over_the_limit_are_left_out_and_counted(tmp_path, tokenizer):
    rows = [*QUESTIONS[:3], {"prompt": "question " * 50, "completion": "x", "level": 9}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    longest = len(tokenizer.apply_chat_template([{"role": "user", "content": "Add 2 and 1"}], return_dict=False)) + 9
    loaded, report = load(tokenizer, path, max_prompt_length=longest)
    assert (len(loaded), report[path]["too_long"], report[path]["train"]) == (3, 1, 3)
    assert loaded[2]["prompt"][0]["content"] == "Add 2 and 1"
    assert "max_prompt_length: 2 tokens leave no row" in load_error(tokenizer, path, max_prompt_length=2)


def test_size_keeps_the_first_rows_and_a_name_twice_is_told_apart(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", QUESTIONS)
    loaded, report = load(tokenizer, SourceConfig(path, size=2), SourceConfig(path, size=3))
    assert list(report) == [path, f"{path} (2)"]
    assert report[f"{path} (2)"]["duplicates"] == 2
    assert set(loaded["source"]) == set(report)
    assert "at least 1, got 0" in load_error(tokenizer, SourceConfig(path, size=0))


def test_reasoning_gym_rows_and_their_overlapping_seeds(tokenizer):
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}

    def source(name="reasoning_gym:chain_sum", **settings):
        return SourceConfig(name, **{"size": 50, "config": options, **settings})

    loaded, report = load(tokenizer, source(), source(seed=10, held_out=True), chat=False)
    # 40 of the second's 50 rows are the first's, and two-term one-digit sums repeat besides.
    assert report["reasoning_gym:chain_sum (2)"]["train"] == 0
    assert sum(counts["duplicates"] for counts in report.values()) >= 40
    assert len(set(loaded["id"])) == len(loaded)
    row = loaded[0]
    assert eval(row["prompt"].split(":")[-1].strip(" =.?")) == int(row["answer"])
    assert row["completion"] == row["answer"]
    assert json.loads(row["metadata"])["source_dataset"] == row["task"] == "chain_sum"
    both = SourceConfig("reasoning_gym:chain_sum,gcd", size=7, config={"chain_sum": options})
    assert load(tokenizer, both)[0]["task"].count("chain_sum") == 4
    assert "no task 'chain_sums'; nearest: chain_sum" in load_error(tokenizer, source("reasoning_gym:chain_sums"))
    assert "'min_term' is no option of chain_sum; allowed:" in load_error(tokenizer, source(config={"min_term": 2}))
    assert "min_terms must be positive" in load_error(tokenizer, source(config={"min_terms": 0}))


def test_a_missing_package_names_its_extra(tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    error = load_error(tokenizer, "reasoning_gym:chain_sum")
    assert "pip install 'lorapar[quickstart]'" in error


@pytest.mark.skipif("LORAPAR_GSM8K" not in os.environ, reason="LORAPAR_GSM8K does not name a folder with GSM8K")
def test_gsm8k_reads_whole(plain_tokenizer):
    folder = Path(os.environ["LORAPAR_GSM8K"])
    sources = [
        SourceConfig(str(folder / "train.jsonl")),
        SourceConfig(str(folder / "test.jsonl"), held_out=True),
    ]
    loaded, report = load(plain_tokenizer, *sources)
    assert [sum(counts[key] for counts in report.values()) for key in ("read", "no_answer")] == [8792, 0]
    assert not any("<<" in text for text in loaded["completion"])
    assert all(answer.replace(",", "").lstrip("-").replace(".", "").isdigit() for answer in loaded["answer"])


# Tokens

PLAIN = [
    {"prompt": "What is the answer? ", "completion": "42"},
    {"prompt": "What is the ans", "completion": "wer? 42"},  # a token across the boundary
    {"prompt": "Ends itself: ", "completion": "42<|im_end|>"},
]
CHATS = [
    {
        "prompt": [{"role": "user", "content": "What?"}],
        "completion": [{"role": "assistant", "content": "42"}],
    },
    {
        "prompt": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "What is 6 * 7?"},
            {"role": "assistant", "content": "42"},
            {"role": "user", "content": "And 7 * 6?"},
        ],
        "completion": [{"role": "assistant", "content": "The same,\n42."}],
    },
]


def assert_encode_equals_trl(tokenizer, rows, folder):
    from trl import SFTConfig, SFTTrainer

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    settings = SFTConfig(output_dir=str(folder), max_length=None, report_to="none", bf16=False, use_cpu=True)
    data = Dataset.from_list([{**row, "id": str(i), "answer": "42"} for i, row in enumerate(rows)])
    trainer = SFTTrainer(LlamaForCausalLM(config), settings, train_dataset=data, processing_class=tokenizer)
    prepared = {row["id"]: row for row in trainer.train_dataset}
    assert len(prepared) == len(rows)
    for row in data:
        ids, n_prompt = encode(row, tokenizer)
        theirs = prepared[row["id"]]
        assert ids[:n_prompt] == prompt_ids(row, tokenizer)
        assert tokenizer.decode(ids) == tokenizer.decode(theirs["input_ids"])
        assert 0 < n_prompt < len(ids)
        if ids != theirs["input_ids"]:
            # TRL leaves out the end of a prompt whose tokens merge with the completion's beginning.
            assert theirs["input_ids"][:n_prompt] != ids[:n_prompt]
            continue
        assert [int(label != -100) for label in theirs["labels"]] == [0] * n_prompt + [1] * (len(ids) - n_prompt)


@pytest.mark.parametrize("rows", [PLAIN, CHATS], ids=["plain", "chat"])
def test_encode_is_what_trl_prepares(tokenizer, rows, tmp_path):
    assert_encode_equals_trl(tokenizer, rows, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [PLAIN, CHATS], ids=["plain", "chat"])
def test_encode_is_what_trl_prepares_for_smollm2(rows, tmp_path):
    assert_encode_equals_trl(load_tokenizer(ModelConfig("smollm2-135m")), rows, tmp_path)


def test_encode_ends_plain_text_with_one_eos(tokenizer):
    for row in PLAIN:
        ids, n_prompt = encode(row, tokenizer)
        assert ids.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(ids) == row["prompt"] + row["completion"].removesuffix("<|im_end|>") + "<|im_end|>"
        assert tokenizer.decode(ids[n_prompt:]).endswith("42<|im_end|>")


def test_encode_refuses_a_row_without_completion_tokens(tokenizer):
    chat = {"prompt": CHATS[0]["prompt"], "completion": [{"role": "assistant", "content": ""}]}
    for row in ({"prompt": "a", "completion": ""}, {"prompt": "a", "completion": "<|im_end|>"}, chat):
        with pytest.raises(InputError, match="row 00ff: the completion has no tokens"):
            encode({"id": "00ff", **row}, tokenizer)
