"""The hub of models: what is fetched from it, and each of its failures as one line that says what to do."""

import contextlib
import errno
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from plphp_cli.errors import ModelError, PLPHPError

OFFLINE = "HF_HUB_OFFLINE"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# Windows wakes no waiting thread for a signal: this often it looks.
_LOOK_S = 0.2
_left_behind = threading.Event()


class _LeftBehindError(Exception):
    """Ends a download that nobody waits for any more."""


def leaves_downloads() -> bool:
    """Whether a download was interrupted, whose threads may still wait for the hub.

    Python would wait for them at its end.
    """
    return _left_behind.is_set()


def go_offline() -> None:
    """Ask the hub nothing from now on, in this process and in those that it starts.

    The variable is read when `huggingface_hub` is imported, which may have been before.
    """
    os.environ[OFFLINE] = "1"
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def is_offline() -> bool:
    """Whether the hub may not be asked: `--offline`, or the variable `HF_HUB_OFFLINE`."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextlib.contextmanager
def offline(wanted: bool) -> Iterator[None]:
    """Ask the hub nothing inside, if so wanted; as before after."""
    if not wanted:
        yield
        return
    from huggingface_hub import constants

    variable, setting = os.environ.get(OFFLINE), constants.HF_HUB_OFFLINE
    go_offline()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = setting
        if variable is None:
            del os.environ[OFFLINE]
        else:
            os.environ[OFFLINE] = variable


def fetch_file(repository: str, revision: str | None, file: str, suggestion: str | None = None) -> Path:
    """One file of a model's repository, from the local cache or the hub. Raises as `fetch_files`."""
    with _told(repository, revision, suggestion, file):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repository, file, revision=revision))


def fetch_files(
    repository: str,
    revision: str | None,
    wanted: Sequence[str],
    unwanted: Sequence[str] = (),
    suggestion: str | None = None,
) -> Path:
    """The folder of a repository's files whose names match; progress is shown on a terminal's stderr.

    Args:
        repository: its id.
        revision: tag, branch or commit; None for the default branch.
        wanted: patterns of names.
        unwanted: patterns of names that are left out.
        suggestion: what to try should there be no such repository.

    Raises:
        ModelError: gated, missing, no such revision or file, or no id at all.
        PLPHPError: the hub cannot be reached, the download broke off, or the disk is full.
    """
    with _told(repository, revision, suggestion):
        from huggingface_hub import snapshot_download

        def download() -> str:
            return snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(wanted),
                ignore_patterns=list(unwanted),
                # Said once more: some versions ask for a commit's list of files even so.
                local_files_only=is_offline(),
                tqdm_class=_bar(),
            )

        return Path(_interruptible(download))


def repository_files(repository: str, revision: str) -> list[str] | None:
    """Names of a repository's files; None where the hub is not asked (offline), or does not answer."""
    if is_offline():
        return None
    try:
        with _told(repository, revision, None):
            from huggingface_hub import HfApi

            return sorted(HfApi().list_repo_files(repository, revision=revision))
    except PLPHPError:
        return None


def _interruptible(download: Callable[[], str]) -> str:
    """What `download` returns. A signal is obeyed at once, though the hub's client has threads to wait for.

    What they have written of a file stays, and the next download goes on from there.
    """
    found: list[str] = []
    failed: list[BaseException] = []
    ended = threading.Event()

    def work() -> None:
        try:
            found.append(download())
        except BaseException as error:  # noqa: BLE001  (it is raised in the thread that waits)
            failed.append(error)
        finally:
            ended.set()

    threading.Thread(target=work, name="download", daemon=True).start()
    _left_behind.clear()
    try:
        while not ended.wait(_LOOK_S):
            pass
    except BaseException:
        _left_behind.set()
        raise
    if failed:
        raise failed[0]
    return found[0]


def _bar() -> Any:
    """The hub's own progress bar, on terminals alone: some of its bars are drawn into files, too."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            if sys.stderr is None or not sys.stderr.isatty():
                options["disable"] = True
            super().__init__(*args, **options)

        def update(self, n: float | None = 1) -> Any:
            if _left_behind.is_set():
                raise _LeftBehindError
            return super().update(n)

    return Bar


@contextlib.contextmanager
def _told(
    repository: str, revision: str | None, suggestion: str | None, file: str | None = None
) -> Iterator[None]:
    """Failures inside as this project's errors, and nothing else on stderr but progress."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import huggingface_hub  # noqa: F401  # sets up its logger

            logger.setLevel(logging.CRITICAL)
            yield
    except Exception as error:
        raise _explained(error, repository, revision, suggestion, file) from error
    finally:
        logger.setLevel(level)


def _explained(
    error: Exception, repository: str, revision: str | None, suggestion: str | None, file: str | None
) -> PLPHPError:
    from huggingface_hub import errors

    # A commit is what a tag or the default branch stood for: not what the user typed.
    named = repository if revision is None or _COMMIT.fullmatch(revision) else f"{repository}@{revision}"
    if isinstance(error, errors.GatedRepoError):
        return ModelError(
            f"model {repository} is gated: its owner asks you to accept terms",
            hint=f"accept them on https://huggingface.co/{repository}, then run `hf auth login`",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelError(
            f"the hub has no model {repository} that you may see",
            hint=suggestion or "check the spelling; for a private model run `hf auth login`",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(
            f"model {repository} has no revision {revision!r}", hint="check the tag, branch or commit"
        )
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        # A config is fetched first: what is asked for after it is in a folder that was begun.
        return _not_here(error, named, suggestion, begun=file is None)
    if isinstance(error, errors.EntryNotFoundError):
        return ModelError(f"model {named} has no {file}", hint="it is not a transformers model")
    if isinstance(error, errors.HFValidationError):
        return ModelError(f"unknown model {repository!r}", hint=suggestion)
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return PLPHPError(
            f"no space left to download {named} into {_cache()}",
            hint="free some, or set HF_HOME to a folder on another disk",
        )
    if isinstance(error, PermissionError):
        return PLPHPError(
            f"cannot write into the hub cache {_cache()}: {error.strerror}",
            hint="set HF_HOME to a folder that is yours",
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return PLPHPError(
            f"the hub refuses {named} to you ({status})", hint="check your token: `hf auth whoami`"
        )
    return PLPHPError(
        f"the download of {named} broke off: {_first_line(error)}",
        hint="repeat the command: files that are complete are kept",
    )


def _not_here(error: Exception, named: str, suggestion: str | None, begun: bool) -> PLPHPError:
    """What is not in the cache cannot be fetched either: because of --offline, or of the network."""
    where = "only partly in the local cache" if begun else "not in the local cache"
    if is_offline():
        return PLPHPError(
            f"model {named} is {where}, and the hub is not asked (offline)",
            hint=suggestion or f"fetch it once without --offline, and without {OFFLINE} set",
        )
    cause = error.__cause__
    detail = f" ({_first_line(cause)})" if cause is not None else ""
    return PLPHPError(
        f"model {named} is {where}, and the hub cannot be reached{detail}",
        hint=suggestion or "check the network, or name a local folder",
    )


def _cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
