"""The one kind of failure that is the user's to mend."""


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


def not_installed(what: str, extra: str) -> str:
    """That a package is missing, and which extra of ours brings it; `what` may end in ", which"."""
    return f"{what} is not installed; pip install 'lorapar[{extra}]'"


class OutOfMemory(RuntimeError):
    """A stage ran out of memory; the message says what would lower its need. What was written before stays."""
