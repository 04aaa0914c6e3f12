"""Sending a folder's files to a repository of the hub, as one commit."""

import contextlib
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from ..errors import InputError, StageFailed

TOKEN = "set HF_TOKEN, or run `hf auth login`, with a token that may write (https://huggingface.co/settings/tokens)"

TAG = "lora-par"  # of the cards that push writes
# What from_pretrained would take before an adapter.
WHOLE_MODEL = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


def check_repository(name: str) -> None:
    """InputError for what is no owner/name."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"OWNER/NAME: got {name!r}: {error}") from None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"OWNER/NAME: got {name!r}, expected an owner, a slash and a name, as in ada/sums")


def check_token() -> str:
    """The token of whoever pushes; InputError where there is none or the hub is switched off."""
    if constants.HF_HUB_OFFLINE:
        raise InputError("push: HF_HUB_OFFLINE is set, so the hub is not asked; unset it, or use --dry-run")
    token = get_token()
    if token is None:
        raise InputError(f"push: there is no token for the hub; {TOKEN}")
    return token


def is_on_hub(kind: str, name: str, token: str) -> bool:
    """Whether the hub has a repository (kind: model, dataset) that the token may see; raises as `push` does."""
    try:
        HfApi(token=token).repo_info(name, repo_type=kind)
    except GatedRepoError:
        return True
    except (RepositoryNotFoundError, HFValidationError):
        return False
    except Exception as error:
        raise _explained(error, name) from error
    return True


def push(
    files: dict[str, Path], ours: Iterable[str], repository: str, private: bool, message: str, token: str
) -> tuple[str, list[str]]:
    """Commit `files` ({path in the repository: file}) to a model repository, made where there is none.

    Of what an earlier push wrote there, files of the names `ours` that are not among `files` are deleted by the same
    commit; what else the repository holds stays. The repository is the only thing that is there after a failure, if it
    was not before. Returns the commit's URL, and lines on what it has deleted or replaced.

    Raises InputError where the hub refuses the token or the repository, where a private one is asked for and it is
    there and public, and where it holds a whole model; StageFailed where the hub fails or cannot be reached.
    """
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        there = api.model_info(repository)
        names = {file.rfilename for file in there.siblings or []}
        # The hub leaves a repository that exists as it is.
        if private and not there.private:
            raise InputError(
                f"--private: {repository} exists and is public; make it private in its settings, or push to another"
            )
        if whole := sorted(filter(WHOLE_MODEL.fullmatch, names)):
            raise InputError(f"{repository}: holds a whole model ({whole[0]}), which would be loaded in the adapter's "
                             "place; push to another")  # fmt: skip
        by_push = TAG in (there.tags or [])
        left_over = sorted((names & {*ours}) - {*files}) if by_push else []
        said = [f"deleted, of an earlier push: {', '.join(left_over)}"] if left_over else []
        if "README.md" in names and not by_push:
            said.append("README.md was another's and has been replaced; the repository's history holds it")
        operations = [*(CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())),
                      *map(CommitOperationDelete, left_over)]  # fmt: skip
        with _bars_on_a_terminal_alone():
            commit = api.create_commit(repository, operations, commit_message=message)
    except InputError:
        raise
    # Besides errors of HTTP there are the transfer's own, which are of several libraries (LFS, Xet).
    except Exception as error:
        raise _explained(error, repository) from error
    return str(commit.commit_url), said


@contextlib.contextmanager
def _bars_on_a_terminal_alone() -> Iterator[None]:
    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _explained(error: BaseException, repository: str) -> InputError | StageFailed:
    """What the hub's answer means for whoever pushes, in a line."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__ or cause.__context__
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    server = cause.server_message if isinstance(cause, HfHubHTTPError) else None
    said = server or next(iter(str(error).strip().splitlines()), type(error).__name__)
    owner = repository.partition("/")[0]
    if status == 401:
        return InputError(f"{repository}: the hub does not know the token (401: {said}); {TOKEN}")
    if status == 403:
        return InputError(
            f"{repository}: the token may not write there (403: {said}); give one that may write to {owner}"
        )
    if status == 404:
        return InputError(f"{repository}: the hub finds no such owner or repository (404: {said})")
    if status == 409 or status == 412:
        return StageFailed(f"{repository}: somebody else has changed it meanwhile ({status}: {said}); push again")
    if status is not None:
        kind = InputError if status < 500 and status != 429 else StageFailed
        return kind(f"{repository}: the hub refuses ({status}: {said})")
    return StageFailed(
        f"{repository}: {constants.ENDPOINT} cannot be reached, or the transfer broke off ({said}); push again"
    )
