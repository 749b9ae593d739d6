import json
from pathlib import Path

import pytest
from PIL import Image
from toy_model import save_toy_llava

from plphp_cli.cli.app import main
from plphp_cli.config import PLPHPConfig
from plphp_cli.images import load_image
from plphp_cli.models import load, prepare
from plphp_cli.prefilling import prefill
from plphp_cli.pruning import FixedRates
from plphp_cli.quality import kl, teacher_forced


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return str(save_toy_llava(tmp_path_factory.mktemp("toy")))


@pytest.fixture
def data(tmp_path):
    rows = []
    for number, colour in enumerate(("red", "blue", "green")):
        Image.new("RGB", (40, 30 + number), colour).save(tmp_path / f"{colour}.png")
        rows.append({"images": [f"{colour}.png"], "prompt": f"what is in image {number}?"})
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def run(toy, data, out, *more):
    options = ["--model", toy, "--data", str(data), "--out", str(out), "--max-new-tokens", "6", *more]
    return main(["calibrate", *options])


def test_the_config_written_is_the_record_and_its_thresholds_are_the_models_own_quantiles(
    toy, data, tmp_path, capsys
):
    out = tmp_path / "config.json"
    assert run(toy, data, out, "--r", "0.3", "--delta-r", "0.1", "--json", "-") == 0
    record = json.loads(capsys.readouterr().out)
    config = PLPHPConfig.from_file(out)
    assert record["config"] == config.to_dict()
    assert config.calibrated
    assert (config.r, config.delta_r) == (0.3, 0.1)
    gammas = []
    loaded = load(toy)
    from plphp_cli.attention import prune

    for line in data.read_text().splitlines():
        row = json.loads(line)
        prompt = prepare(loaded, [load_image(data.parent / row["images"][0])], row["prompt"])
        with prune(loaded.model, FixedRates({})) as pruner:
            gammas.append([layer.gamma for layer in prefill(loaded, prompt, pruner).state.layers])
    pool = sorted(g for row in gammas for layer, g in enumerate(row) if layer not in config.skip_layers)
    below = sum(g < config.beta for g in pool)
    above = sum(g > config.alpha for g in pool)
    assert abs(below - len(pool) / 3) <= 1
    assert abs(above - len(pool) / 3) <= 1
    for layer, mean in enumerate(record["gamma"]):
        assert mean == pytest.approx(sum(row[layer] for row in gammas) / 3)


def test_need_is_the_divergence_when_the_layer_alone_loses_its_vision_cache(toy, data, tmp_path, capsys):
    one = tmp_path / "one.jsonl"
    one.write_text(data.read_text().splitlines()[0], encoding="utf-8")
    assert run(toy, one, tmp_path / "c.json", "--json", "-") == 0
    record = json.loads(capsys.readouterr().out)
    loaded = load(toy)
    prompt = prepare(loaded, [load_image(tmp_path / "red.png")], "what is in image 0?")
    from plphp_cli.decoding import Done
    from plphp_cli.generate import stream
    from plphp_cli.sampling import Settings

    *_, done = stream(loaded, prompt, None, Settings(max_new_tokens=6))
    assert isinstance(done, Done)
    whole = teacher_forced(loaded, prompt, None, done.token_ids)
    for layer, need in enumerate(record["need"]):
        without = teacher_forced(loaded, prompt, FixedRates({layer: 0.0}), done.token_ids)
        assert need == pytest.approx(kl(whole, without)[1:].mean().item(), abs=1e-5)


def test_a_system_message_holds_for_the_prompts_of_a_file_that_have_none(toy, data, tmp_path, capsys):
    row = json.loads(data.read_text().splitlines()[0])
    found = []
    for own, typed in (({}, []), ({}, ["--system", "brief!"]), ({"system": "brief!"}, ["--system", "long"])):
        one = tmp_path / "one.jsonl"
        one.write_text(json.dumps(row | own), encoding="utf-8")
        assert run(toy, one, tmp_path / "c.json", "--json", "-", "--force", *typed) == 0
        found.append(json.loads(capsys.readouterr().out)["gamma"])
    assert found[0] != found[1] == found[2]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--quantiles", "0.9", "0.1"], "quantiles"),
        (["--quantiles", "0.5"], "quantiles"),
        (["--max-new-tokens", "0"], "max-new-tokens"),
        (["--image", "x.png"], "--data"),
        (["--r", "2"], "r = 2"),
        (["--system", " "], "the system message is blank"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(toy, data, tmp_path, capsys, more, named):
    out = tmp_path / "c.json"
    assert run(toy, data, out, *more) == 2
    streams = capsys.readouterr()
    errors = [line for line in streams.err.splitlines() if line.startswith("error: ")]
    assert streams.out == ""
    assert len(errors) == 1
    assert named in errors[0]
    assert not out.exists()


def test_an_existing_config_is_kept_unless_forced(toy, data, tmp_path, capsys):
    out = tmp_path / "c.json"
    out.write_text("mine", encoding="utf-8")
    assert run(toy, data, out) == 2
    assert "c.json" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert run(toy, data, out, "--force") == 0
    assert PLPHPConfig.from_file(out).calibrated


def test_a_prompt_without_an_image_has_no_gamma(toy, tmp_path, capsys):
    path = tmp_path / "text.jsonl"
    path.write_text('{"prompt": "hello"}', encoding="utf-8")
    assert run(toy, path, tmp_path / "c.json") == 2
    assert "image" in capsys.readouterr().err
    assert not Path(tmp_path / "c.json").exists()
