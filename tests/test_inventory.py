import json
import subprocess
import sys

import pytest
from huggingface_hub import constants
from toy_model import save_toy_llava

from plphp_cli import families
from plphp_cli.cli.app import main
from plphp_cli.inventory import folder_bytes, take_inventory
from plphp_cli.reports.inventory import inventory_report


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache with a proven model, one of another type, a refused one and one without a config."""
    configs = {
        "a/toy": None,
        "b/text": {"model_type": "llama"},
        "c/robot": {"model_type": "pi0"},
        "d/empty": {},
    }
    for name, config in configs.items():
        home = tmp_path / f"models--{name.replace('/', '--')}"
        snapshot = home / "snapshots" / ("e" * 40)
        snapshot.mkdir(parents=True)
        if config is None:
            save_toy_llava(snapshot)
        elif config:
            (snapshot / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_the_cache_is_listed_with_sizes_and_what_is_known_of_each_type(hub):
    toy, text, robot, empty = take_inventory().cached
    assert (toy.name, toy.model_type, toy.proven) == ("a/toy", "llava", True)
    assert toy.bytes == sum(path.stat().st_size for path in hub.glob("models--a--toy/**/*") if path.is_file())
    assert (text.proven, text.verdict) == (False, "not among the proven families")
    assert robot.verdict == families.REFUSED["pi0"]
    assert (empty.model_type, empty.bytes, empty.verdict) == (None, 0, "no config.json that can be read")


def test_links_count_once(tmp_path):
    (tmp_path / "blob").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "blob")
    assert folder_bytes(tmp_path) == 5
    assert folder_bytes(tmp_path / "nothing") is None


@pytest.mark.parametrize("width", [60, 80, 132])
def test_every_family_type_and_model_is_on_the_page(hub, width):
    report = inventory_report(take_inventory(), width)
    # Cells are wrapped, so the words of a column do not stand in one line.
    squeezed = "".join(report.split())
    for family in families.FAMILIES:
        for name in family.types:
            assert name + ("*" if name in family.brief else "") in squeezed
    briefs = sum(len(family.brief) for family in families.FAMILIES)
    assert squeezed.count("*") == briefs + 1  # and its explanation
    assert max(map(len, report.splitlines())) <= max(width, 76)
    for name in ("a/toy", "b/text", "c/robot", "d/empty"):
        assert name in report


def test_json_is_the_whole_inventory(hub, capsys):
    assert main(["models", "--json", "-"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [row["title"] for row in record["families"]] == [family.title for family in families.FAMILIES]
    assert {row["title"] for row in record["families"] if row["torchvision"]} == {
        family.title for family in families.FAMILIES if family.torchvision
    }
    assert [row["name"] for row in record["cached"]] == ["a/toy", "b/text", "c/robot", "d/empty"]


def test_an_empty_cache_says_where_it_looked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "nowhere"))
    assert main(["models"]) == 0
    assert "no models in" in capsys.readouterr().out


def test_the_list_needs_no_torch():
    program = (
        "import sys; from plphp_cli.cli.app import main; code = main(['models']); "
        "sys.exit(3 if 'torch' in sys.modules or 'transformers' in sys.modules else code)"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, check=False).returncode
        == 0
    )
