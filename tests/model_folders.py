"""Folders of models that are changed until they are refused."""

import json
from pathlib import Path

import pytest

from plphp_cli import models
from plphp_cli.errors import ModelError, PLPHPError


def refused(name: object, message: str, kind: type[PLPHPError] = ModelError, **options: object) -> PLPHPError:
    """The error, of one line, with which a model is refused."""
    with pytest.raises(kind, match=message) as caught:
        models.load(str(name), **{"device": "cpu", **options})
    assert "\n" not in caught.value.message
    return caught.value


def change_config(folder: Path, **changes: object) -> None:
    """Give a folder's config other values."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
