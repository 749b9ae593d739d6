import json
import re
import subprocess
import sys

import pytest
from huggingface_hub import constants
from toy_model import save_toy_llava

from plphp_cli import families
from plphp_cli.card import describe
from plphp_cli.cli.app import main
from plphp_cli.errors import PLPHPError
from plphp_cli.inventory import folder_bytes, refused_types, take_inventory
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
        elif not config:
            continue
        else:
            (snapshot / "config.json").write_text(json.dumps(config))
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text("e" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_the_cache_is_listed_with_sizes_and_what_is_known_of_each_type(hub):
    toy, text, robot, empty = take_inventory().cached
    assert (toy.name, toy.model_type, toy.proven) == ("a/toy", "llava", True)
    assert toy.bytes == sum(path.stat().st_size for path in hub.glob("models--a--toy/**/*") if path.is_file())
    assert (text.model_type, text.proven) == ("llama", False)
    assert "a robot's policy" in robot.verdict
    assert (empty.model_type, empty.bytes, empty.verdict) == (None, 0, "its config.json is not here")


def test_a_cached_model_is_refused_in_the_words_of_its_own_card(hub):
    refused = [model for model in take_inventory().cached if model.model_type and not model.proven]
    assert len(refused) == 2
    for model in refused:
        with pytest.raises(PLPHPError) as caught:
            describe(model.name)
        assert caught.value.message == model.verdict


def test_the_config_decides_and_not_the_type_alone(hub):
    path = next(hub.glob("models--a--toy/snapshots/*/config.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_token_id": None}))
    toy = take_inventory().cached[0]
    assert (toy.model_type, toy.proven) == ("llava", False)
    assert "image token" in toy.verdict


def test_every_refused_type_is_listed_with_its_reason(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert main(["models", "--refused"]) == 0
    listed = capsys.readouterr().out.partition("-- refused")[2]
    assert max(map(len, listed.splitlines())) <= 80
    found = {each.model_type: each.reason for each in refused_types()}
    assert "encoder-decoder" in found["florence2"]
    assert "cross-attention" in found["mllama"]
    squeezed = "".join(listed.split())
    for kind, reason in found.items():
        assert families.find(kind) is None
        assert "".join(reason.split()) in squeezed
        assert kind not in reason
        assert re.search(rf"[ \n]{re.escape(kind)}[,\n]", listed)


def test_what_is_refused_is_said_without_asking_for_every_type(hub, capsys):
    assert main(["models"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for kind in (*families.Assumption, *families.REFUSED):
        assert kind in said
    assert "plphp models --refused" in said


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
