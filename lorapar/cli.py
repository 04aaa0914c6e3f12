"""The command line: `lorapar run RECIPE.yaml`, a verb a stage, and `lorapar doctor`.

Exit status: 0 done, 1 failed, 2 unusable arguments or recipe (one line that says which), 130 interrupted, 143 and 129
stopped by SIGTERM and SIGHUP.
"""

import argparse
import contextlib
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import InputError, StageFailed, not_installed

if TYPE_CHECKING:
    from .recipe.sections import Recipe

STAGES = {
    "label": "label every row System 1 or System 2, and split off the held-out rows",
    "score": "score every LoRA element for each system",
    "partition": "divide the elements into S1-only, S2-only, shared and inactive",
    "sft": "train stage 1 on its system's rows",
    "renew": "score the second stage's system on the first stage's result, where score.renew is set",
    "grpo": "train stage 2 on its system's rows",
    "evaluate": "answer the held-out rows with the base and after each stage",
    "export": "write the finished adapter, and the merged model where asked for",
    "report": "write report.html and its pictures",
}


STABLE = "0.95"  # the Jaccard index that --until-stable without one asks for
STABLE_HELP = (
    f"stop scoring once doubling the examples hardly changes the selected elements: a Jaccard index of at least J "
    f"(default {STABLE}); sets score.until_stable"
)
# What the extra quickstart brings, by the names that Python imports.
BROUGHT = {"accelerate", "certifi", "datasets", "filelock", "gguf", "matplotlib", "peft", "psutil",
           "reasoning_gym", "safetensors", "transformers", "trl", "yaml"}  # fmt: skip
ANY_KEY = "--section.key VALUE sets any key of the recipe, as YAML: --partition.theta 0.5. docs/recipe.md lists them."
# Shorthands for a key of the recipe that holds a list: words with commas between them.
LISTS = {"tasks": "evaluate.tasks", "gguf": "export.gguf"}
LISTS_HELP = {
    "tasks": "benchmarks of lm-evaluation-harness for the base and each stage: names, or .yaml files of tasks; sets "
    "evaluate.tasks",
    "gguf": "files for llama.cpp and Ollama: adapter, f16, q8_0 (the merged model), base; sets export.gguf. "
    "gguf/ then holds these alone",
}
MORE_OPTIONS = {
    "label": "[--dry-run | --review] ",
    "run": "[--tasks NAME,...] [--run-code] [--gguf FORM,...] ",
    "evaluate": "[--tasks NAME,...] [--run-code] ",
    "export": "[--gguf FORM,...] ",
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in the one line that everything unusable gets."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP, taken as Ctrl-C is: what is written is finished or passed over, and locks are released."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Raise `Stopped` for the first SIGTERM or SIGHUP; the next one ends the process as it stands."""
    process = os.getpid()

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != process:  # a library's worker, forked off this process, ends as it would without us
            os.kill(os.getpid(), number)
        raise Stopped(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # nohup has SIGHUP ignored, and whoever calls us may have handlers of their own.
    mine = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    mine = mine if threading.current_thread() is threading.main_thread() else []
    for number in mine:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def _in_launch() -> bool:
    """As `distributed.launch.is_launched`, which takes a second to import."""
    return {"RANK", "WORLD_SIZE"} <= set(os.environ)


def _say(line: str, stopped: bool = False) -> None:
    """The line for the terminal that ends the command; of several processes of a launch, one says it.

    stopped: by a signal, which the launcher sends where another process has died.
    """
    if not _in_launch():
        print(f"lorapar: {line}", file=sys.stderr)
        return
    from .distributed import launch

    launch.say_end((launch.who_died() if stopped else None) or line)


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has ended, as after `| head`."""
    try:
        place = select.poll()
        place.register(sys.stdout.fileno(), select.POLLERR)
        return bool(place.poll(0))
    except (AttributeError, OSError, ValueError):  # a system without poll; no file
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        with _stopped_by_signals():
            code = _main_of_launch(arguments) if _in_launch() else _main(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        # Python flushes once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Stopped as stopped:
        _say(f"stopped ({stopped}); the same command resumes from here", stopped=True)
        return 128 + stopped.number
    except KeyboardInterrupt:
        if arguments is None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C while Python ends shows no traceback
        _say("interrupted; the same command resumes from here")
        return 130


def _main_of_launch(arguments: Sequence[str] | None) -> int:
    """`_main` in one process of several: what ends one of them ends all, and is said once."""
    from .distributed import launch, processes

    try:
        return _main(arguments)
    except Exception as error:
        if lost := launch.what_was_lost(error):
            launch.say_end(lost)
            return 1
        # Before the processes have met, none knows of another's error.
        if processes.count() == 1 or launch.claim(repr(error)):
            raise
        return 1


def _main(arguments: Sequence[str] | None) -> int:
    try:
        words, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
        options = _parser().parse_args(words)
        prints = (
            options.verb in ("doctor", "plan", "chat", "push")
            or vars(options).get("dry_run")
            or vars(options).get("review")
        )
        if prints and _in_launch() and os.environ["RANK"] != "0":
            return 0  # one process of a launch prints
        if options.verb == "doctor":
            if overrides:
                raise InputError(f"--{overrides[0][0]}: doctor takes no arguments")
            from .doctor import doctor

            print(doctor())
        elif options.verb == "plan":
            return _plan(options, overrides)
        elif options.verb == "chat":
            return _chat(options, overrides)
        elif options.verb == "push":
            _push(options, overrides)
        else:
            _run(options, overrides)
    except InputError as error:
        _say(f"error: {error}")
        return 2
    except StageFailed as error:
        _say(f"error: {error}")
        return 1
    except ModuleNotFoundError as error:
        if error.name not in BROUGHT:
            raise
        _say(f"error: {not_installed(error.name, 'quickstart')}")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    again = "A run that was stopped goes on with the same command."
    parser = _Parser(
        prog="lorapar",
        description="LoRA-PAR: fine-tune a language model as two systems.",
        epilog=f"Any key of the recipe can be given as --section.key VALUE. {again}",
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    stages = {"run": "run every stage of a recipe, or go on with a run", **STAGES}
    for verb, text in stages.items():
        usage = f"RECIPE.yaml [--output_dir DIR] [--update] {MORE_OPTIONS.get(verb, '')}".rstrip()
        sub = _add_verb(verbs, verb, text, usage)
        sub.add_argument("recipe", metavar="RECIPE.yaml", help="the recipe")
        sub.add_argument("--output_dir", metavar="DIR", help="where the artefacts go, in the recipe's place")
        takes_over = "take over a folder made by another recipe, and redo what the change touches"
        if verb in ("run", "score"):
            # Read by split_overrides, which comes first; here for the help.
            sub.add_argument("--until-stable", metavar="J", nargs="?", help=STABLE_HELP)
        # Read by split_overrides too.
        for word in [word for word in LISTS if f"--{word} " in MORE_OPTIONS.get(verb, "")]:
            sub.add_argument(f"--{word}", metavar="NAME,...", help=LISTS_HELP[word])
        if verb in ("run", "evaluate"):
            what = "let a task execute code that the model writes, in a process without network; sets evaluate.run_code"
            sub.add_argument("--run-code", action="store_true", help=what)
        sub.add_argument("--update", action="store_true", help=takes_over)
        if verb == "label":
            what = "say how many calls, tokens and what cost remain, and ask nobody"
            one = sub.add_mutually_exclusive_group()
            one.add_argument("--dry-run", action="store_true", help=what)
            what = "write the rows that voters split on as review.csv, for a person to correct; label then reads it"
            one.add_argument("--review", action="store_true", help=what)
    text = (
        "say what memory each stage needs, and how much work it is, without loading the model: exit status 1 unless it "
        "is known to fit"
    )
    sub = _add_verb(verbs, "plan", text, "RECIPE.yaml [--vram SIZE] [--tflops RATE] [--gbytes RATE]")
    sub.add_argument("recipe", metavar="RECIPE.yaml", help="the recipe")
    sub.add_argument("--vram", metavar="SIZE", help="the memory there is, 8GB or 24GiB (default: this machine's)")
    sub.add_argument(
        "--tflops", metavar="RATE", help="TFLOP/s that the machine sustains, to turn operations into hours"
    )
    sub.add_argument("--gbytes", metavar="RATE", help="GB/s that it sustains, for the hours of decoding")
    of_run = "where its artefacts are, in the recipe's place"
    text = "ask the base and each stage's result the same question, side by side in the terminal"
    usage = "RECIPE.yaml [--once TEXT] [--max_new_tokens N] [--temperature T] [--output_dir DIR]"
    sub = _add_verb(verbs, "chat", text, usage)
    sub.add_argument("recipe", metavar="RECIPE.yaml", help="the recipe of a run whose stages have been trained")
    sub.add_argument("--output_dir", metavar="DIR", help=of_run)
    sub.add_argument("--once", metavar="TEXT", help="ask this, print the answers and end; - reads it from stdin")
    sub.add_argument(
        "--max_new_tokens", metavar="N", help="longest answer, in tokens (default: evaluate.max_new_tokens)"
    )
    sub.add_argument(
        "--temperature", metavar="T", help="draw answers at this temperature (default: greedy, as evaluate)"
    )
    text = "publish a finished run on the Hugging Face hub: adapter, partition, report and model card"
    usage = "RECIPE.yaml OWNER/NAME [--dry-run] [--private] [--with-answers] [--output_dir DIR]"
    sub = _add_verb(verbs, "push", text, usage)
    sub.add_argument("recipe", metavar="RECIPE.yaml", help="the recipe of a run that has been exported")
    sub.add_argument("repository", metavar="OWNER/NAME", help="the repository on the hub, made where there is none")
    sub.add_argument("--output_dir", metavar="DIR", help=of_run)
    sub.add_argument("--dry-run", action="store_true", help="print what would go, and send nothing")
    sub.add_argument("--private", action="store_true", help="make the repository a private one")
    what = "publish the held-out rows and their answers with the report; it goes without them by default"
    sub.add_argument("--with-answers", action="store_true", help=what)
    text = "say which versions and devices are here, and which implementation of each operation runs"
    verbs.add_parser("doctor", help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    return parser


def _add_verb(verbs: Any, verb: str, text: str, usage: str) -> argparse.ArgumentParser:
    """The parser of a verb that takes a recipe and any of its keys."""
    return verbs.add_parser(
        verb,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=ANY_KEY,
        usage=f"lorapar {verb} {usage} [--section.key VALUE ...]",
        allow_abbrev=False,
    )


def _plan(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    from .memory.advice import RATES, parse_bytes, parse_rate, table
    from .memory.needs import lengths_of
    from .memory.work import Rates
    from .pipeline.running import labelled_rows

    room = None if options.vram is None else parse_bytes(options.vram)
    given = {name: vars(options)[name] for name in RATES}
    rates = Rates(**{name: parse_rate(name, text) for name, text in given.items() if text is not None})
    recipe = _recipe(options, overrides)
    text, fits = table(recipe, room, lengths_of(recipe, labelled_rows(recipe)), rates)
    print(text)
    return 0 if fits else 1


def _recipe(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> "Recipe":
    recipe_path = Path(options.recipe)
    # Not Path.is_file, which fails by itself on a name that is too long.
    if not os.path.isfile(recipe_path):
        raise InputError(f"{recipe_path}: no such recipe" + ("; it is a folder" if os.path.isdir(recipe_path) else ""))
    from .recipe.reading import load_recipe

    return load_recipe(recipe_path, overrides)


def _recipe_of_run(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> "Recipe":
    recipe = _recipe(options, overrides)
    own = Path(options.recipe).parent
    if options.output_dir is not None:
        recipe.output_dir = options.output_dir
    elif Path(options.recipe).name == "recipe.yaml" and (own / "stages.json").is_file():
        # A run's own recipe means the run that it lies in, which may have been moved since it was written.
        given = Path(recipe.output_dir).expanduser()
        recipe.output_dir = recipe.output_dir if given.resolve() == own.resolve() else str(own.absolute())
    return recipe


def _chat(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    recipe = _recipe_of_run(options, overrides)
    from .chatting.verb import chat_verb

    return chat_verb(recipe, options.once, options.max_new_tokens, options.temperature)


def _push(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    recipe = _recipe_of_run(options, overrides)
    from .publishing.verb import push_verb

    print(push_verb(recipe, options.repository, options.dry_run, options.private, options.with_answers))


def _run(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    recipe = _recipe_of_run(options, overrides)
    from .pipeline.running import label_only, run

    if options.verb == "label" and (options.dry_run or options.review):
        print(label_only(recipe, "dry_run" if options.dry_run else "review"))
        return
    only = None if options.verb == "run" else [options.verb]
    if only == ["evaluate"] and recipe.evaluate.tasks:
        # The page shows the benchmarks, and its own stage would be done again by the next `run` alone.
        shown = (Path(recipe.output_dir).expanduser() / "report.html").is_file()
        only = ["evaluate", "benchmark", *(["report"] if shown else [])]
    folder = run(recipe, only=only, update=options.update)
    if options.verb in ("run", "report") and not (_in_launch() and os.environ["RANK"] != "0"):
        print(folder / "report.html")


# What argparse reads itself: words alone, and words before a value.
FLAGS = ("--help", "--update", "--dry-run", "--review", "--run-code", "--private", "--with-answers")
WORDS = ("output_dir", "vram", "tflops", "gbytes", "once", "max_new_tokens", "temperature")


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The words that argparse reads, and each `--key VALUE` or `--key=VALUE` of the recipe as ("key", "VALUE").

    Apart, because argparse would take the value of an option it does not know for the recipe's path.
    """
    ours, overrides, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if word in FLAGS:
            ours.append(word)
            overrides += [("evaluate.run_code", "true")] if word == "--run-code" else []
        elif key in WORDS and word.startswith("--"):
            ours.append(word)
            ours += [rest.pop(0)] if rest and not equals else []
        elif word.startswith("--") and key == "until-stable":
            # A level may follow, a recipe's path may too.
            if not equals and rest and _is_number(rest[0]):
                equals, value = "=", rest.pop(0)
            if equals and not value:
                raise InputError("--until-stable=: needs a value, a Jaccard index in (0, 1]; or leave out the =")
            overrides.append(("score.until_stable", value if equals else STABLE))
        elif word.startswith("--") and key:
            if not equals:
                if not rest:
                    raise InputError(f"--{key}: needs a value, as in --{key} VALUE")
                value = rest.pop(0)
            if key in LISTS:
                takes = [verb for verb, options in MORE_OPTIONS.items() if f"--{key} " in options]
                if ours[:1] and ours[0] not in takes:
                    raise InputError(f"--{key}: {ours[0]} takes no such option; {' and '.join(takes)} do")
                key, value = LISTS[key], json.dumps([name.strip() for name in value.split(",") if name.strip()])
            overrides.append((key, value))
        else:
            ours.append(word)
    return ours, overrides


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
