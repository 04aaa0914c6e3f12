"""`lorapar chat`: the base and each stage's result of a run, asked the same questions side by side."""

import contextlib
import io
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import set_seed

from ..data.tokens import prompt_ids
from ..errors import InputError, StageFailed, require
from ..logs import calm_libraries
from ..pipeline.order import stages_of
from ..pipeline.records import records, why_another
from ..pipeline.running import finished_run
from ..recipe.sections import Recipe
from ..stage import weights_of
from .asking import Conversation, checked, notes, titles
from .columns import Screen, painted, shown, unpainted, wrapped, write
from .models import Models

HELP = """\
/reset   begin a new conversation
/quit    end (as Ctrl-D does)
/help    this
Ctrl-C stops the answers, and the question is forgotten; twice, it ends the program.
A question that begins with / is asked with a space before it.
"""


def chat_verb(recipe: Recipe, once: str | None, max_new_tokens: str | None, temperature: str | None) -> int:
    """Ask the run's models what `once` says, or what is typed until that ends. Returns the exit status.

    once: a question, or "-": the whole of stdin is one; None: every line of stdin is a question. max_new_tokens: of an
    answer at most; None: evaluate's. temperature: answers are drawn at it; None: the most likely token, as evaluate.

    On a terminal the answers grow side by side; anywhere else, and with `once`, each is printed when all are done: its
    title on a line of its own, the answer's lines indented by two spaces, an empty line between. Nothing is written
    into the run's folder. The status is 130 after a Ctrl-C that ends it, else 0.
    Raises InputError for unusable arguments, and for a run without a trained stage.
    """
    new = recipe.evaluate.max_new_tokens if max_new_tokens is None else _whole(max_new_tokens)
    drawn_at = None if temperature is None else _above_zero(temperature)
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no UTF-8 become surrogates, which `checked` refuses in a line.
        sys.stdin.reconfigure(errors="surrogateescape")
    question = None if once is None else checked(sys.stdin.read() if once == "-" else once, "--once")
    try:
        with calm_libraries():
            talk = _open(recipe, new, drawn_at)
            for note in notes(recipe.data.prompt, talk.is_chat):
                print(f"lorapar: {note}", file=sys.stderr)
            if question is not None:
                _print_plainly(talk, talk.ask(question, lambda _: None))
            else:
                _converse(talk)
    except KeyboardInterrupt as stopped:
        # What SIGTERM and SIGHUP raise is a kind of its own. After Ctrl-C there is nothing that could be resumed.
        if type(stopped) is not KeyboardInterrupt:
            raise
        return 130
    return 0


def _whole(text: str) -> int:
    require(text.isascii() and text.isdigit() and int(text) > 0, "--max_new_tokens", text, "a whole number above 0")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    require(0 < value < math.inf, "--temperature", text, "a number above 0; leave it out for greedy answers")
    return value


class _Talk:
    """The models of a run, and each one's conversation."""

    def __init__(self, recipe: Recipe, models: Models, new: int, temperature: float | None):
        self.recipe, self.models, self.new, self.temperature = recipe, models, new, temperature
        self.is_chat = recipe.data.chat is not False and models.tokenizer.chat_template is not None
        self.titles = titles(models.names[1:])
        self.reset()

    def reset(self) -> None:
        data = self.recipe.data
        self.conversations = {
            name: Conversation(data.prompt, data.system_prompt, self.is_chat) for name in self.models.names
        }
        # The same questions have the same answers, drawn or not.
        set_seed(self.recipe.seed)

    def ask(self, question: str, on_texts: Callable[[Sequence[str]], None]) -> list[str]:
        """Each model's answer; it goes into the conversations once all are whole."""
        prompts = {
            name: prompt_ids({"id": "of the question", "prompt": talk.prompt(question)}, self.models.tokenizer)
            for name, talk in self.conversations.items()
        }
        try:
            answers = self.models.answers(
                prompts, self.new, self.temperature, lambda said: on_texts(list(said.values()))
            )
        except torch.OutOfMemoryError:
            raise StageFailed("chat: the GPU's memory is full; /reset, or a smaller --max_new_tokens") from None
        for name, answer in answers.items():
            self.conversations[name].add(question, answer)
        return list(answers.values())


def _open(recipe: Recipe, new: int, temperature: float | None) -> _Talk:
    run = finished_run(recipe, ())
    folder = run.folder
    done = [stage for stage in stages_of(recipe) if stage.trains and "finished" in records(folder).get(stage.name, {})]
    of_another = {stage.name: why for stage in done if (why := why_another(stage, run)) is not None}
    trained = [stage.name for stage in done if stage.name not in of_another]
    for name, why in of_another.items():
        print(f"lorapar: {name} is left out: it is of {why}; `lorapar run` trains it again", file=sys.stderr)
    if not trained:
        raise InputError(f"{folder}: no stage has been trained there; run {recipe.stages[0]} first")
    run = finished_run(recipe, [weights_of(name) for name in trained])
    return _Talk(recipe, Models(run.load_whole_model(), run.tokenizer, folder, trained), new, temperature)


def _print_plainly(talk: _Talk, answers: Sequence[str]) -> None:
    sections = []
    for title, answer in zip(talk.titles, answers):
        lines = [f"  {line}".rstrip() for line in shown(answer).split("\n")] if answer else []
        sections.append("\n".join([title, *lines]))
    write(sys.stdout, "\n\n".join(sections) + "\n")


def _converse(talk: _Talk) -> None:
    """Ask what is typed, until that ends. At a terminal two Ctrl-C in a row end it too, as a KeyboardInterrupt."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() a line that can be edited, and those typed before)
    # A dumb terminal moves no cursor.
    at_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    if at_terminal:
        _say(f"{', '.join(talk.titles)}, of {talk.recipe.output_dir}. /help says what can be typed.\n\n")
    interrupted = False
    while True:
        try:
            line = _next_line(at_terminal)
            if line is None or line.strip() in ("/quit", "/exit"):
                return
            _take(talk, line, at_terminal)
            interrupted = False
        except (InputError, StageFailed) as error:
            if not at_terminal:
                raise
            print(f"lorapar: error: {error}", file=sys.stderr)
        except KeyboardInterrupt as stopped:
            if interrupted or type(stopped) is not KeyboardInterrupt or not at_terminal:
                raise
            interrupted = True
            write(sys.stdout, "\nstopped; Ctrl-C again ends\n")


def _next_line(at_terminal: bool) -> str | None:
    """The next line of stdin; None at its end."""
    if not (at_terminal and sys.stdin.isatty()):
        return sys.stdin.readline() or None
    try:
        return input("> ")
    except EOFError:
        write(sys.stdout, "\n")
        return None


def _take(talk: _Talk, line: str, at_terminal: bool) -> None:
    """Do what a line asks for."""
    word = line.rstrip()
    if not word.strip():
        return
    if word == "/reset":
        talk.reset()
    elif word == "/help":
        _say(HELP)
    elif word.startswith("/"):
        raise InputError(f"{word.split()[0]}: no such command; allowed: /reset, /quit, /help")
    else:
        question = checked(line, "the question")
        if at_terminal:
            _show(talk, question)
        else:
            _print_plainly(talk, talk.ask(question, lambda _: None))
    if not at_terminal and not word.startswith("/"):
        write(sys.stdout, "\n")


def _show(talk: _Talk, question: str) -> None:
    """The answers as they are made, side by side."""
    paint = unpainted if os.environ.get("NO_COLOR") else painted
    screen = Screen(sys.stdout, talk.titles, _size, paint)
    texts = [""] * len(talk.titles)

    def draw(said: Sequence[str]) -> None:
        texts[:] = said
        screen.draw(said)

    write(sys.stdout, "\n")
    screen.draw(texts)
    with _unheard():
        try:
            texts[:] = talk.ask(question, draw)
        finally:
            screen.draw(texts, is_last=True)
    write(sys.stdout, "\n")


def _say(text: str) -> None:
    """Words of our own, broken between words where the terminal is narrow."""
    write(sys.stdout, "\n".join(wrapped(text, _size()[0] - 1)))


def _size() -> tuple[int, int]:
    """The terminal's columns and lines."""
    size = shutil.get_terminal_size()
    return size.columns, size.lines


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Keep the terminal from writing into the answers what is typed meanwhile; the next line has it."""
    try:
        import termios
    except ImportError:
        # Windows writes nothing until input() reads.
        termios = None
    if termios is None or not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = termios.tcgetattr(sys.stdin)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
