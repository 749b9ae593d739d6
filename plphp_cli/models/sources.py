"""What a model's name stands for: the built-in model, a local folder, or a repository of the hub."""

import contextlib
import errno
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from plphp_cli.errors import ModelError, PLPHPError

BUILTIN = "builtin"
BUILTIN_FOLDER = Path(__file__).parent.parent / "builtin" / "model"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)
# Files that a model or processor is made of, at the repository's root; weights in safetensors only.
_WANTED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_UNWANTED = ("*/*", "consolidated*")
_EXPECTED = "expected 'builtin', a folder, or a hub id like llava-hf/llava-1.5-7b-hf"


@dataclass(frozen=True)
class Source:
    """A model's files on this machine. `revision` is the commit of a hub model, else None."""

    name: str
    folder: Path
    revision: str | None
    builtin: bool = False


def locate(name: str) -> Source:
    """Find a model by name; of a hub model only `config.json` is fetched.

    Raises:
        ModelError: there is no such model, or its config is missing or broken.
        PLPHPError: the hub cannot be reached, or the disk is full.
    """
    if name == BUILTIN:
        if not (BUILTIN_FOLDER / "config.json").is_file():
            raise ModelError(
                "the built-in model is not part of this installation",
                hint="install plphp-cli from its wheel, or name a folder or hub id with --model",
            )
        return Source(name, BUILTIN_FOLDER, None, builtin=True)
    if not name.strip():
        raise _unknown(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(name, path, None)
    if path.is_file():
        raise ModelError(
            f"model {name} is a file", hint="name the folder that holds config.json and the weights"
        )
    if name.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(name):
        raise _unknown(name)
    repository, _, revision = name.partition("@")
    config = _from_hub(repository, revision or None, "config.json")
    return Source(repository, config.parent, config.parent.name)


def complete(source: Source) -> Source:
    """Fetch the rest of a hub model's files; other sources are returned as they are. Raises as `locate`."""
    if source.revision is None:
        return source
    return Source(source.name, _from_hub(source.name, source.revision, None), source.revision)


def read_config_json(source: Source) -> dict[str, Any]:
    """The model's `config.json`.

    Raises:
        ModelError: the file is missing, unreadable or not a JSON object that names a model type.
    """
    path = source.folder / "config.json"
    if not path.is_file():
        hint = "name the folder into which save_pretrained wrote the model"
        if inner := [item.parent.name for item in sorted(source.folder.glob("*/config.json"))]:
            hint = f"did you mean {source.folder / inner[0]}?"
        raise ModelError(f"model folder {source.name} holds no config.json", hint=hint)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"config.json of {source.name} cannot be read: {error}", hint="fetch or save the model again"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(
            f"config.json of {source.name} names no model_type", hint="expected a transformers model's config"
        )
    return config


def check_weights(source: Source) -> int:
    """Bytes of the model's weight files.

    Raises:
        ModelError: there are no safetensors weights, files are missing, or one only stands in for them.
    """
    folder, index = source.folder, source.folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    if not files[0].is_file() and index.is_file():
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = [folder / name for name in sorted(set(shards))]
        except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
            raise ModelError(
                f"{index.name} of {source.name} is broken: {error}", hint="fetch it again"
            ) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        others = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        hint = "only safetensors are read, since other formats can run code: save the model as safetensors"
        raise ModelError(
            f"{source.name} lacks the weights {missing[0]}"
            + (f" and {len(missing) - 1} more" if missing[1:] else ""),
            hint=hint if others else "fetch or copy the model again: it is incomplete",
        )
    for file in files:
        with file.open("rb") as opened:
            if opened.read(8) == b"version ":
                raise ModelError(
                    f"{file.name} of {source.name} is a Git LFS pointer, not the weights",
                    hint="run `git lfs pull` in the folder",
                )
    return sum(file.stat().st_size for file in files)


def _unknown(name: str) -> ModelError:
    close = get_close_matches(name, _known_names(name), n=1, cutoff=0.6)
    return ModelError(f"unknown model {name!r}", hint=f"did you mean {close[0]}?" if close else _EXPECTED)


def _known_names(name: str) -> list[str]:
    parent = Path(name).expanduser().parent
    return [BUILTIN, *_model_folders(parent), *cached_models()]


def _model_folders(parent: Path) -> Iterable[str]:
    try:
        return [str(item.parent) for item in sorted(parent.glob("*/config.json"))]
    except OSError:
        return []


def cached_models() -> list[str]:
    """Ids of the models in the local hub cache."""
    from huggingface_hub import constants

    folders = Path(constants.HF_HUB_CACHE).glob("models--*")
    return sorted(folder.name.removeprefix("models--").replace("--", "/") for folder in folders)


def _from_hub(repository: str, revision: str | None, file: str | None) -> Path:
    """Fetch one file (its path) or, with `file` None, all that are wanted (their folder)."""
    from huggingface_hub import errors, hf_hub_download

    named = f"{repository}@{revision}" if revision else repository
    try:
        if file is not None:
            return Path(hf_hub_download(repository, file, revision=revision))
        return Path(_snapshot(repository, revision))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"model {repository} is gated: its owner asks you to accept terms",
            hint=f"accept them on https://huggingface.co/{repository}, then run `hf auth login`",
        ) from error
    except errors.RepositoryNotFoundError as error:
        unknown = _unknown(repository)
        raise ModelError(f"the hub has no model {repository} that you may see", hint=unknown.hint) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"model {repository} has no revision {revision!r}", hint="check the tag, branch or commit"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        unknown = _unknown(repository)
        raise PLPHPError(
            f"model {named} is not in the local cache, and the hub cannot be reached",
            hint=unknown.hint if unknown.hint != _EXPECTED else "check the network, or name a local folder",
        ) from error
    except errors.EntryNotFoundError as error:
        raise ModelError(f"model {named} has no {file}", hint="it is not a transformers model") from error
    except errors.HFValidationError as error:
        raise _unknown(repository) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise PLPHPError(
                f"no space left to download {named}", hint="free some, or set HF_HOME"
            ) from error
        raise PLPHPError(
            f"cannot fetch {named} from the hub: {_first_line(error)}", hint="check the network and try again"
        ) from error


def _snapshot(repository: str, revision: str | None) -> str:
    from huggingface_hub import errors, snapshot_download

    fetch = partial(
        snapshot_download,
        repository,
        revision=revision,
        allow_patterns=list(_WANTED),
        ignore_patterns=list(_UNWANTED),
    )
    try:
        return str(fetch())
    except Exception:
        # The hub's client 1.33 asks for a commit's list of files even offline: the cache may hold them all.
        with contextlib.suppress(errors.LocalEntryNotFoundError):
            return str(fetch(local_files_only=True))
        raise


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
