"""The errors that are the user's to fix, and what they say."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """An unusable recipe, argument, file or row.

    Its text is a single line that names the key, column or file, what was given and what is allowed. The command line
    prints that line and exits with status 2; any other exception is a failure of ours or of the machine (status 1).
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


def require(holds: bool, at: str, given: object, allowed: str) -> None:
    """InputError that names the key `at`, what was given and what is allowed, unless `holds`."""
    if not holds:
        raise InputError(f"{at}: got {given!r}, expected {allowed}")


def nearest(given: object, allowed: Iterable[str], count: int = 1, least: float = 1.0) -> list[str]:
    """The names in `allowed` that `given` may have been meant as, the most similar first.

    Similarity is 0 to 2: letters in order, and letters in any order, because typing slips often swap them (tetha).
    Names below `least` are left out, so the list can be empty.
    """

    def similarity(name: str) -> float:
        ordered = difflib.SequenceMatcher(None, str(given), name).ratio()
        return ordered + difflib.SequenceMatcher(None, sorted(str(given)), sorted(name)).ratio()

    by_name = {name: similarity(name) for name in allowed}
    return sorted((name for name in by_name if by_name[name] >= least), key=lambda name: -by_name[name])[:count]


def suggestion(given: object, allowed: Iterable[str], count: int = 1) -> str:
    """How an error about an unknown name ends: with the nearest names that are allowed, else with all of them."""
    allowed = list(allowed)
    near = nearest(given, allowed, count)
    return f"nearest: {', '.join(near)}" if near else f"allowed: {', '.join(allowed)}"


def not_installed(what: str, extra: str) -> str:
    """That a package is missing, and which extra of ours brings it; `what` may end in ", which"."""
    return f"{what} is not installed; {install(extra)}"


def install(extra: str) -> str:
    """The command that brings what an extra of ours needs, in the versions that it needs."""
    return f"pip install 'lorapar[{extra}]'"


class StageFailed(RuntimeError):
    """A failure at work that a single line explains; the command line prints the line alone (exit status 1).

    What was written before stays, and `run.log` has the whole traceback.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


class OutOfMemory(StageFailed):
    """A stage ran out of memory; the lines after the first say what would lower its need."""

    def __init__(self, message: str):
        RuntimeError.__init__(self, message)


class RewardFailed(StageFailed):
    """A reward function, or a metric, failed or did not return a number for each completion."""


class NothingLearned(StageFailed):
    """A stage had nothing to learn from, such as rewards that were equal in every group."""
