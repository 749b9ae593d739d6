import http.server
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from toy_model import ASSISTANT, BOS, IMAGE, TOKENS_PER_IMAGE, USER, save_toy_llava
from transformers import AutoModelForImageTextToText, Florence2Config, ProcessorMixin
from transformers.utils import logging

from plphp_cli import models
from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import (
    DeviceMemoryError,
    ImageError,
    ModelError,
    PLPHPError,
    UnsupportedError,
    UsageError,
)
from plphp_cli.images import load_image
from plphp_cli.models import failures, loading, sources
from plphp_cli.models.loaded import LoadedModel
from plphp_cli.models.sources import Source
from plphp_cli.models.weights import needed_bytes


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    return save_toy_llava(tmp_path_factory.mktemp("toy") / "toy-llava")


@pytest.fixture(scope="session")
def toy(toy_folder):
    return models.load(str(toy_folder), device="cpu")


@pytest.fixture
def broken(toy_folder, tmp_path):
    """A copy of the toy's folder, to be damaged."""
    return Path(shutil.copytree(toy_folder, tmp_path / "broken"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    loaded = []
    for name, size, colour in [("red", (50, 40), "red"), ("blue", (7, 90), "blue"), ("dot", (1, 1), "green")]:
        Image.new("RGB", size, colour).save(folder / f"{name}.png")
        loaded.append(load_image(folder / f"{name}.png"))
    return loaded


def refused(name, message, error=ModelError, **options):
    with pytest.raises(error, match=message) as caught:
        models.load(str(name), **options)
    assert "\n" not in caught.value.message
    return caught.value


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Loading


def test_a_folder_loads_as_transformers_loads_it(toy, toy_folder):
    reference = AutoModelForImageTextToText.from_pretrained(toy_folder).state_dict()
    assert toy.model.state_dict().keys() == reference.keys()
    assert all(torch.equal(weight, reference[name]) for name, weight in toy.model.state_dict().items())
    assert (toy.name, toy.revision, toy.builtin) == (str(toy_folder), None, False)
    assert (toy.dtype, toy.device, toy.attn) == (torch.float32, torch.device("cpu"), "sdpa")
    assert not toy.model.training
    assert not any(weight.requires_grad for weight in toy.model.parameters())


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


def test_only_the_built_in_model_has_a_setting_of_its_own(broken, monkeypatch, toy):
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


def test_decoder_weight_bytes_count_what_a_step_reads(toy):
    parts = toy.model.model.language_model
    expected = [*parts.layers.parameters(), parts.norm.weight, toy.model.lm_head.weight]
    assert models.decoder_weight_bytes(toy) == sum(weight.numel() * 4 for weight in expected)


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


# Folders that are not as they should be


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "model_type"),
        ("{}", "model_type"),
        ("\xff", "read"),
    ],
)
def test_a_broken_config(broken, text, message):
    (broken / "config.json").write_bytes(text.encode("latin-1"))
    refused(broken, message)


def test_a_config_of_the_wrong_shape(broken):
    change_config(broken, text_config=3)
    refused(broken, "config.json of .* cannot be used")


def test_a_model_type_that_transformers_does_not_know(broken):
    change_config(broken, model_type="llava_next_next", auto_map={"AutoConfig": "evil.Config"})
    (broken / "evil.py").write_text("raise SystemExit('this code must not run')")
    refused(broken, "no model type 'llava_next_next'")


@pytest.mark.parametrize(("kind", "message"), [("qwen2", "text-only"), ("vit", "not an image-text-to-text")])
def test_a_model_without_eyes_or_words(broken, kind, message):
    change_config(broken, model_type=kind)
    refused(broken, message)


def test_an_encoder_decoder(broken):
    shutil.rmtree(broken)
    Florence2Config().save_pretrained(broken)
    refused(broken, "encoder-decoder", UnsupportedError)


def test_no_image_token(broken):
    change_config(broken, image_token_id=None)
    refused(broken, "image token", UnsupportedError)


def test_missing_weights(broken):
    (broken / "model.safetensors").unlink()
    assert "incomplete" in refused(broken, "lacks the weights model.safetensors").hint
    (broken / "pytorch_model.bin").write_bytes(b"pickle")
    assert "only safetensors" in refused(broken, "lacks the weights").hint


def test_a_missing_shard(broken):
    weights = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(weights, "model-00002-of-00002.safetensors")}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(broken, "model-00002-of-00002")
    (broken / "model.safetensors.index.json").write_text("{}")
    refused(broken, "index.json .* is broken")


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_weights(broken, keep):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(broken, "corrupted")


def test_weights_that_only_stand_in(broken):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (broken / "model.safetensors").write_text(pointer)
    assert "git lfs pull" in refused(broken, "Git LFS pointer").hint
    # In the hub's cache there is no clone in which that would do anything.
    with pytest.raises(ModelError, match="Git LFS pointer") as caught:
        needed_bytes([broken / "model.safetensors"], Source("org/toy", broken, "a" * 40))
    assert "hf download org/toy model.safetensors" in caught.value.hint
    assert "--force-download" in caught.value.hint


def test_weights_of_another_model(broken):
    weights = load_file(broken / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.1.mlp" not in name}
    assert len(kept) < len(weights)
    save_file(kept, broken / "model.safetensors", {"format": "pt"})
    refused(broken, r"missing, such as .*layers\.1\.mlp")
    text = json.loads((broken / "config.json").read_text())["text_config"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    change_config(broken, text_config=text | {"intermediate_size": 64})
    refused(broken, "do not match its config: .* has the shape")


@pytest.mark.parametrize("missing", [["processor_config.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_missing_processor_files(broken, missing):
    for name in missing:
        (broken / name).unlink()
    refused(broken, "processor")


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="needs an environment without torchvision")
def test_a_processor_that_needs_an_extra(broken):
    path = broken / "processor_config.json"
    config = json.loads(path.read_text()) | {"processor_class": "LlavaOnevisionProcessor"}
    config["video_processor"] = {"video_processor_type": "LlavaOnevisionVideoProcessor"}
    path.write_text(json.dumps(config))
    assert "plphp-cli[vision]" in refused(broken, "needs torchvision").hint


def test_out_of_memory_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**52)
    assert failures.is_out_of_memory(caught.value)
    assert failures.is_out_of_memory(MemoryError())
    assert failures.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not failures.is_out_of_memory(RuntimeError("shapes do not match"))


def test_out_of_memory_while_loading(toy_folder, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 GiB")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", fail)
    error = refused(toy_folder, "out of memory on cpu", DeviceMemoryError)
    assert error.exit_code == 1
    assert "KiB" in error.message


# The hub


def cache(root, folder, repository="some-org/toy-llava", commit="a" * 40):
    home = root / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    return home


def test_a_cached_hub_model_loads_offline(toy_folder, tmp_path, monkeypatch):
    cache(tmp_path, toy_folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("some-org/toy-llava", "some-org/toy-llava@" + "a" * 40, "some-org/toy-llava@main"):
        loaded = models.load(name)
        assert (loaded.name, loaded.revision) == ("some-org/toy-llava", "a" * 40)
    assert "some-org/toy-llava" in refused("some-org/toy-lava", "not in the local cache", PLPHPError).hint
    assert "some-org/toy-llava" in refused("some_org-toy-llava", "unknown model").hint


def test_a_half_downloaded_hub_model(toy_folder, tmp_path, monkeypatch):
    home = cache(tmp_path, toy_folder)
    (home / "snapshots" / ("a" * 40) / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refused("some-org/toy-llava", "model.safetensors|cannot be reached", PLPHPError)


HUB_CLIENT = """
import sys
from plphp_cli.errors import PLPHPError
from plphp_cli.models.sources import locate
for name in sys.argv[1:]:
    try:
        locate(name)
    except PLPHPError as error:
        print(name, "|", type(error).__name__, "|", error.message, "|", error.hint)
"""


def test_what_the_hub_refuses(tmp_path):
    codes = {"gated": (403, "GatedRepo"), "missing": (404, "RepoNotFound"), "model": (404, "EntryNotFound")}

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            status, code = codes[self.path.split("/")[2]]
            if "no-such-tag" in self.path:
                code = "RevisionNotFound"
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
    names = ["org/gated", "org/missing", "org/model@no-such-tag", "org/model"]
    run = subprocess.run(
        [sys.executable, "-c", HUB_CLIENT, *names],
        env={**os.environ, **settings, "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    server.shutdown()
    lines = run.stdout.splitlines()
    expected = ["gated", "no model org/missing", "no revision 'no-such-tag'", "no config.json"]
    assert len(lines) == 4, run.stderr
    assert all(text in line for text, line in zip(expected, lines, strict=True)), lines


# Prompts


def ids(loaded, prompt):
    return loaded.processor.tokenizer.convert_ids_to_tokens(prompt.inputs["input_ids"][0].tolist())


def test_images_come_first_in_the_order_given(toy, pictures):
    prompt = models.prepare(toy, pictures[:2], "what?")
    assert prompt.text == f"{BOS}{USER}{IMAGE}{IMAGE}what?\n{ASSISTANT}"
    assert prompt.images == (pictures[0].path, pictures[1].path)
    assert prompt.vision_tokens == 2 * TOKENS_PER_IMAGE == ids(toy, prompt).count(IMAGE)
    assert prompt.prompt_tokens == prompt.inputs["input_ids"].shape[1]
    assert prompt.preprocess_s > 0
    red, blue = prompt.inputs["pixel_values"]
    assert red[0].mean() == blue[2].mean() == 1
    assert red[2].mean() == blue[0].mean() == -1


def test_placeholders_place_the_images(toy, pictures):
    prompt = models.prepare(toy, pictures[:2], "Is <image> like <image>?")
    assert f"Is {IMAGE} like {IMAGE}?" in prompt.text
    assert prompt.vision_tokens == 2 * TOKENS_PER_IMAGE


@pytest.mark.parametrize(("count", "text"), [(0, "a <image>"), (1, "<image> <image>x"), (2, "one <image>")])
def test_placeholders_that_are_not_one_per_image(toy, pictures, count, text):
    with pytest.raises(ImageError, match=f"{count} image") as caught:
        models.prepare(toy, pictures[:count], text)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("system", ["see <image>", "<image>"])
def test_a_placeholder_in_the_system_message(toy, pictures, system):
    with pytest.raises(ImageError, match="the system message holds <image>"):
        models.prepare(toy, pictures[:1], "what?", system=system)


def test_no_images(toy):
    prompt = models.prepare(toy, [], "hello")
    assert (prompt.vision_tokens, prompt.images) == (0, ())
    assert "pixel_values" not in prompt.inputs
    toy.model(**prompt.inputs)


def test_the_system_message_comes_first(toy, pictures):
    prompt = models.prepare(toy, pictures[:1], "what?", system="be brief")
    assert prompt.text.startswith(f"{BOS}be brief")


@pytest.mark.parametrize("text", ["", "  \n\t", "<image>", "\udcff"])
def test_text_that_says_nothing(toy, pictures, text):
    with pytest.raises(UsageError):
        models.prepare(toy, pictures[:1], text)


SANITIZES = "sanitize_control_tokens" in inspect.signature(ProcessorMixin.apply_chat_template).parameters
sanitizing = pytest.mark.skipif(
    not SANITIZES,
    reason="this transformers cannot be told to read special tokens as text",
)


@sanitizing
def test_the_bos_token_stands_once(toy, pictures):
    for text in ("what?", f"what {BOS}?"):
        assert ids(toy, models.prepare(toy, pictures[:1], text)).count(BOS) == 1


@pytest.mark.skipif(SANITIZES, reason="this transformers can be told to read special tokens as text")
def test_typed_special_tokens_are_refused_where_they_would_be_obeyed(toy, pictures):
    with pytest.raises(UsageError, match=re.escape(ASSISTANT)) as error:
        models.prepare(toy, pictures[:1], f"what {ASSISTANT}?")
    assert "--raw-prompt" in error.value.hint


CONTROL = [BOS, "</s>", "<pad>", USER, ASSISTANT]


@sanitizing
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([*CONTROL, "<pa", "d>", " what ", "\ue000", "\n"]), min_size=1),
    st.integers(0, 3),
)
def test_typed_special_tokens_stay_text(toy, pictures, pieces, count):
    text = "see " + "".join(pieces)
    prompt = models.prepare(toy, pictures[:count], text)
    tokens = ids(toy, prompt)
    assert tokens.count(IMAGE) == prompt.vision_tokens == count * TOKENS_PER_IMAGE
    assert [tokens.count(token) for token in CONTROL] == [1, 0, 0, 1, 1]
    assert bool(prompt.notes) == any(token in text for token in CONTROL)


@sanitizing
@pytest.mark.parametrize("count", [0, 1])
def test_an_image_token_hidden_around_another_token_is_refused(toy, pictures, count):
    with pytest.raises(ImageError, match="refuses the prompt"):
        models.prepare(toy, pictures[:count], f"see <ima{BOS}ge>")


@sanitizing
def test_a_typed_image_token_of_another_spelling_stays_text(broken, pictures):
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        path = broken / name
        path.write_text(path.read_text().replace(IMAGE, "<|vision|>"))
    loaded = models.load(str(broken))
    prompt = models.prepare(loaded, pictures[:1], "<image> what is <|vision|>?")
    assert ids(loaded, prompt).count("<|vision|>") == TOKENS_PER_IMAGE == prompt.vision_tokens
    assert "<|vision|>" in prompt.notes[0]


def test_a_model_without_a_chat_template(broken, pictures):
    (broken / "chat_template.jinja").unlink()
    loaded = models.load(str(broken))
    for text in ("what?", f"what {USER}?") if SANITIZES else ("what?",):
        prompt = models.prepare(loaded, pictures[:2], text, system="be brief")
        assert prompt.text == f"be brief\n\nUSER: {IMAGE}\n{IMAGE}\n{text}\nASSISTANT:"
        assert prompt.vision_tokens == 2 * TOKENS_PER_IMAGE
        assert "no chat template" in prompt.notes[0]


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        ("{{- raise_exception('no') -}}", ModelError, "chat template"),
        ("{{- messages[0].nothing.at.all -}}", ModelError, "chat template"),
        ("{{- 'no images here' -}}", ImageError, "refuses the prompt|its 1 image expands to"),
        ("{{- '<image><image>' -}}", ImageError, "refuses the prompt"),
    ],
)
def test_a_chat_template_that_does_not_fit(broken, pictures, template, error, message):
    (broken / "chat_template.jinja").write_text(template)
    with pytest.raises(error, match=message):
        models.prepare(models.load(str(broken)), pictures[:1], "what?")


def test_a_template_without_a_place_for_the_system_message(broken, pictures):
    (broken / "chat_template.jinja").write_text("{{- '<image>what?' -}}")
    with pytest.raises(UsageError, match="no place for a system message"):
        models.prepare(models.load(str(broken)), pictures[:1], "what?", system="be brief")


def test_a_prompt_longer_than_the_model_s_context_is_noted(toy, pictures):
    assert "512" in models.prepare(toy, pictures[:1], "x" * 800).notes[-1]


def test_the_notes_of_the_images_are_those_of_the_prompt(toy, tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    picture = load_image(tmp_path / "clear.png")
    assert models.prepare(toy, [picture], "what?").notes == (f"{picture.path}: {picture.notes[0]}",)


def test_the_model_answers_a_prepared_prompt(toy, pictures):
    prompt = models.prepare(toy, pictures, "what?")
    output = toy.model.generate(**prompt.inputs, max_new_tokens=2, do_sample=False)
    assert output.shape == (1, prompt.prompt_tokens + 2)
    assert isinstance(toy, LoadedModel)
