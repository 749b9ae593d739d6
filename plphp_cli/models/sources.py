"""What a model's name stands for: the built-in model, a local folder, or a repository of the hub."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from plphp_cli.errors import ModelError
from plphp_cli.models.hub import fetch_file, fetch_files, repository_files

BUILTIN = "builtin"
BUILTIN_FOLDER = Path(__file__).parent.parent / "builtin" / "model"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)
# Files that a model or processor is made of, at the repository's root; weights in safetensors only.
_WANTED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_UNWANTED = ("*/*", "consolidated*")
_CODE = ("config.json", "*.py")
ONLY_SAFETENSORS = (
    "only safetensors are read, since other formats can run code: save the model as safetensors"
)
INCOMPLETE = "fetch or copy the model again: it is incomplete"
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
    if not is_hub_id(name):
        raise _unknown(name)
    repository, _, revision = name.partition("@")
    config = fetch_file(repository, revision or None, "config.json", _close(repository))
    return Source(repository, config.parent, config.parent.name)


def is_hub_id(name: str) -> bool:
    """Whether a name can only be that of a hub model."""
    usual = not name.startswith(("/", ".", "~")) and _HUB_ID.fullmatch(name) is not None
    return usual and name != BUILTIN and not Path(name).exists()


def complete(source: Source, with_code: bool = False) -> Source:
    """Fetch the rest of a hub model's files; other sources are returned as they are. Raises as `locate`.

    Args:
        source: of which `config.json` is there.
        with_code: fetch the code that the model brings, too.
    """
    if source.revision is None:
        return source
    wanted = (*_WANTED, *_CODE) if with_code else _WANTED
    return Source(source.name, fetch_files(source.name, source.revision, wanted, _UNWANTED), source.revision)


def fetch_code(source: Source) -> None:
    """Fetch the code that a hub model brings, before its weights. Raises as `locate`."""
    if source.revision is not None:
        fetch_files(source.name, source.revision, _CODE, _UNWANTED)


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


def again(source: Source, file: str) -> str:
    """What to do about a file of a model that is broken or missing, in words for a hint."""
    if source.builtin:
        return "install plphp-cli again"
    if source.revision is None:
        return "copy or save the model into the folder again"
    # The cache would go on giving out the copy that it has.
    return f"fetch it again: hf download {source.name} {file} --revision {source.revision} --force-download"


def weight_files(source: Source, ask: bool = True) -> list[Path]:
    """The model's weight files.

    Args:
        source: the model.
        ask: the hub what its repository holds, should weights be missing.

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
                f"{index.name} of {source.name} is broken: {error}", hint=again(source, index.name)
            ) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise _lacks(source, missing, ask)
    return files


def _lacks(source: Source, missing: list[str], ask: bool) -> ModelError:
    """What is said of a model without these weights: why fetching it again would help, or would not."""
    lacks = f"lacks the weights {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
    others = [path.name for pattern in ("*.bin", "*.pt*") for path in source.folder.glob(pattern)]
    if source.revision is not None and ask:
        served = [name for name in repository_files(source.name, source.revision) or () if "/" not in name]
        stored = [name for name in served if name.endswith((".bin", ".pt", ".pth"))]
        if stored and not any(name.endswith(".safetensors") for name in served):
            return ModelError(
                f"the repository of {source.name} has no safetensors weights, only {stored[0]}",
                hint=ONLY_SAFETENSORS,
            )
        # Without the table of contents the names of the weights are not known.
        known = "model.safetensors.index.json" not in served or "-of-" in missing[0]
        if served and known and missing[0] not in served:
            return ModelError(
                f"the repository of {source.name} {lacks}", hint="name another revision, or another model"
            )
    hint = ONLY_SAFETENSORS if others else INCOMPLETE
    return ModelError(f"{source.name} {lacks}", hint=hint)


def _unknown(name: str) -> ModelError:
    return ModelError(f"unknown model {name!r}", hint=_close(name) or _EXPECTED)


def _close(name: str) -> str | None:
    """A question that names the known model most like `name`."""
    known = [other for other in _known_names(name) if other != name]
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else None


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
