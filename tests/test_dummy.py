"""Decoders at true size without weights: sizes, synthetic caches, and the report that says what it is not."""

import csv
import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch
from test_profile_cli import command, image, toy  # noqa: F401  (fixtures)

from plphp_cli.answering import AnswersRecord
from plphp_cli.attention import prune
from plphp_cli.calibration import CalibrationRecord
from plphp_cli.chat.records import ChatRecord
from plphp_cli.cli.app import main
from plphp_cli.cli.dummy_options import recorded_rates
from plphp_cli.errors import DeviceMemoryError, UsageError
from plphp_cli.models import decoder_weight_bytes
from plphp_cli.models.dummy import check_room, dummy_prompt, load_dummy
from plphp_cli.models.shapes import SHAPES
from plphp_cli.prefilling import prefill
from plphp_cli.profiling.records import (
    ArmsRecord,
    LayerProfile,
    PlanRecord,
    ProfileRecord,
    QualityRecord,
    from_json,
)
from plphp_cli.profiling.state import DummyPlan
from plphp_cli.reports.profile_html import profile_html
from plphp_cli.results import RunRecord
from plphp_cli.serialize import to_json
from plphp_cli.sweep.records import SweepRecord
from plphp_cli.synthetic import synthetic_prefilled

RATES = (0.7, 0.1)


def of_nothing(record):
    """The JSON of a record as far as its class tells it: every key, with its default or null."""
    values = {each.name: each.default for each in dataclasses.fields(record)}
    return json.dumps({k: None if v is dataclasses.MISSING else v for k, v in values.items()}).encode()


def profile_of(layers):
    plan, quality = PlanRecord(1, 1, 1), QualityRecord()
    return ProfileRecord("m", None, plan, ArmsRecord(), {}, None, quality, layers, ())


@pytest.fixture(scope="module")
def dummy(tmp_path_factory):
    """Of a toy's config alone."""
    from toy_model import save_toy_llava

    folder = save_toy_llava(tmp_path_factory.mktemp("toy"))
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    return load_dummy(str(folder), device="cpu"), str(folder)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llava-1.5-7b", 6.61),
        ("llava-onevision-7b", 7.07),
        ("qwen2.5-vl-7b", 7.07),
        ("internvl3-8b", 7.07),
        ("llava-onevision-0.5b", 0.494),
        ("qwen2.5-vl-3b", 3.09),
    ],
)
def test_shapes_have_the_parameters_that_their_models_are_known_for(name, billions):
    """Of decoder layers, final norm and output head; counted on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(SHAPES[name])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    whole = sum(p.numel() for p in model.parameters())
    table = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    assert (whole - table) / 1e9 == pytest.approx(billions, rel=0.01)


def test_the_same_seed_gives_the_same_weights_and_none_is_left_as_it_was_found(dummy):
    loaded, folder = dummy
    again = load_dummy(folder, device="cpu")
    other = load_dummy(folder, device="cpu", seed=1)
    for one, two in zip(loaded.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)
        assert one.isfinite().all()
    head, other_head = (one.model.get_output_embeddings().weight for one in (loaded, other))
    assert not torch.equal(head, other_head)
    assert 0.015 < head.std() < 0.025
    assert decoder_weight_bytes(loaded) > 0


def test_a_prefilled_dummy_is_cut_at_the_given_rates(dummy):
    loaded, _ = dummy
    prompt = dummy_prompt(loaded, vision_tokens=30, images=4, text_tokens=10)
    assert prompt.image_tokens == (8, 8, 7, 7)
    layers = loaded.model.config.get_text_config().num_hidden_layers
    with torch.no_grad(), prune(loaded.model, DummyPlan(30, 4, RATES).policy(layers)) as pruner:
        run = prefill(loaded, prompt, pruner, 5)
    assert [state.vision_tokens for state in run.state.layers] == [
        21 if i % 2 == 0 else 3 for i in range(layers)
    ]
    made = synthetic_prefilled(loaded, prompt, RATES, room=5)
    for one, two in zip(run.cache.layers, made.cache.layers, strict=True):
        assert (one.seen, one.held, one.allocated_bytes) == (two.seen, two.held, two.allocated_bytes)
        assert two.keys.isfinite().all()
        assert two.keys.std() > 0.5, "untouched memory is no dummy"
    assert torch.equal(run.positions, made.positions)


def test_the_report_says_that_it_is_of_dummy_weights(command, dummy, tmp_path, capsys):  # noqa: F811
    _, folder = dummy
    target, rows, page = (tmp_path / f"dummy.{kind}" for kind in ("json", "csv", "html"))
    words = ["profile", "--dummy-weights", "--model", folder, "--vision-tokens", "40", "--images", "2"]
    words += ["--layer-rates", "0.5,0.1", "--batch-size", "2", "--compare-stock", "--repeats", "2"]
    words += ["--max-new-tokens", "18", "--csv", str(rows), "--html", str(page), "--json", str(target)]
    assert main(words) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Dummy weights: speed and memory only" in printed
    assert "such images, 1 prompt N/A" not in printed
    # What is N/A has its reason, and what scores would tell is left out whole.
    assert "TTFT and end to end are N/A" in printed
    assert "what is kept, by the given rates" in printed
    assert not any(f" {word} " in printed for word in ("gamma 0 to", "group"))
    record = from_json(target.read_text(encoding="utf-8"))
    assert record.dummy.layer_rates == (0.5, 0.1)
    assert record.batch_size == 2
    assert record.prompts[0].prompt == "40 synthetic vision tokens in 2 images"
    assert record.quality.kl_mean is None
    assert record.arms.pruned.ttft_s is None, "nothing was preprocessed, so TTFT is not known"
    assert record.arms.pruned.prefill_s > 0
    assert record.arms.pruned.decode_tokens_per_s > 0
    assert all(layer.gamma is None for layer in record.layers), "random weights have no scores to tell of"
    assert page.read_text(encoding="utf-8") == profile_html(record)
    assert "Dummy weights" in profile_html(record)
    # The knobs of pruning had no say: what is shown is what was given in their place.
    assert record.config is None
    assert record.environment["config"] is None
    assert "<br>layer rates 0.5, 0.1 repeated over the layers</p>" in profile_html(record)
    told = {row["figure"]: row["value"] for row in csv.DictReader(rows.open(encoding="utf-8"))}
    assert (told["batch_size"], told["dummy.vision_tokens"], told["dummy.images"]) == ("2", "40", "2")
    assert told["dummy.layer_rates"] == "[0.5, 0.1]"
    assert not any(name.startswith("config") for name in told)
    assert not {"gamma", "group", "overlap"} & set(
        re.findall(r'<th scope="col">([^<]*)</th>', profile_html(record))
    )
    # Images are those of the synthetic prompt, which has 20 of its vision tokens in each.
    assert all(capacity.images > 0 for capacity in record.bound.capacity.values())

    # The rates of a recorded profile serve the next one.
    again = tmp_path / "again.json"
    words[words.index("--layer-rates") : words.index("--batch-size")] = ["--rates-from", str(target)]
    words[words.index("--csv") :] = ["--json", str(again)]
    assert main(words) == 0
    taken = from_json(again.read_text(encoding="utf-8")).dummy
    assert taken.layer_rates[:2] == (0.5, 0.1)
    assert taken.rates_from == str(target)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "No such file"),
        (b"\xff\xfe", "is not text"),
        (b" \n", "is empty"),
        (b"not json", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[0.5]", "is a JSON list"),
        (b'{"r": 0.4, "alpha": 0.3}', "is a config of pruning"),
        (b"{}", "is another JSON object"),
        (b'{"command": ["x"]}', "is another JSON object"),
        (of_nothing(RunRecord), "is a record of plphp run,"),
        (of_nothing(AnswersRecord), "is a record of plphp run --data,"),
        (of_nothing(ChatRecord), "is a record of plphp run --chat,"),
        (of_nothing(SweepRecord), "is a record of plphp sweep,"),
        (of_nothing(CalibrationRecord), "is another JSON object"),
        (of_nothing(ProfileRecord), "is a profile that cannot be read: ProfileRecord.model = None"),
    ],
)
def test_rates_from_another_file_names_it_and_what_was_expected(tmp_path, capsys, content, named):
    path = tmp_path / "rates.json"
    if content is not None:
        path.write_bytes(content)
    assert main(["profile", "--dummy-weights", "--model", "llava-1.5-7b", "--rates-from", str(path)]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert str(path) in error
    assert named in error
    assert hint.startswith("hint: --rates-from takes a file that plphp profile --json wrote")


def test_rates_from_a_folder_or_out_of_range_are_refused(tmp_path):
    with pytest.raises(UsageError, match="is a folder, not a profile"):
        recorded_rates(tmp_path)
    layer = LayerProfile(0, None, None, 1.5, None, None, None, None, None, None)
    path = tmp_path / "profile.json"
    path.write_text(to_json(profile_of((layer,))), encoding="utf-8")
    with pytest.raises(UsageError, match=r"has the rate 1\.5; expected numbers in \[0, 1\]"):
        recorded_rates(path)


def test_recorded_rates_are_of_as_many_layers_as_the_model_has(dummy, tmp_path, capsys):
    layer = LayerProfile(0, None, None, 0.5, None, None, None, None, None, None)
    record = profile_of((layer,) * 24)
    paths = [tmp_path / "whole.json", tmp_path / "broken-off.json"]
    for path, found in zip(paths, (record, dataclasses.replace(record, layers=())), strict=True):
        path.write_text(to_json(found), encoding="utf-8")
    _, folder = dummy
    for path, model, named in (
        (paths[0], "llava-1.5-7b", "rates of 24 layers; llava-1.5-7b has 32"),
        (paths[0], folder, f"rates of 24 layers; {folder} has"),
        (paths[1], folder, "has no layers"),
    ):
        assert main(["profile", "--dummy-weights", "--model", model, "--rates-from", str(path)]) == 2
        error = capsys.readouterr().err
        assert str(path) in error
        assert named in error
        assert "--layer-rates" in error
    assert recorded_rates(paths[0]) == (0.5,) * 24


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--model", "llava-1.5-7b"], "--dummy-weights"),
        (["--layer-rates", "0.5"], "--dummy-weights"),
        (["--dummy-weights", "--layer-rates", "0.5,x"], "'x'"),
        (["--dummy-weights", "--layer-rates", "1.5"], "'1.5'"),
        (["--dummy-weights", "--vision-tokens", "0"], "vision-tokens"),
        (["--dummy-weights", "--vision-tokens", "2", "--images", "3"], "3 images"),
        (["--dummy-weights", "--rates-from", "nowhere.json"], "nowhere.json"),
        *(
            (["--dummy-weights", option, value], f"--dummy-weights does not go with {option}: {why}")
            for option, value, why in [
                ("--image", "x.png", "its prompt is synthetic"),
                ("--prompt", "hello", "its prompt is synthetic"),
                ("--data", "x.jsonl", "its prompt is synthetic"),
                ("--system", "be brief", "its prompt is synthetic"),
                ("--max-pixels", "0", "its prompt is synthetic"),
                ("--config", "x.json", "random weights give no scores"),
                ("--delta-r", "0", "random weights give no scores"),
            ]
        ),
        (["--vision-tokens", "0"], "--vision-tokens was given without --dummy-weights"),
        (["--dummy-weights", "--layer-rates", "0.5", "--rates-from", "x"], "exclude"),
        (["--dummy-weights", "--model", "lava-7b"], "llava-1.5-7b"),
        (["--dummy-weights", "--model", "builtin"], "built-in"),
        (["--batch-size", "0", "--image", "x", "--prompt", "y"], "batch-size"),
    ],
)
def test_bad_input_is_one_line(words, named, capsys):
    assert main(["profile", *words]) in (1, 2)
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error


def test_what_the_machine_cannot_hold_is_refused_before_the_kernel_ends_the_process(monkeypatch, dummy):
    loaded, folder = dummy
    weights = sum(weight.nbytes for weight in loaded.model.parameters())
    prompt = dummy_prompt(loaded, 30, 2)
    run = synthetic_prefilled(loaded, prompt, None, 1)
    caches = 3 * sum(layer.held_bytes for layer in run.state.layers)

    def machine_of(size):
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=size))
        monkeypatch.setattr("psutil.swap_memory", lambda: SimpleNamespace(total=0))

    machine_of(weights + caches)
    check_room(loaded, prompt.prompt_tokens, 3)
    machine_of(weights + caches - 1)
    with pytest.raises(DeviceMemoryError, match="weights and caches of 3 x 94 tokens take"):
        check_room(loaded, prompt.prompt_tokens, 3)
    machine_of(weights // 2)
    with pytest.raises(DeviceMemoryError, match=r"weights of .* take .*; this machine has"):
        load_dummy(folder, device="cpu")
