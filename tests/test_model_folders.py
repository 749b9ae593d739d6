"""Model folders and repositories that are not as they should be: each is refused by what is wrong."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from importlib.util import find_spec

import pytest
import torch
from huggingface_hub import constants
from model_folders import change_config, refused
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Florence2Config

from plphp_cli import models
from plphp_cli.errors import DeviceMemoryError, ModelError, PLPHPError, UnsupportedError
from plphp_cli.models import failures
from plphp_cli.models.sources import Source
from plphp_cli.models.weights import needed_bytes


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
