"""How a model is loaded: options that travel, device maps, quantised weights, a model's own code."""

import dataclasses
import json
import os
import struct
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_folders import change_config, refused
from transformers import AutoConfig, AutoModelForImageTextToText

from plphp_cli import models, prune
from plphp_cli.cli.app import main
from plphp_cli.cli.failures import explained
from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import DeviceMemoryError, ImageError, PLPHPError, UsageError
from plphp_cli.models.choices import check_stored_dtype, choose_dtype
from plphp_cli.models.loaded import decoder_weight_bytes, model_bytes
from plphp_cli.models.options import LoadOptions
from plphp_cli.models.placing import check_packages, main_device, placement
from plphp_cli.prefilling import prefill
from plphp_cli.profiling.fresh import FreshJob, FreshPrompt, measure_fresh
from plphp_cli.profiling.records import PRUNED

CUDA = torch.device("cuda", 0)


def answer(loaded: models.LoadedModel, images) -> tuple[list[int], list[list[int]]]:
    """Greedy tokens of the pruned model, and what each head of each layer kept."""
    prompt = models.prepare(loaded, images, "what?")
    with prune(loaded.model, PLPHPConfig(r=0.4)) as pruner:
        tokens = loaded.model.generate(**prompt.inputs, max_new_tokens=8, do_sample=False)
    return tokens[0].tolist(), [layer.kept.tolist() for layer in pruner.layers]


# Options


OPTIONS = LoadOptions("float16", "cpu", quantize="4bit", offline=True, processor_arg=("a=1", 'b={"c": 2}'))


def test_options_survive_a_journey_as_json() -> None:
    assert LoadOptions.from_dict(json.loads(json.dumps(dataclasses.asdict(OPTIONS)))) == OPTIONS
    assert hash(OPTIONS) == hash(dataclasses.replace(OPTIONS))


def test_options_as_words_give_the_same_options_again(monkeypatch: pytest.MonkeyPatch, images) -> None:
    assert LoadOptions().words() == []
    seen = []
    monkeypatch.setattr("plphp_cli.cli.run.check_model", lambda name, options: seen.append(options) or 1 / 0)
    every = dataclasses.replace(OPTIONS, attn="eager", trust_remote_code=True, offline=False)
    given = ["run", "--image", images[0].path, "--prompt", "what?"]
    for options in (LoadOptions(), every, LoadOptions(device_map="auto")):
        main([*given, *options.words()])
        assert seen.pop() == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "2bit"}, "quantize '2bit'; expected 4bit or 8bit"),
        ({"device_map": "all"}, "device map 'all'; expected auto"),
        ({"device_map": "auto", "device": "cpu"}, "exclude each other"),
        ({"processor_arg": ("max_pixels",)}, "'max_pixels'; expected KEY=VALUE"),
        ({"processor_arg": ("=3",)}, "expected KEY=VALUE"),
        ({"processor_arg": ("a=3", "a=4")}, "a is given twice"),
        ({"quantize": "4bit", "device": "cpu"}, "needs CUDA, and this would run on cpu"),
    ],
)
def test_options_that_cannot_be(toy: str, options: dict, message: str) -> None:
    assert refused(toy, message, UsageError, **options).hint is not None or "expected" in message


@pytest.mark.parametrize("command", ["run", "profile", "sweep", "calibrate"])
def test_every_command_takes_them_and_refuses_before_the_work(
    command: str, capsys, images, tmp_path: Path
) -> None:
    out = ["--out", str(tmp_path / "out")] if command in ("sweep", "calibrate") else []
    given = ["--image", images[0].path, "--prompt", "what?", *out]
    assert main([command, *given, "--processor-arg", "size"]) == 2
    assert "'size'; expected KEY=VALUE" in capsys.readouterr().err
    assert main([command, *given, "--quantize", "3bit"]) == 2
    assert "quantize '3bit'" in capsys.readouterr().err


def test_a_fresh_process_loads_with_the_same_options(toy: str, images) -> None:
    options = LoadOptions("float32", "cpu", processor_arg=("no_such_thing=1",))
    prompts = (FreshPrompt((images[0].path,), "what?"),)
    (peaks,) = measure_fresh(FreshJob(PRUNED, PLPHPConfig(), prompts, None, 2, toy, options))
    assert "no argument 'no_such_thing'" in str(peaks.failed)


# The image processor's arguments


def test_a_processor_argument_reaches_the_image_processor(toy: str, images) -> None:
    plain = models.prepare(models.load(toy, device="cpu"), images[:1], "what?")
    raw = models.load(toy, device="cpu", processor_arg=("do_rescale=false", "do_normalize=false"))
    pixels = models.prepare(raw, images[:1], "what?").inputs["pixel_values"]
    assert plain.inputs["pixel_values"].abs().max() <= 1
    assert pixels.max() == 255


def test_a_processor_argument_that_does_not_exist_or_fit(toy: str, images) -> None:
    error = refused(toy, "no argument 'do_resise'", UsageError, processor_arg=("do_resise=false",))
    assert error.hint == "did you mean do_resize?"
    assert "return_tensors" not in str(
        refused(toy, "'return_tensors'", UsageError, processor_arg=("return_tensors=1",)).hint
    )
    loaded = models.load(toy, device="cpu", processor_arg=("size=huge",))
    with pytest.raises(PLPHPError) as caught:
        models.prepare(loaded, images[:1], "what?")
    assert 'size="huge" is of no kind' in str(caught.value)


@pytest.mark.parametrize("given", ["do_resize=false", 'size={"height": 64, "width": 64}'])
def test_images_that_the_model_cannot_take_are_blamed_on_the_argument(given: str, images) -> None:
    loaded = models.load("builtin", device="cpu", processor_arg=(given,))
    prompt = models.prepare(loaded, images[:1], "what?")
    with pytest.raises(ImageError, match="as they were prepared") as caught, prune(loaded.model) as pruner:
        prefill(loaded, prompt, pruner)
    assert caught.value.hint == f"check --processor-arg {given}"


# Devices


@pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate")
def test_a_device_map_gives_the_same_answer(toy: str, images) -> None:
    plain = models.load(toy, device="cpu")
    spread = models.load(toy, device_map="auto", dtype="float32")
    assert any(note.startswith("device map") for note in spread.notes)
    if not torch.cuda.is_available():
        assert answer(spread, images) == answer(plain, images)


@pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate")
def test_layers_that_are_brought_in_one_by_one_give_the_same_answer(toy: str, images) -> None:
    from accelerate import cpu_offload

    plain = models.load(toy, device="cpu")
    expected = answer(plain, images), decoder_weight_bytes(plain), model_bytes(plain)
    cpu_offload(plain.model, torch.device("cpu"))
    assert next(plain.model.parameters()).device.type == "meta"
    assert main_device(plain.model) == torch.device("cpu")
    assert (answer(plain, images), decoder_weight_bytes(plain), model_bytes(plain)) == expected


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, toy: str, broken: Path) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    error = refused(toy, "--device-map auto needs accelerate", UsageError, device_map="auto", device="auto")
    assert error.hint == "pip install 'plphp-cli[accelerate]'"
    with pytest.raises(UsageError, match="--quantize 8bit needs bitsandbytes and accelerate") as caught:
        check_packages(LoadOptions(quantize="8bit"), CUDA)
    assert caught.value.hint == "pip install 'plphp-cli[quantize]'"
    change_config(broken, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "accelerate" in str(refused(broken, r"are quantised \(gptq\)").hint)


def test_bfloat16_on_a_device_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    with pytest.raises(UsageError, match="device cuda:0 does not compute in bfloat16"):
        choose_dtype("bfloat16", CUDA, builtin=False)
    stored = SimpleNamespace(dtype=torch.bfloat16)
    with pytest.raises(UsageError, match="stored in bfloat16") as caught:
        check_stored_dtype(stored, "auto", CUDA)
    assert "--dtype float16" in str(caught.value.hint)
    check_stored_dtype(stored, torch.float16, CUDA)
    check_stored_dtype(stored, "auto", torch.device("cpu"))


def test_quantised_weights_that_do_not_fit_the_gpu(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError(
            "Some modules are dispatched on the CPU or the disk. Make sure you have enough GPU RAM"
        )

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", fail)
    error = refused(toy, "KiB of weights of .* do not fit", DeviceMemoryError)
    assert "--device-map" in str(error.hint)


# Quantised weights


@pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate")
@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "no-such-method"])
def test_quantised_weights_whose_package_is_missing(broken: Path, method: str) -> None:
    change_config(broken, quantization_config={"quant_method": method, "bits": 4})
    error = refused(broken, "need a package that is missing|transformers does not know")
    assert ("no-such-method" in error.message) == (method == "no-such-method")
    assert error.hint


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="needs an environment without bitsandbytes")
@pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate")
def test_weights_packed_by_bitsandbytes_name_the_extra(broken: Path) -> None:
    change_config(broken, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    error = refused(broken, "need a package that is missing: bitsandbytes$")
    assert error.hint == "pip install 'plphp-cli[quantize]'"


def test_quantised_weights_are_not_quantised_again(broken: Path) -> None:
    change_config(broken, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    config = AutoConfig.from_pretrained(broken)
    with pytest.raises(UsageError, match=r"quantised already \(bitsandbytes\)"):
        placement("toy", config, LoadOptions(quantize="4bit"), torch.float16, CUDA)


def test_packed_weights_count_as_they_are_stored(toy: str) -> None:
    class Packed(torch.nn.Module):
        """Four bits a weight and a scale per output, as GPTQ and AWQ store them: as buffers."""

        def __init__(self, inside: int, outside: int) -> None:
            super().__init__()
            self.register_buffer("qweight", torch.zeros(inside // 8, outside, dtype=torch.int32))
            self.register_buffer("scales", torch.zeros(1, outside, dtype=torch.float16))

    loaded = models.load(toy, device="cpu")
    before, all_before = decoder_weight_bytes(loaded), model_bytes(loaded)
    linear = loaded.model.get_decoder().layers[0].mlp.up_proj
    inside, outside = linear.in_features, linear.out_features
    loaded.model.get_decoder().layers[0].mlp.up_proj = Packed(inside, outside)
    saved = inside * outside * 4 - (inside * outside // 2 + outside * 2)
    assert before - decoder_weight_bytes(loaded) == saved
    assert all_before - model_bytes(loaded) == saved


# Weights


def test_weights_that_no_machine_holds(broken: Path) -> None:
    size = 1 << 43
    tensor = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({"model.x": tensor}).encode()
    (broken / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    try:
        # A hole: it takes no space.
        os.truncate(broken / "model.safetensors", 8 + len(header) + size)
    except OSError:
        pytest.skip("needs a file system of large files")
    error = refused(broken, r"take 8.00 TiB; this machine has", DeviceMemoryError)
    assert "--dtype bfloat16" in str(error.hint)
    refused(broken, r"take 4.00 TiB", DeviceMemoryError, dtype="float16")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3221225472 bytes.", "3.00 GiB"),
        (
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB "
            "of which 1.50 GiB is free. Process 1 has 77 GiB in use.",
            "2.00 GiB more were needed; 1.50 GiB of 79.10 GiB are free",
        ),
        ("CUDA error: out of memory", "out of memory"),
    ],
)
def test_running_out_of_memory_says_how_much_was_needed(text: str, expected: str) -> None:
    error = explained(torch.OutOfMemoryError(text))
    assert isinstance(error, DeviceMemoryError)
    assert expected in error.message


# A model's own code


@pytest.fixture
def own_code(broken: Path) -> Path:
    """A model that brings its code, which leaves a trace when it is run."""
    change_config(
        broken,
        model_type="own_llava",
        auto_map={
            "AutoConfig": "own_code.OwnConfig",
            "AutoModelForImageTextToText": "own_code.OwnModel",
        },
    )
    (broken / "own_code.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlavaConfig, LlavaForConditionalGeneration\n"
        f"Path({str(broken / 'trace')!r}).write_text('it ran')\n"
        "print('words of its own')\n"
        "class OwnConfig(LlavaConfig):\n"
        "    model_type = 'own_llava'\n"
        "class OwnModel(LlavaForConditionalGeneration):\n"
        "    config_class = OwnConfig\n"
    )
    return broken


def test_code_of_a_model_runs_only_where_it_is_trusted(
    own_code: Path, toy: str, images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    error = refused(own_code, "no model type 'own_llava', and the model's code is not run")
    assert "--trust-remote-code" in str(error.hint)
    assert not (own_code / "trace").exists()
    config = (own_code / "config.json").read_text()
    change_config(own_code, model_type="llava")
    assert type(models.load(str(own_code), device="cpu").model).__name__ == "LlavaForConditionalGeneration"
    assert not (own_code / "trace").exists()
    (own_code / "config.json").write_text(config)
    loaded = models.load(str(own_code), device="cpu", trust_remote_code=True)
    assert (own_code / "trace").read_text() == "it ran"
    # stdout is for answers.
    out, err = capsys.readouterr()
    assert (out, "words of its own" in err) == ("", True)
    assert type(loaded.model).__name__ == "OwnModel"
    assert any("pruning is not proven" in warning for warning in loaded.warnings)
    assert answer(loaded, images) == answer(models.load(toy, device="cpu"), images)


def test_the_card_of_a_model_with_code_of_its_own_needs_trust(
    own_code: Path, toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    asked = ["models", str(own_code), "--device", "cpu", "--json", "-"]
    assert main(asked) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert main([*asked, "--trust-remote-code"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert card["image"]["vision_tokens"]
    assert main(["models", toy, "--device", "cpu", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == card["parameters"]
    assert main(["models", "--trust-remote-code"]) == 2
    assert "is about one model" in capsys.readouterr().err


def test_code_that_cannot_be_used(own_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (own_code / "own_code.py").write_text("1 / 0\n")
    refused(own_code, "the code that .* brings fails: division by zero", trust_remote_code=True)
    change_config(own_code, auto_map={"AutoModel": "own_code.OwnModel"})
    refused(own_code, "offers no AutoModelForImageTextToText", trust_remote_code=True)
