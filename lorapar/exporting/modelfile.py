"""Ollama's Modelfile (ollama/ollama, docs/modelfile.mdx): which GGUF, the prompt's form, what ends an answer.

Ollama writes prompts by a template of Go's text/template (docs/template.mdx), models come with one of Jinja's. Ours is
read off what the model's own writes around made-up messages, and kept where it then writes other conversations as the
model's own does.
"""

import itertools
import logging
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from ..files import write_text
from .gguf_tokenizer import adds

log = logging.getLogger("lorapar")
Messages = list[dict[str, str]]
# Conversations of every form, which Ollama hands a template: turns in order, at most one system message, at the start.
# It drops the oldest turns of a conversation that is too long for the context, so an answer may come first.
FORMS = (
    ("user",), ("system", "user"), ("user", "assistant", "user"), ("system", "user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"), ("assistant", "user"),
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """How training asked: `chat`, by the chat template, or in plain text; `system`: the prompt before every question;
    `question`: what a question was put into, with {prompt} in its place."""

    chat: bool = True
    system: str | None = None
    question: str = "{prompt}"


@dataclass(frozen=True)
class Pieces:
    """What a chat template writes around the contents of messages."""

    before_system: str
    behind_system: str  # up to the first user's content, or, where `headed`, to what stands before it
    without_system: str  # likewise, where no message is the system's
    before_user: str  # of every user, or, unless `headed`, of every user but the first
    behind_user: str
    before_assistant: str
    behind_assistant: str
    answer: str  # what asks for an answer
    # Whether the first user's turn begins as the others do. If not (Llama 2: the system prompt stands within it), it
    # begins with what is the system's.
    headed: bool

    def write(self, messages: Messages) -> str:
        """The prompt of a conversation as the Go template writes it."""
        system = "\n\n".join(one["content"] for one in messages if one["role"] == "system")
        head = f"{self.before_system}{system}{self.behind_system}" if system else self.without_system
        text, first = head if self.headed else "", not self.headed
        for one in messages:
            if one["role"] == "user":
                text += (head if first else self.before_user) + one["content"] + self.behind_user
                first = False
            elif one["role"] == "assistant":
                text += self.before_assistant + one["content"] + self.behind_assistant
        return text + self.answer

    def as_go(self) -> str:
        """The same as a template of Go's, of Ollama's variables."""
        at = {name: _literal(text) for name, text in vars(self).items() if isinstance(text, str)}
        # Within `range .Messages` a dot is the message, and $ what it was outside.
        head = (
            f"{{{{ if $.System }}}}{at['before_system']}{{{{ $.System }}}}{at['behind_system']}"
            f"{{{{ else }}}}{at['without_system']}{{{{ end }}}}"
        )
        if self.headed:
            start, before_user = head, at["before_user"]
        else:
            start = "{{ $first := true }}"
            before_user = (
                f"{{{{ if $first }}}}{{{{ $first = false }}}}{head}{{{{ else }}}}{at['before_user']}{{{{ end }}}}"
            )
        user = f"{before_user}{{{{ .Content }}}}{at['behind_user']}"
        assistant = f"{at['before_assistant']}{{{{ .Content }}}}{at['behind_assistant']}"
        return (
            f"{start}{{{{ range .Messages }}}}"
            f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}'
            f"{{{{ end }}}}{at['answer']}"
        )


def _literal(text: str) -> str:
    """Text outside of actions. Braces that would open one, or join those of the action behind them, are strings."""
    return re.sub(r"\{{2,}|\{$", r'{{ "\g<0>" }}', text)


def chat_pieces(tokenizer: Any) -> Pieces | None:
    """What the chat template writes around messages, without the BOS that the tokenizer adds by itself.

    None where there is no template, and where it is of no form that `Pieces` writes.
    """
    if tokenizer.chat_template is None:
        return None
    try:
        pieces = _read_off(tokenizer)
        for number, roles in enumerate(FORMS):
            messages = _conversation(roles, number)
            try:
                wanted = _rendered(tokenizer, messages, strftime_now=_on_another_day)
            except TemplateError:
                # Many refuse a conversation that an answer begins: there is nothing then to write it like.
                if roles[0] == "assistant":
                    continue
                raise
            if pieces.write(messages) != wanted:
                return None
    except (TemplateError, ValueError, TypeError, KeyError):
        return None
    return pieces


def _conversation(roles: tuple[str, ...], number: int) -> Messages:
    # Braces, quotes and line ends within, as contents have them; no space around, which some templates take away.
    return [
        {"role": role, "content": f"a {number}.{i} {{{{ \"b\" }}}}\n\n'c' é {role}"} for i, role in enumerate(roles)
    ]


def _on_another_day(form: str) -> str:
    """For a chat template that writes today's date, which would stand in a Modelfile for ever."""
    return datetime(1999, 12, 31, 23, 59, 58).strftime(form)


def _rendered(tokenizer: Any, messages: Messages, ask: bool = True, **variables: Any) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask, **variables)
    return text.removeprefix(tokenizer.bos_token) if adds(tokenizer)[0] else text


def say_bos(tokenizer: Any, asked: Asked) -> None:
    """A line in the log where the tokenizer puts its BOS before a text, and training's prompts began without one."""
    if not adds(tokenizer)[0]:
        return
    written = ""
    if asked.chat and tokenizer.chat_template is not None:
        written = tokenizer.apply_chat_template(_conversation(("user",), 0), tokenize=False, add_generation_prompt=True)
    if not written.startswith(tokenizer.bos_token):
        log.warning(
            "export: gguf: llama.cpp and Ollama put %s before every prompt, as the tokenizer does before a text; the "
            "prompts of training began without it", tokenizer.bos_token,
        )  # fmt: skip


def _read_off(tokenizer: Any) -> Pieces:
    """The pieces by what stands around made-up contents; ValueError where one is not found as it was given."""

    def parts(roles: tuple[str, ...], ask: bool = True) -> list[str]:
        # No content is part of another.
        contents = [f"LORA-PAR-{role}-{i}-" for i, role in enumerate(roles)]
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
        rest, found = _rendered(tokenizer, messages, ask), []
        for content in contents:
            before, found_it, rest = rest.partition(content)
            if not found_it:
                raise ValueError(content)
            found.append(before)
        return [*found, rest]

    without_system, to_answer = parts(("user",))
    before_system, behind_system, _ = parts(("system", "user"))
    _, to_assistant, to_user, _ = parts(("user", "assistant", "user"))
    try:
        to_first_answer = parts(("assistant", "user"))[0]
    except TemplateError:
        # Many refuse it. Then a question ends as it does where nothing is asked for.
        to_first_answer = to_assistant.removeprefix(parts(("user",), ask=False)[-1])
    # A turn begins with what stands before it wherever it stands.
    before_user, before_assistant = _shared_end(to_user, without_system), _shared_end(to_assistant, to_first_answer)
    behind_user, behind_assistant = to_assistant.removesuffix(before_assistant), to_user.removesuffix(before_user)
    headed = behind_system.endswith(before_user)
    header = before_user if headed else ""
    return Pieces(
        before_system=before_system,
        behind_system=behind_system.removesuffix(header),
        without_system=without_system.removesuffix(header),
        before_user=before_user,
        behind_user=behind_user,
        before_assistant=before_assistant,
        behind_assistant=behind_assistant,
        answer=to_answer.removeprefix(behind_user),
        headed=headed,
    )


def _shared_end(one: str, other: str) -> str:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(other)))
    return "".join(letter for letter, _ in same)[::-1]


# Of a model that was asked in plain text: as data/tokens.py puts a system prompt before a question there.
PLAIN = "{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}"


def write_modelfile(path: Path, base: str, adapter: str | None, tokenizer: Any, stops: list[int], asked: Asked) -> None:
    """Write a Modelfile.

    Args:
        base, adapter: paths of GGUF files, absolute or from the Modelfile's folder. stops: the ids that end an answer.
    """
    lines = [f"FROM {base}"]
    if asked.question != "{prompt}":
        put = asked.question.splitlines()
        lines = ["# The model was trained with each question put as:", *(f"# {line}" for line in put), *lines]
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    template = PLAIN
    if asked.chat and tokenizer.chat_template is not None:
        pieces = chat_pieces(tokenizer)
        template = None if pieces is None else pieces.as_go()
    if template is not None and _holds(template):
        lines.append(f'TEMPLATE """{template}"""')
    else:
        log.warning("export: gguf: %s has no TEMPLATE: the chat template cannot be written as one of Go's; Ollama "
                    "looks for one of its own that resembles it", path.name)  # fmt: skip
    if asked.system is not None and _holds(asked.system):
        lines.append(f'SYSTEM """{asked.system}"""')
    elif asked.system is not None:
        log.warning("export: gguf: %s has no SYSTEM: a Modelfile cannot hold data.system_prompt", path.name)
    texts = [str(tokenizer.convert_ids_to_tokens(stop)) for stop in stops]
    lines += [f'PARAMETER stop "{text}"' for text in texts if _holds(text) and '"' not in text]
    # As evaluated: the most likely token each time.
    lines.append("PARAMETER temperature 0")
    write_text(path, "\n".join(lines) + "\n")


def _holds(text: str) -> bool:
    """Whether a Modelfile gives the text back: its parser drops what is not printable, and `\"""` would end it."""
    return '"""' not in text and all(letter.isprintable() or letter in "\t\n" for letter in text)
