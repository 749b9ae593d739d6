"""Which models there are: the families with what is proven for each, and those in the local hub cache.

Importing it does not import torch or transformers.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from plphp_cli import families
from plphp_cli.environment import package_version
from plphp_cli.memory import known
from plphp_cli.serialize import SCHEMA_VERSION


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
    """A model in the hub's local cache; `bytes` on disk, `verdict` from its `config.json`."""

    name: str
    bytes: int | None
    model_type: str | None
    proven: bool
    verdict: str


@dataclass(frozen=True)
class Inventory:
    """The families, and the models in the local hub cache."""

    families: tuple[FamilyRow, ...]
    refused: dict[str, str]
    cache_folder: str
    cached: tuple[CachedModel, ...]
    torchvision: str | None
    schema_version: int = SCHEMA_VERSION


def take_inventory() -> Inventory:
    """The families, and what lies in the local hub cache."""
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
    return Inventory(rows, dict(families.REFUSED), str(folder), cached, package_version("torchvision"))


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


def _cached(cache: Path, name: str) -> CachedModel:
    home = cache / f"models--{name.replace('/', '--')}"
    model_type = known(lambda: _model_type(home))
    family = families.find(model_type)
    if model_type is None:
        verdict = "no config.json that can be read"
    elif family is not None:
        verdict = family.title
    else:
        verdict = families.REFUSED.get(model_type, "not among the proven families")
    return CachedModel(name, folder_bytes(home), model_type, family is not None, verdict)


def _model_type(home: Path) -> str | None:
    main = known(lambda: (home / "refs" / "main").read_text(encoding="utf-8").strip())
    found = [home / "snapshots" / main / "config.json"] if main else []
    found += sorted(home.glob("snapshots/*/config.json"))
    path = next(path for path in found if path.is_file())
    kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    return kind if isinstance(kind, str) else None
