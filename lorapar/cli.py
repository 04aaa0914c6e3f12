"""The command line: `lorapar run RECIPE.yaml`, a verb a stage, and `lorapar doctor`.

Exit status: 0 done, 1 failed, 2 unusable arguments or recipe (one line that says which), 130 interrupted.
"""

import argparse
import errno
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import InputError

STAGES = {
    "label": "label every row System 1 or System 2, and split off the held-out rows",
    "score": "score every LoRA element for each system",
    "partition": "divide the elements into S1-only, S2-only, shared and inactive",
    "sft": "train stage 1 on its system's rows",
    "grpo": "train stage 2 on its system's rows",
    "evaluate": "answer the held-out rows with the base and after each stage",
    "export": "write the finished adapter, and the merged model where asked for",
    "report": "write report.html and its pictures",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    try:
        if options.verb == "doctor":
            _refuse(rest)
            from .doctor import doctor

            print(doctor())
        else:
            _run(options, rest)
    except InputError as error:
        print(f"lorapar: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lorapar: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if _disk_is_full(error, options):
            print(f"lorapar: error: the disk is full ({error}); free some space and run the same command again".replace("\n", " "),
                  file=sys.stderr)  # fmt: skip
            return 2
        raise
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lorapar",
        description="LoRA-PAR: fine-tune a language model as two systems.",
        epilog="Any key of the recipe can be given as --section.key VALUE. A run that was stopped goes on with the same command.",
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    stages = {"run": "run every stage of a recipe, or go on with a run", **STAGES}
    for verb, text in stages.items():
        sub = verbs.add_parser(verb, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False,
                               usage=f"lorapar {verb} RECIPE.yaml [--output_dir DIR] [--update] [--section.key VALUE ...]")  # fmt: skip
        sub.add_argument("recipe", metavar="RECIPE.yaml", help="the recipe")
        sub.add_argument("--output_dir", metavar="DIR", help="where the artefacts go (the recipe's output_dir)")
        sub.add_argument("--update", action="store_true",
                         help="take over a folder made by another recipe, and redo what the change touches")  # fmt: skip
    verbs.add_parser("doctor", help="versions, devices, and which kernels run here", allow_abbrev=False)
    return parser


def _run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    overrides = parse_overrides(rest)
    if options.output_dir is not None:
        overrides.append(("output_dir", options.output_dir))
    if not Path(options.recipe).is_file():
        raise InputError(f"{options.recipe}: no such recipe")
    try:
        from .config import load_recipe

        recipe = load_recipe(options.recipe, overrides)
        from .pipeline import run
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed; pip install 'lorapar[quickstart]'") from error
    folder = run(recipe, only=None if options.verb == "run" else options.verb, update=options.update)
    if options.verb in ("run", "report"):
        print(folder / "report.html")


def parse_overrides(rest: Sequence[str]) -> list[tuple[str, str]]:
    """`--a.b value` and `--a.b=value` as ("a.b", "value")."""
    overrides, words = [], list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise InputError(f"{word}: unknown argument; a recipe's key is given as --section.key VALUE")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise InputError(f"--{key}: needs a value")
            value = words.pop(0)
        overrides.append((key, value))
    return overrides


def _refuse(rest: Sequence[str]) -> None:
    if rest:
        raise InputError(f"{rest[0]}: unknown argument")


def _disk_is_full(error: Exception, options: argparse.Namespace) -> bool:
    """Also where a library wraps the operating system's error in its own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    folder = Path(getattr(options, "output_dir", None) or ".")
    writing = "No space left" in str(error) or "file write failed" in str(error)
    return writing and (not folder.exists() or shutil.disk_usage(folder).free < 1 << 24)


if __name__ == "__main__":
    sys.exit(main())
