import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from families import as_prompt
from huggingface_hub import constants
from toy_model import TOKENS_PER_IMAGE
from transformers import (
    CLIPVisionConfig,
    Florence2Config,
    Gemma2Config,
    LlamaConfig,
    LlavaConfig,
)

from plphp_cli.attention import prune
from plphp_cli.card import describe, parse_size
from plphp_cli.cli.app import main
from plphp_cli.errors import UnsupportedError, UsageError
from plphp_cli.models import decoder_weight_bytes
from plphp_cli.prefilling import prefill
from plphp_cli.reports.card import card_report, verdict
from plphp_cli.serialize import parse, to_json
from plphp_cli.support import FULL, SLIDING, layer_kinds


def is_that_of_the_model(row, folder):
    row.model.config.save_pretrained(folder)
    card = describe(str(folder), device="cpu", dtype="float32", context=100)
    assert card.parameters == sum(parameter.numel() for parameter in row.model.parameters())
    assert card.weight_bytes == 4 * card.parameters
    assert card.step_bytes == decoder_weight_bytes(row.loaded)
    kinds = layer_kinds(row.model.config)
    assert card.layers == {kind: kinds.count(kind) for kind in kinds}
    inputs = row.prompts[0]
    with prune(row.model, None) as pruner:
        prefill(row.loaded, as_prompt(inputs), pruner)
    tokens = inputs["input_ids"].shape[1]
    held = {
        kind: sum(s.full_bytes for s, k in zip(pruner.layers, kinds, strict=True) if k == kind)
        for kind in kinds
    }
    assert card.kv_bytes_per_token * tokens == held[FULL]
    if SLIDING in kinds:
        assert card.sliding_bytes_per_token * min(tokens, card.sliding_tokens) == held[SLIDING]
    sliding = card.sliding_bytes_per_token * min(100, card.sliding_tokens or 100)
    assert card.fit.kv_bytes == card.kv_bytes_per_token * 100 + sliding
    assert card.fit.needed_bytes == card.weight_bytes + card.fit.kv_bytes
    # A folder with a config and nothing else: no weights, and no processor.
    assert (card.stored_bytes, card.image.vision_tokens) == (None, None)
    assert card.image.unknown


def test_the_card_of_a_family_is_that_of_its_model(family, tmp_path):
    is_that_of_the_model(family, tmp_path)


def test_the_card_of_a_relative_is_that_of_its_model(relative, tmp_path):
    is_that_of_the_model(relative, tmp_path)


def test_a_model_of_seven_billion_parameters_is_described_in_its_published_figures(tmp_path):
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=LlamaConfig(vocab_size=32064, max_position_embeddings=4096),
        image_token_id=32000,
    )
    config.save_pretrained(tmp_path)
    card = describe(str(tmp_path), dtype="float16", device="cpu")
    assert 7.05e9 < card.parameters < 7.08e9  # llava-hf/llava-1.5-7b-hf
    assert card.kv_bytes_per_token == 512 * 1024
    assert card.fit.context_tokens == 4096
    assert "7.06 billion" in card_report(card, 80)


@pytest.fixture
def without_weights(toy, tmp_path):
    folder = tmp_path / "toy"
    shutil.copytree(toy, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_no_weights_are_needed_and_the_processor_counts_the_tokens(toy, without_weights):
    whole, card = (describe(str(folder), image_size=(640, 480)) for folder in (toy, without_weights))
    assert card.image.vision_tokens == TOKENS_PER_IMAGE
    assert card.image.kv_bytes == TOKENS_PER_IMAGE * card.kv_bytes_per_token
    assert card.image.prompt_tokens > TOKENS_PER_IMAGE
    assert 0 <= whole.stored_bytes - whole.weight_bytes < 20_000  # the header of the file
    assert card.stored_bytes is None
    assert parse(type(card), to_json(card)) == card


def test_a_hub_model_is_described_from_what_was_fetched_of_it(without_weights, tmp_path, monkeypatch):
    home = tmp_path / "hub" / "models--some-org--toy-llava"
    shutil.copytree(without_weights, home / "snapshots" / ("a" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    card = describe("some-org/toy-llava")
    assert (card.name, card.revision) == ("some-org/toy-llava", "a" * 40)
    assert card.image.vision_tokens == TOKENS_PER_IMAGE


def test_what_does_not_fit_is_said_with_what_to_try(without_weights):
    few, many = (describe(str(without_weights), device="cpu", context=n) for n in (1, 1 << 40))
    assert few.fit.fits
    assert "fits" in verdict(few)
    assert many.fit.fits is False
    assert "does not fit" in verdict(many)
    assert "--dtype bfloat16" in verdict(many)
    assert many.kv_share_of_step > 0.99 > few.kv_share_of_step


def test_the_dtype_is_the_configs_unless_one_is_named(without_weights):
    assert describe(str(without_weights), dtype="bfloat16").dtype == "bfloat16"
    path = without_weights / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"dtype": "bfloat16"}))
    half = describe(str(without_weights))
    assert (half.dtype, half.weight_bytes) == ("bfloat16", 2 * half.parameters)
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("dtype", None)
    path.write_text(json.dumps(config))
    card = describe(str(without_weights), device="cpu")
    assert card.dtype == "float32"
    assert any("assumed" in note for note in card.notes)


def test_quantised_weights_are_as_large_as_their_files(toy, without_weights):
    plain = describe(toy)
    for folder, stored in ((without_weights, None), (without_weights, 12_345)):
        path = folder / "config.json"
        quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
        path.write_text(json.dumps(json.loads(path.read_text()) | quantised))
        if stored is not None:
            index = {"metadata": {"total_size": stored}, "weight_map": {}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        card = describe(str(folder))
        assert card.parameters == plain.parameters
        assert card.weight_bytes == (stored or plain.weight_bytes)
        assert card.step_bytes == plain.step_bytes * card.weight_bytes // plain.weight_bytes
        assert any("quantised" in note for note in card.notes)


def test_a_name_cannot_write_to_the_terminal(without_weights, capsys):
    odd = without_weights.rename(without_weights.parent / "odd\x1b[31m\nname")
    assert main(["models", str(odd)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "odd\\x1b[31m\\nname" in out.splitlines()[0]


def test_a_processor_that_refuses_the_image_costs_the_figure_alone(without_weights):
    (without_weights / "chat_template.jinja").write_text("{{- messages[0].nothing.at.all -}}")
    card = describe(str(without_weights))
    assert card.image.vision_tokens is None
    assert "chat template" in card.image.unknown
    report = card_report(card, 80)
    assert any(line.endswith("N/A: the chat template fails") for line in report.splitlines())
    assert "".join(card.image.unknown.split()) in "".join(report.split())  # a long path is broken
    assert max(map(len, report.splitlines())) <= 80


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="needs an environment without torchvision")
def test_a_processor_without_its_package_names_the_extra(without_weights):
    path = without_weights / "processor_config.json"
    config = json.loads(path.read_text()) | {"processor_class": "LlavaOnevisionProcessor"}
    config["video_processor"] = {"video_processor_type": "LlavaOnevisionVideoProcessor"}
    path.write_text(json.dumps(config))
    report = card_report(describe(str(without_weights)), 80)
    assert any(line.endswith("N/A: the processor needs torchvision") for line in report.splitlines())
    assert "plphp-cli[vision]" in report


def test_a_capped_decoder_is_told_to_run_on_eager_attention(without_weights):
    path = without_weights / "config.json"
    config = json.loads(path.read_text())
    assert not any("--attn eager" in note for note in describe(str(without_weights)).notes)
    text = Gemma2Config(
        vocab_size=config["text_config"]["vocab_size"],
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attn_logit_softcapping=50.0,
    )
    path.write_text(json.dumps(config | {"text_config": text.to_dict()}))
    assert any("--attn eager" in note for note in describe(str(without_weights)).notes)


@pytest.mark.parametrize(
    "text", ["", "x", "640", "640x", "x480", "0x10", "640x480x3", "-1x5", "a*b", "٣x٤", "99999x9"]
)
def test_an_image_size_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="image size"):
        parse_size(text)
    assert parse_size("640X480") == (640, 480)


def test_a_refused_type_says_why(tmp_path, capsys):
    Florence2Config().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        describe(str(tmp_path))
    assert main(["models", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "encoder-decoder" in err


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["no-org/no-model"], 1, "not in the local cache"),
        (["nothing"], 2, "unknown model 'nothing'"),
        (["builtin", "--image-size", "big"], 2, "WIDTHxHEIGHT"),
        (["builtin", "--context", "0"], 2, "context = 0"),
        (["builtin", "--dtype", "int3"], 2, "int3"),
        (["builtin", "--json", "/no/such/folder/x.json"], 2, "/no/such/folder"),
        (["--image-size", "640x480"], 2, "--image-size is about one model"),
        (["--context", "5"], 2, "--context is about one model"),
        (["--dtype", "bfloat16"], 2, "--dtype is about one model"),
        (["--device", "cpu"], 2, "--device is about one model"),
        (["builtin", "--refused"], 2, "--refused is about all models"),
        (["no-org/no-model", "--device", "cuda:x"], 2, "device 'cuda:x'"),
    ],
)
def test_bad_input_is_one_line_and_a_hint(words, code, named, capsys):
    assert main(["models", *words]) == code
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert named in lines[0]
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2


def test_a_broken_folder_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert main(["models", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


def test_stdout_is_the_card_or_the_record(without_weights, tmp_path, capsys):
    assert main(["models", str(without_weights), "--json", str(tmp_path / "card.json")]) == 0
    out = capsys.readouterr().out
    assert f"{TOKENS_PER_IMAGE} vision tokens" in out
    assert main(["models", str(without_weights), "--json", "-"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "card.json").read_text())
    assert record["image"]["vision_tokens"] == TOKENS_PER_IMAGE


def test_of_a_hub_model_everything_but_the_weights_is_fetched(toy, tmp_path):
    hub_server = pytest.importorskip("hub_server")
    with hub_server.serving(hub_server.Hub(folders={"org/toy": Path(toy)})) as hub:
        run = subprocess.run(
            [sys.executable, "-m", "plphp_cli", "models", "org/toy", "--json", "-"],
            env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"},
            stdout=subprocess.PIPE,
            check=True,
        )
    card = json.loads(run.stdout)
    assert card["image"]["vision_tokens"] == TOKENS_PER_IMAGE
    assert card["revision"] == hub_server.COMMITS["main"]
    assert any("tokenizer.json" in line for line in hub.asked)
    assert not any(line.partition("?")[0].split()[1].endswith(".safetensors") for line in hub.asked)
    assert not list(tmp_path.rglob("*.safetensors"))
