"""Ollama's Modelfiles by its documented grammar, and its template beside the model's own, on conversations of any form.

The grammar is that of ollama/ollama docs/modelfile.mdx, and `go_template` evaluates the constructs of Go's
text/template that a Modelfile of ours uses, and no others.
"""

import itertools
import logging
import re
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lorapar.exporting.gguf import FILES, export_gguf
from lorapar.exporting.modelfile import Asked, chat_pieces, say_bos, write_modelfile
from lorapar.model.load import load_tokenizer
from lorapar.model.locate import resolve
from lorapar.recipe.sections import ModelConfig
from tests.lorapar import ggufs
from tests.lorapar.test_gguf import fields, tensors
from tests.tiny import CHATML, chat_tokenizer

DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + CHATML.removeprefix("{% for m in messages %}")
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set head = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set head = '' %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ (head if loop.first else '') + m['content'] }} "
    "[/INST]{% else %} {{ m['content'] }}<|endoftext|>{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
# Whose generation prompt is always there.
BRACES = (
    "{% for m in messages %}{{ '{' }}{{ m['role'] }}: {{ '{{' }}{{ m['content'] }}{{ '}}' }}\n{% endfor %}"
    "{{ '{' }}assistant: {{ '{{' }}"
)
TEMPLATES = {"ChatML": CHATML, "with a default system prompt": DEFAULT_SYSTEM, "Llama 2": LLAMA_2, "Llama 3": LLAMA_3,
             "braces": BRACES}  # fmt: skip
# Ollama drops the oldest turns of one that is too long, so an answer may come first.
CUT = [[("assistant", "b"), ("user", "c")], [("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]]
CONVERSATIONS = CUT + [
    [*([("system", "Be brief.\nAnd { \"kind\" }.")] if system else []), *turns]
    for system in (False, True)
    for turns in ([("user", "2 + 3?")], [("user", "{{ .System }}"), ("assistant", "5\n"), ("user", "'ü' \"x\"?")],
                  [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")])
]  # fmt: skip


# Go's text/template


def go_template(text: str, system: str, messages: list[dict[str, str]], **more: str) -> str:
    """What Ollama writes. `.System`, `.Messages`, `.Prompt`, `.Role`, `.Content`, `$.System`; if, else, range, eq, and
    variables."""
    # Text and actions in turn; a string within an action may hold braces.
    parts = re.split(r'\{\{((?:[^"}]|"[^"]*")*)\}\}', text)
    nodes, rest = _parse(iter(enumerate(parts)), ())
    assert rest is None
    scope = {"$": {"System": system, "Messages": messages, **more}}
    return _run(nodes, scope["$"], scope)


def _parse(parts, ends):
    """(nodes up to an action that begins with one of `ends`, that action)"""
    nodes = []
    for number, part in parts:
        if number % 2 == 0:
            nodes.append(("text", part))
            continue
        words = re.findall(r'"[^"]*"|\S+', part)
        if words[0] in ("end", "else"):
            assert words[0] in ends, f"{{{{{part}}}}} ends nothing"
            return nodes, words
        if words[0] in ("if", "range"):
            branches, condition = [], words[1:]
            inner, end = _parse(parts, ("end", "else"))
            branches.append((condition, inner))
            while end[0] == "else":
                condition = end[2:] if end[1:2] == ["if"] else ["true"]
                inner, end = _parse(parts, ("end", "else"))
                branches.append((condition, inner))
            nodes.append((words[0], branches))
        else:
            nodes.append(("action", words))
    assert not ends, "an action is not ended"
    return nodes, None


def _value(word, dot, scope):
    if word.startswith('"'):
        return word[1:-1]
    if word in ("true", "false"):
        return word == "true"
    if word.startswith("$."):
        return scope["$"][word[2:]]
    if word.startswith("."):
        return dot[word[1:]]
    return scope[word]


def _condition(words, dot, scope):
    if words[0] == "eq":
        return _value(words[1], dot, scope) == _value(words[2], dot, scope)
    (word,) = words
    return bool(_value(word, dot, scope))


def _run(nodes, dot, scope):
    out = ""
    for kind, content in nodes:
        if kind == "text":
            out += content
        elif kind == "if":
            taken = next((inner for words, inner in content if _condition(words, dot, scope)), [])
            out += _run(taken, dot, scope)
        elif kind == "range":
            ((words, inner),) = content
            for item in _value(words[0], dot, scope):
                out += _run(inner, item, scope)
        elif content[1:2] in ([":="], ["="]):
            assert (content[1] == "=") == (content[0] in scope)
            scope[content[0]] = _value(content[2], dot, scope)
        else:
            (word,) = content
            out += str(_value(word, dot, scope))
    return out


def test_the_evaluator_is_go_s(tmp_path):
    """Held against Go's own text/template where Go is installed."""
    for name, template in TEMPLATES.items():
        tokenizer = tokenizer_of(template)
        pieces = chat_pieces(tokenizer)
        assert pieces is not None, name
        for number, turns in enumerate(CONVERSATIONS):
            (tmp_path / f"{name}.{number}.template").write_text(pieces.as_go())
            (tmp_path / f"{name}.{number}.turns").write_text("\x00".join(itertools.chain(*turns)))
    try:
        (tmp_path / "main.go").write_text(GO)
        subprocess.run(["go", "run", "main.go"], cwd=tmp_path, check=True, timeout=300)
    except FileNotFoundError:
        pytest.skip("Go is not installed")
    for name, template in TEMPLATES.items():
        text = chat_pieces(tokenizer_of(template)).as_go()
        for number, turns in enumerate(CONVERSATIONS):
            got = (tmp_path / f"{name}.{number}.template.out").read_text()
            assert got == rendered_by_ollama(text, turns), name


GO = """package main

import (
	"os"
	"path/filepath"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

func main() {
	paths, _ := filepath.Glob("*.template")
	for _, path := range paths {
		text, _ := os.ReadFile(path)
		turns, _ := os.ReadFile(strings.TrimSuffix(path, "template") + "turns")
		words := strings.Split(string(turns), "\\x00")
		var messages []*message
		system := ""
		for i := 0; i < len(words); i += 2 {
			messages = append(messages, &message{words[i], words[i+1]})
			if words[i] == "system" {
				system = words[i+1]
			}
		}
		made := template.Must(template.New("").Option("missingkey=zero").Parse(string(text)))
		out, _ := os.Create(path + ".out")
		values := map[string]any{"System": system, "Messages": messages, "Response": ""}
		if err := made.Execute(out, values); err != nil {
			panic(err)
		}
	}
}
"""


def tokenizer_of(template):
    tokenizer = chat_tokenizer(template)
    tokenizer.bos_token = "<|endoftext|>"
    return tokenizer


def rendered_by_ollama(template, turns):
    """As ollama/ollama template/template.go: the system's contents apart, and every message in the list."""
    system = "\n\n".join(content for role, content in turns if role == "system")
    return go_template(template, system, [{"Role": role, "Content": content} for role, content in turns])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_the_template_writes_what_the_model_s_own_writes(name, number):
    tokenizer, turns = tokenizer_of(TEMPLATES[name]), CONVERSATIONS[number]
    messages = [{"role": role, "content": content} for role, content in turns]
    wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if name == "Llama 3":
        wanted = wanted.replace("5\n<", "5<")  # it takes away space around contents, which Go's cannot
        turns = [(role, content.strip()) for role, content in turns]
    assert rendered_by_ollama(chat_pieces(tokenizer).as_go(), turns) == wanted


def test_the_bos_that_the_tokenizer_adds_is_left_to_it():
    """Ollama tokenizes the prompt with the GGUF's add_bos_token, and two of them would be another prompt."""
    tokenizer = ggufs.tokenizer_of("llama-bpe")
    tokenizer.chat_template = "{{ bos_token }}" + CHATML.replace("<|im_start|>", "<")
    assert chat_pieces(tokenizer).write([{"role": "user", "content": "a"}]).startswith("<user\na")
    plain = tokenizer_of(LLAMA_3)
    assert chat_pieces(plain).write([{"role": "user", "content": "a"}]).startswith("<|endoftext|><|im_start|>user\n\na")


REFUSES = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}"


def test_a_conversation_that_an_answer_begins_has_no_header_too_many():
    turns = [{"role": role, "content": content} for role, content in CUT[0]]
    wanted = "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    # Also where the model's own template refuses one.
    for template in (CHATML, REFUSES + CHATML):
        pieces = chat_pieces(tokenizer_of(template))
        assert pieces.write(turns) == wanted
        assert rendered_by_ollama(pieces.as_go(), CUT[0]) == wanted
    assert chat_pieces(tokenizer_of(LLAMA_2)).write(turns) == " b<|endoftext|>[INST] c [/INST]"
    assert chat_pieces(tokenizer_of(REFUSES + LLAMA_2)) is not None


@pytest.mark.parametrize("today", ["{{ strftime_now('%d %b %Y') }}\n", "{{ strftime_now('%H:%M:%S') }}"])
def test_the_date_of_the_export_is_not_written_into_a_template(today, tmp_path, caplog):
    assert chat_pieces(tokenizer_of(f"26 Jul 2024\n{CHATML}")) is not None
    tokenizer = tokenizer_of(today + CHATML)
    assert chat_pieces(tokenizer) is None
    with caplog.at_level(logging.WARNING, "lorapar"):
        write_modelfile(tmp_path / "Modelfile", "./m.gguf", None, tokenizer, [1], Asked())
    assert "no TEMPLATE" in caplog.text


def test_a_bos_that_training_did_not_have_is_said(caplog):
    tokenizer = ggufs.tokenizer_of("llama-bpe")
    with caplog.at_level(logging.WARNING, "lorapar"):
        say_bos(tokenizer, Asked())  # ChatML's first token is this one's BOS
        say_bos(ggufs.tokenizer_of("gpt-2"), Asked(chat=False))
        assert not caplog.records
        say_bos(tokenizer, Asked(chat=False))
    assert "put <|im_start|> before every prompt" in caplog.text


@pytest.mark.parametrize(
    "template",
    [
        # Nothing of the system; another form by the number of turns; contents changed; a fault.
        CHATML.replace(
            "{% for", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{% for", 1
        ),
        CHATML + "{{ messages | length }}",
        CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper }}"),
        "{{ nothing.of.this }}",
        CHATML.replace("{{ m['role'] }}", "{{ m['role'] if loop.index < 4 else 'x' }}"),
    ],
)
def test_a_template_of_another_form_is_left_out_and_said(template, tmp_path, caplog):
    tokenizer = tokenizer_of(template)
    assert chat_pieces(tokenizer) is None
    with caplog.at_level(logging.WARNING, "lorapar"):
        write_modelfile(tmp_path / "Modelfile", "./m.gguf", None, tokenizer, [1], Asked())
    assert caplog.text.count("no TEMPLATE") == 1
    assert [name for name, _ in parse(tmp_path / "Modelfile")] == ["from", "parameter", "parameter"]


# The Modelfile


def parse(path: Path) -> list[tuple[str, str]]:
    """[(instruction, argument)] by the documented grammar; an argument in three quotes, or in one, may span lines."""
    text, found = path.read_text(), []
    pattern = re.compile(r'[ \t]*(\w+)[ \t]+("""(.*?)"""|"([^"]*)"|[^\n]*)[ \t]*(?:\n|$)', re.DOTALL)
    while text.strip():
        if text.lstrip().startswith("#"):
            text = text.lstrip().partition("\n")[2]
            continue
        text = text.lstrip("\n")
        match = pattern.match(text)
        assert match, text
        name, argument = match[1].lower(), match[2]
        assert name in ("from", "adapter", "template", "system", "parameter", "license", "message", "requires")
        if match[3] is not None or match[4] is not None:
            argument = match[3] if match[3] is not None else match[4]
        found.append((name, argument))
        text = text[match.end() :]
    return found


def parameters(path):
    found = [tuple(argument.split(" ", 1)) for name, argument in parse(path) if name == "parameter"]
    return [(name, value.strip('"')) for name, value in found]


def test_both_modelfiles_name_files_that_are_there(tmp_path):
    folder = ggufs.save(tmp_path / "model")
    model, tokenizer = ggufs.moved(folder), AutoTokenizer.from_pretrained(folder)
    system = 'Be brief.\n\nSay "5".'
    export_gguf(model, tokenizer, tmp_path, ["adapter", "f16", "q8_0", "base"], asked=Asked(system=system))
    files = tmp_path / "gguf"
    whole, added = parse(files / "Modelfile"), parse(files / "Modelfile.adapter")
    assert whole[0] == ("from", "./model-q8_0.gguf")
    assert added[:2] == [("from", "./base-f16.gguf"), ("adapter", "./adapter.gguf")]
    for name, argument in (*whole, *added):
        if name in ("from", "adapter"):
            assert (files / argument).read_bytes()[:4] == b"GGUF"
    assert whole[1:] == added[2:]
    said = dict(whole)
    assert said["system"] == system
    assert said["template"] == chat_pieces(tokenizer).as_go()
    assert parameters(files / "Modelfile") == [("stop", "<|im_end|>"), ("temperature", "0")]


def test_the_modelfiles_are_those_of_what_was_asked_for(tmp_path, caplog):
    folder = ggufs.save(tmp_path / "model")
    model, tokenizer = ggufs.moved(folder), AutoTokenizer.from_pretrained(folder)

    def made(forms, **keys):
        export_gguf(model, tokenizer, tmp_path, forms, **keys)
        return {path.name: dict(parse(path)) for path in (tmp_path / "gguf").glob("Modelfile*")}

    assert made(["f16"])["Modelfile"]["from"] == "./model-f16.gguf"
    assert made(["base"]) == {}
    with caplog.at_level(logging.INFO, "lorapar"):
        assert made(["adapter"]) == {}
    assert "add base to export.gguf" in caplog.text
    given = tmp_path / "a base.gguf"
    assert made(["adapter"], base_file=given)["Modelfile.adapter"]["from"] == str(given)
    assert "system" not in made(["f16"])["Modelfile"]


def test_a_base_given_as_gguf_is_what_the_adapter_s_modelfile_names(tmp_path, monkeypatch):
    """And the adapter is in the layout of its rows: on the file's own weights, it gives the merged ones."""
    monkeypatch.setenv("LORAPAR_CACHE", str(tmp_path / "cache"))
    folder = ggufs.save(tmp_path / "model")
    export_gguf(ggufs.moved(folder), AutoTokenizer.from_pretrained(folder), tmp_path, ["base"])
    file = (tmp_path / "gguf" / "base-f16.gguf").rename(tmp_path / "base.gguf")
    model, tokenizer = ggufs.moved(resolve(str(file))), load_tokenizer(ModelConfig(name=str(file)))
    export_gguf(model, tokenizer, tmp_path, ["adapter", "f16"], base_file=file)
    assert dict(parse(tmp_path / "gguf" / "Modelfile.adapter"))["from"] == str(file)
    made = tmp_path / "gguf"
    base, adapter, merged = map(tensors, (file, made / FILES["adapter"], made / FILES["f16"]))
    alpha = fields(tmp_path / "gguf" / FILES["adapter"])["adapter.lora.alpha"]
    for name in ("blk.0.attn_q.weight", "blk.1.attn_k.weight", "blk.1.ffn_up.weight"):
        a, b = adapter[f"{name}.lora_a"], adapter[f"{name}.lora_b"]
        # The folder holds the file's weights in bf16, and the merged ones are f16.
        torch.testing.assert_close(base[name] + alpha / len(a) * b @ a, merged[name], rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("text", ['a """ b', "a\u00a0b", "a\x00b"])
def test_what_a_modelfile_cannot_hold_is_left_out_and_said(text, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "lorapar"):
        write_modelfile(tmp_path / "Modelfile", "./m.gguf", None, tokenizer_of(CHATML), [], Asked(system=text))
    assert "has no SYSTEM" in caplog.text
    assert "system" not in dict(parse(tmp_path / "Modelfile"))
    write_modelfile(tmp_path / "Modelfile", "./m.gguf", None, tokenizer_of(f"{text}{CHATML}"), [], Asked())
    assert "has no TEMPLATE" in caplog.text


@pytest.mark.parametrize("kind", ["llama", "gpt-2"])
def test_a_model_that_was_asked_in_plain_text_is_asked_so(kind, tmp_path):
    tokenizer, path = ggufs.tokenizer_of(kind), tmp_path / "Modelfile"
    asked = Asked(chat=False, question="Q: {prompt}\nA:")
    write_modelfile(path, "./m.gguf", None, tokenizer, [2, 1], asked)
    names = tokenizer.convert_ids_to_tokens([2, 1])
    (template, *rest) = parse(path)[1:]
    assert rest == [*(("parameter", f'stop "{name}"') for name in names), ("parameter", "temperature 0")]
    assert template[0] == "template"
    nodes = template[1]
    assert go_template(nodes, "", [], Prompt="2 + 3?") == "2 + 3?"
    assert go_template(nodes, "Be brief.", [], Prompt="2 + 3?") == "Be brief.\n\n2 + 3?"
    assert path.read_text().splitlines()[1:3] == ["# Q: {prompt}", "# A:"]
