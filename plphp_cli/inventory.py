"""Which models there are: the families with what is proven for each, and those in the local hub cache.

Importing it does not import torch or transformers; telling what a cached model is does.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plphp_cli import families
from plphp_cli.environment import package_version
from plphp_cli.errors import PLPHPError
from plphp_cli.memory import known
from plphp_cli.serialize import SCHEMA_VERSION

if TYPE_CHECKING:
    from plphp_cli.models.sources import Source


@dataclass(frozen=True)
class FamilyRow:
    """One family, and what is proven for it.

    Attributes:
        title: the name that users know it by.
        types: transformers' model types.
        brief: those of them that are held to fewer settings, and without their real processor.
        traits: what is particular, and part of its proof.
        images_told_apart: whether its encoder alone tells which vision tokens belong to which image.
        torchvision: whether its processor needs torchvision.
    """

    title: str
    types: tuple[str, ...]
    brief: tuple[str, ...]
    traits: str
    images_told_apart: bool
    torchvision: bool


@dataclass(frozen=True)
class CachedModel:
    """A model in the hub's local cache.

    Attributes:
        name: its hub id.
        bytes: on disk, of all its revisions.
        model_type: None where there is no config that can be read.
        proven: whether it belongs to one of the families.
        verdict: its family, or why it is refused, as `plphp models NAME` says it.
        weights: how they lie here, one of the words of `models.weights`.
        problem: what is wrong with weights of which there are some, and what to do.
    """

    name: str
    bytes: int | None
    model_type: str | None
    proven: bool
    verdict: str
    weights: str
    problem: str | None = None


@dataclass(frozen=True)
class RefusedType:
    """A type of transformers' image-text-to-text models that belongs to no family, and why it is refused."""

    model_type: str
    reason: str


@dataclass(frozen=True)
class Inventory:
    """The families, and the models in the local hub cache.

    `assumptions` are what models are refused for; `refused` is by name, whatever a config says;
    `refused_types` are all that are refused, where they were asked for.
    """

    families: tuple[FamilyRow, ...]
    assumptions: tuple[str, ...]
    refused: dict[str, str]
    cache_folder: str
    cached: tuple[CachedModel, ...]
    torchvision: str | None
    refused_types: tuple[RefusedType, ...] | None = None
    schema_version: int = SCHEMA_VERSION


def take_inventory(with_refused_types: bool = False) -> Inventory:
    """The families, and what lies in the local hub cache; and every type that is refused, if asked for."""
    from huggingface_hub import constants

    from plphp_cli.models.sources import cached_models

    folder = Path(constants.HF_HUB_CACHE)
    rows = tuple(
        FamilyRow(
            family.title,
            family.types,
            family.brief,
            family.traits,
            family.features == families.IMAGE,
            family.torchvision,
        )
        for family in families.FAMILIES
    )
    cached = tuple(_cached(folder, name) for name in cached_models())
    return Inventory(
        rows,
        tuple(map(str, families.Assumption)),
        dict(families.REFUSED),
        str(folder),
        cached,
        package_version("torchvision"),
        refused_types() if with_refused_types else None,
    )


def folder_bytes(folder: Path) -> int | None:
    """Bytes of the files in a folder and below, links not followed; None when it cannot be read."""
    if not folder.is_dir():
        return None
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            path = Path(where, name)
            if not path.is_symlink():
                total += known(lambda path=path: path.stat().st_size) or 0  # type: ignore[misc]
    return total


def refused_types() -> tuple[RefusedType, ...]:
    """What this transformers maps to image-text-to-text models and is no family's, with what its default
    config is refused for. It imports torch, and takes seconds."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    from plphp_cli.models.loading import quiet
    from plphp_cli.support import check_model

    found = []
    for kind in sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        if families.find(kind) is not None:
            continue
        with quiet():
            config = known(lambda kind=kind: CONFIG_MAPPING[kind]())  # type: ignore[misc]
            try:
                if config is not None:
                    check_model(config)
            except PLPHPError as error:
                found.append(RefusedType(kind, _predicate(error.message, kind, type(config).__name__)))
    return tuple(found)


def _predicate(message: str, kind: str, class_name: str) -> str:
    """What a refusal says of a type, without the type: then those with the same fault say the same."""
    for subject in (f"model type {kind} ", class_name):
        message = message.removeprefix(subject)
    for verb in ("cannot be pruned: ", "is not supported: ", ": "):
        message = message.removeprefix(verb)
    return message.strip()


def _cached(cache: Path, name: str) -> CachedModel:
    from plphp_cli.models.sources import Source, read_config_json
    from plphp_cli.models.weights import ABSENT, WHOLE, weights_state

    home = cache / f"models--{name.replace('/', '--')}"
    snapshot = _snapshot(home)
    if snapshot is None:
        return CachedModel(name, folder_bytes(home), None, False, "its config.json is not here", ABSENT)
    source = Source(name, snapshot, snapshot.name)
    lie = weights_state(source)
    model_type, proven = None, False
    try:
        config_json = read_config_json(source)
        model_type = str(config_json["model_type"])
        verdict = _verdict(source, config_json)
        proven = families.find(model_type) is not None
    except PLPHPError as error:
        verdict = error.message
    problem = None if lie.state in (WHOLE, ABSENT) else lie.note
    return CachedModel(name, folder_bytes(home), model_type, proven, verdict, lie.state, problem)


def _verdict(source: "Source", config_json: dict[str, Any]) -> str:
    """The family of a model. Raises what `card.describe` raises of its config."""
    from plphp_cli.models.loading import quiet, read_config

    with quiet():
        read_config(source, config_json)
    family = families.find(config_json["model_type"])
    return "no family, and nothing in its config against it" if family is None else family.title


def _snapshot(home: Path) -> Path | None:
    """The revision that a name without one stands for, or else any that has a config."""
    main = known(lambda: (home / "refs" / "main").read_text(encoding="utf-8").strip())
    found = [home / "snapshots" / main] if main else []
    found += sorted(home.glob("snapshots/*"))
    return next((folder for folder in found if (folder / "config.json").is_file()), None)
