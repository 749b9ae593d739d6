"""Loading a model by its name: what is loaded, how it is run, and names that mean nothing."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from model_folders import change_config, refused
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

from plphp_cli import models
from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import ModelError, UsageError
from plphp_cli.models import loading, sources


def test_a_folder_loads_as_transformers_loads_it(loaded_toy, toy_folder):
    reference = AutoModelForImageTextToText.from_pretrained(toy_folder).state_dict()
    assert loaded_toy.model.state_dict().keys() == reference.keys()
    assert all(torch.equal(weight, reference[name]) for name, weight in loaded_toy.model.state_dict().items())
    assert (loaded_toy.name, loaded_toy.revision, loaded_toy.builtin) == (str(toy_folder), None, False)
    how = loaded_toy.dtype, loaded_toy.device, loaded_toy.attn
    assert how == (torch.float32, torch.device("cpu"), "sdpa")
    assert not loaded_toy.model.training
    assert not any(weight.requires_grad for weight in loaded_toy.model.parameters())


def test_what_was_chosen_is_said(toy_folder):
    assert any("float32" in note for note in models.load(str(toy_folder)).notes)
    assert models.load(str(toy_folder), dtype="float32", device="cpu").notes == ()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_that_of_the_weights_and_of_the_pixels(toy_folder, pictures, dtype):
    loaded = models.load(str(toy_folder), dtype=dtype, device="cpu")
    prompt = models.prepare(loaded, pictures[:1], "what?")
    assert loaded.dtype == getattr(torch, dtype) == prompt.inputs["pixel_values"].dtype
    assert prompt.inputs["input_ids"].dtype == torch.int64


def test_the_built_in_model_is_float32_on_a_cpu(broken, monkeypatch):
    save_file(
        {name: weight.half() for name, weight in load_file(broken / "model.safetensors").items()},
        broken / "model.safetensors",
        metadata={"format": "pt"},
    )
    change_config(broken, dtype="float16")
    assert models.load(str(broken), device="cpu").dtype == torch.float16
    monkeypatch.setattr(sources, "BUILTIN_FOLDER", broken)
    builtin = models.load(device="cpu")
    assert (builtin.builtin, builtin.name, builtin.dtype) == (True, "builtin", torch.float32)
    assert any("built-in" in note for note in builtin.notes)


def test_only_the_built_in_model_has_a_setting_of_its_own(broken, monkeypatch, loaded_toy):
    PLPHPConfig(r=0.5, calibrated=True, calibrated_on="it").to_file(broken / "plphp_config.json")
    assert models.default_config(models.load(str(broken))) == PLPHPConfig()
    monkeypatch.setattr(sources, "BUILTIN_FOLDER", broken)
    assert models.default_config(models.load()).r == 0.5


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_attention_back_ends(toy_folder, pictures, attn):
    loaded = models.load(str(toy_folder), attn=attn)
    assert loaded.attn == attn == loaded.model.config.get_text_config()._attn_implementation
    loaded.model(**models.prepare(loaded, pictures, "what?").inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "expected auto, cpu"),
        ({"device": "cpu:1"}, "expected auto, cpu"),
        ({"device": "cuda:"}, "expected auto, cpu"),
        ({"device": "cuda:x"}, "expected auto, cpu"),
        ({"dtype": "int8"}, "expected auto, float32"),
        ({"attn": "magic"}, "expected sdpa"),
        ({"attn": "flash_attention_2"}, "runs on CUDA devices, not on cpu"),
    ],
)
def test_options_that_do_not_exist(toy_folder, options, message):
    assert refused(toy_folder, message, UsageError, **options).exit_code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_cuda(toy_folder, device):
    assert "--device cpu" in refused(toy_folder, "CUDA", UsageError, device=device).hint


def test_decoder_weight_bytes_count_what_a_step_reads(loaded_toy):
    parts = loaded_toy.model.model.language_model
    expected = [*parts.layers.parameters(), parts.norm.weight, loaded_toy.model.lm_head.weight]
    assert models.decoder_weight_bytes(loaded_toy) == sum(weight.numel() * 4 for weight in expected)


def test_an_untied_input_embedding_is_not_counted(broken):
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if "embed_tokens" in name)
    tied = models.decoder_weight_bytes(models.load(str(broken)))
    save_file(
        {**weights, "lm_head.weight": weights[name].clone()}, broken / "model.safetensors", {"format": "pt"}
    )
    text = json.loads((broken / "config.json").read_text())["text_config"] | {"tie_word_embeddings": False}
    change_config(broken, tie_word_embeddings=False, text_config=text)
    untied = models.load(str(broken))
    assert untied.model.lm_head.weight is not untied.model.get_input_embeddings().weight
    assert models.decoder_weight_bytes(untied) == tied


def test_loading_is_silent(broken, pictures, capfd, caplog):
    weights = load_file(broken / "model.safetensors")
    save_file({**weights, "left.over": torch.zeros(1)}, broken / "model.safetensors", {"format": "pt"})
    # Told about the weight that is left over, transformers writes a report.
    AutoModelForImageTextToText.from_pretrained(broken)
    assert "left.over" in caplog.text
    caplog.clear()
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        models.prepare(models.load(str(broken)), pictures, "what?")
        with pytest.raises(ModelError):
            models.load(str(broken.parent))
    assert capfd.readouterr() == ("", "")
    assert (caplog.records, caught) == ([], [])


@pytest.mark.parametrize("bars", [True, False])
def test_quiet_leaves_the_user_s_settings(bars):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_info()
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
    try:
        with warnings.catch_warnings(record=True) as caught, loading.quiet():
            warnings.warn("not for the user", stacklevel=1)
            assert not logging.is_progress_bar_enabled()
        assert caught == []
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, bars)
    finally:
        logging.set_verbosity(before[0])
        (logging.enable_progress_bar if before[1] else logging.disable_progress_bar)()


def test_importing_models_imports_no_torch():
    code = "import sys, plphp_cli.models; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Names


@pytest.mark.parametrize("name", ["bultin", "Builtin", "buildin"])
def test_a_misspelt_builtin(name):
    assert "did you mean builtin?" in refused(name, f"unknown model {name!r}").hint


def test_a_misspelt_folder(toy_folder):
    assert str(toy_folder) in refused(toy_folder.with_name("toy-lava"), "unknown model").hint


@pytest.mark.parametrize("name", ["", " ", "no such model", "a/b/c", "../nowhere", "é/x"])
def test_an_unknown_name(name):
    assert refused(name, "unknown model").hint


def test_a_file_in_place_of_a_folder(toy_folder):
    refused(toy_folder / "model.safetensors", "is a file")


def test_a_folder_around_the_model(toy_folder):
    assert str(toy_folder) in refused(toy_folder.parent, "no config.json").hint


def test_no_built_in_model(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "BUILTIN_FOLDER", tmp_path)
    refused("builtin", "not part of this installation")
