"""How weights lie on this machine: in the list of the cache, and on a model's card."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from plphp_cli.card import describe
from plphp_cli.inventory import take_inventory
from plphp_cli.models.sources import Source
from plphp_cli.models.weights import ABSENT, DAMAGED, FOREIGN, PARTIAL, WHOLE, weights_state
from plphp_cli.reports.card import card_report
from plphp_cli.reports.inventory import inventory_report

COMMIT = "a" * 40


def whole(folder: Path) -> None:
    """As it is."""


def absent(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def begun(folder: Path) -> None:
    absent(folder)
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    (blobs / "0123.incomplete").write_bytes(b"half of it")


def shards(folder: Path) -> None:
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    (folder / "model.safetensors").rename(folder / first)
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": first, "b": second}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


CASES = [
    (whole, WHOLE, None),
    (absent, ABSENT, "not here yet (`plphp run --model org/toy` fetches"),
    (begun, PARTIAL, "lacks the weights model.safetensors (`plphp run --model org/toy` fetches"),
    (shards, PARTIAL, "lacks the weights model-00002-of-00002.safetensors (`plphp run"),
    (pickled, FOREIGN, "lacks the weights model.safetensors (only safetensors are read"),
    (truncated, DAMAGED, "are expected (fetch it again: hf download org/toy model.safetensors"),
    (pointer, DAMAGED, "is a Git LFS pointer"),
]


@pytest.fixture
def snapshot(toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy model in a hub cache of its own."""
    home = tmp_path / "models--org--toy"
    shutil.copytree(toy, home / "snapshots" / COMMIT)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return home / "snapshots" / COMMIT


@pytest.mark.parametrize(("harm", "state", "note"), CASES)
def test_weights_of_the_hub_cache(harm, state, note, snapshot: Path) -> None:
    harm(snapshot)
    inventory = take_inventory()
    card = describe("org/toy", device="cpu")
    (cached,) = inventory.cached
    assert cached.weights == card.weights_state == state
    # Weights that were never asked for are nothing to put right.
    assert cached.problem == (None if state == ABSENT else next(iter(card.notes), None))
    assert cached.proven
    listed, shown = inventory_report(inventory, 80), card_report(card, 80)
    assert f" {state} " in listed
    for text in (listed, shown):
        assert max(map(len, text.splitlines())) <= 80
    assert (state == WHOLE) == ("note:" not in shown)
    if note is not None:
        assert note in " ".join(card.notes)
        assert f"({state})" in " ".join(shown.split())


@pytest.mark.parametrize(("harm", "state", "note"), CASES)
def test_weights_of_a_folder(harm, state, note, snapshot: Path) -> None:
    harm(snapshot)
    found = weights_state(Source("folder", snapshot, None))
    # What a download left belongs to the cache.
    assert found.state == (ABSENT if harm is begun else state)
    assert (found.note is None) == (state == WHOLE)
    assert "plphp run" not in (found.note or "")
    assert "hf download" not in (found.note or "")


def test_only_headers_are_read(toy: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy, tmp_path / "toy"))
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:length] + bytes(len(content) - length))
    assert weights_state(Source("toy", folder, None)).state == WHOLE
