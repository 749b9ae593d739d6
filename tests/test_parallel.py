"""Tensor parallel: two ranks on a CPU (gloo) do what one process does; the rest is refused by name."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from families import load
from packaging.version import Version
from parallel_worker import results

from plphp_cli import models, parallel
from plphp_cli.attention import prune
from plphp_cli.cli.app import main
from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import ModelError, UnsupportedError, UsageError
from plphp_cli.models.options import LoadOptions
from plphp_cli.models.placing import placement
from plphp_cli.pruning import UniformPolicy

ROOT = Path(__file__).parents[1]
IMAGE = str(ROOT / "sample_images" / "shapes.png")
RUN = ["run", "--image", IMAGE, "--prompt", "Describe the image.", "--max-new-tokens", "8", "--device", "cpu"]
# Grouped heads on four KV heads; mRoPE; layers that are left alone.
NAMES = ["builtin", "qwen2_vl", "gemma3"]


def torchrun(*words):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


young_enough = pytest.mark.skipif(
    Version(transformers.__version__) < Version(parallel.OLDEST), reason="transformers is too old"
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks found."""
    out = tmp_path_factory.mktemp("ranks")
    for name in NAMES:
        load(name).model.save_pretrained(out / name)
    done = torchrun(str(ROOT / "tests/parallel_worker.py"), str(out), *(str(out / name) for name in NAMES))
    assert done.returncode == 0, done.stderr
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@young_enough
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_answer_as_one_process_does(name, ranks):
    for number, alone in enumerate(results(name, load(name).model)):
        first, second = (rank[name][number] for rank in ranks)
        assert torch.equal(first["logits"], second["logits"])
        worst = (first["logits"] - alone["logits"]).abs().max()
        assert worst <= 1e-4 * alone["logits"].abs().max()
        assert torch.equal(first["logits"].argmax(-1), alone["logits"].argmax(-1))


@young_enough
@pytest.mark.parametrize("name", NAMES)
def test_each_rank_cuts_its_own_heads_at_a_rate_that_all_of_them_decide(name, ranks):
    groups = set()
    for number, alone in enumerate(results(name, load(name).model)):
        shares = [rank[name][number] for rank in ranks]
        for layer, *parts in zip(alone["layers"], *(share["layers"] for share in shares), strict=True):
            groups.add(layer.group)
            assert [part.held_bytes * 2 for part in parts] == [layer.held_bytes] * 2
            assert [part.full_bytes * 2 for part in parts] == [layer.full_bytes] * 2
            assert [part.kv_heads * 2 for part in parts] == [layer.kv_heads] * 2
            if layer.prunable:
                assert torch.equal(torch.cat([part.kept for part in parts]), layer.kept)
                assert len({(part.gamma, part.group, part.rate) for part in parts}) == 1
                assert abs(parts[0].gamma - layer.gamma) <= 1e-5
                assert (parts[0].group, parts[0].rate) == (layer.group, layer.rate)
        for share in shares:
            assert [bytes_ and bytes_ * 2 for bytes_ in share["stored"]] == alone["stored"]
    assert groups & {"attentive", "balanced", "indifferent"}


@young_enough
@pytest.mark.parametrize("name", NAMES)
def test_the_ranks_together_hold_what_one_process_holds(name, ranks):
    alone = results(name, load(name).model)[0]["layers"]
    for rank in ranks:
        layers, records = rank[f"{name} gathered"]
        assert [record.rank for record in records] == [0, 1]
        assert sum(record.kv_bytes_held for record in records) == sum(layer.held_bytes for layer in alone)
        for together, layer in zip(layers, alone, strict=True):
            for figure in ("held_bytes", "full_bytes", "allocated_bytes", "kv_heads"):
                assert getattr(together, figure) == getattr(layer, figure), figure
    assert ranks[0]["weights"] == models.decoder_weight_bytes(models.load("builtin", device="cpu"))


@young_enough
def test_a_run_on_two_ranks_is_one_run_to_its_user(tmp_path):
    files = [tmp_path / "two.json", tmp_path / "one.json"]
    done = torchrun("-m", "plphp_cli", *RUN, "--json", str(files[0]))
    assert done.returncode == 0, done.stderr
    assert main([*RUN, "--json", str(files[1])]) == 0
    two, one = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    assert done.stdout == one["pruned"]["text"] + "\n"
    assert done.stderr.count("loading builtin") == 1
    assert done.stderr.count("on each of 2 ranks") == 1
    for arm in ("pruned", "unpruned"):
        assert two[arm]["token_ids"] == one[arm]["token_ids"]
        for figure in ("kv_bytes_held", "kv_bytes_full", "kv_bytes_allocated"):
            assert two[arm][figure] == one[arm][figure] == sum(rank[figure] for rank in two["ranks"][arm])
            assert two["ranks"][arm][0][figure] * 2 == two[arm][figure]
    assert (two["ranks"]["backend"], one["ranks"]) == ("gloo", None)
    assert two["bound"] == one["bound"]
    assert {file.name for file in tmp_path.iterdir()} == {"one.json", "two.json"}


@pytest.fixture
def second_of_two(monkeypatch):
    given = {"RANK": "0", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["profile", *RUN[1:5]], "plphp profile does not run on 2 ranks"),
        (["sweep", "--data", "prompts.jsonl"], "plphp sweep does not run on 2 ranks"),
        (["calibrate", "--data", "prompts.jsonl"], "plphp calibrate does not run on 2 ranks"),
        (["run", "--image", IMAGE, "--prompt", "-"], "2 ranks cannot read one stdin"),
    ],
)
def test_what_is_not_made_for_ranks_is_refused(words, message, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 2


@pytest.mark.usefixtures("second_of_two")
def test_a_transformers_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.18.0")
    with pytest.raises(UsageError, match=r"need transformers 5.20 or newer; this is 5.18.0"):
        parallel.load_options()


@pytest.mark.usefixtures("second_of_two")
def test_heads_that_the_ranks_cannot_share_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="3 ranks cannot share the 4 KV heads of builtin evenly") as error:
        models.load("builtin", device="cpu")
    assert error.value.hint == "use --nproc-per-node 1 or 2 or 4"


@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize("words", [["--device-map", "auto"], ["--quantize", "4bit"]])
def test_weights_that_go_elsewhere_than_to_the_ranks_are_refused(words, capsys):
    assert main([*(RUN[:-2] if "--device-map" in words else RUN), *words]) == 2
    error = capsys.readouterr().err
    assert f"error: {' '.join(words)} does not go with torchrun" in error
    assert f"hint: leave out {words[0]}, or start it without torchrun" in error


@pytest.mark.usefixtures("second_of_two")
def test_packed_weights_are_not_shared():
    stored = SimpleNamespace(quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ModelError, match="which several ranks cannot share"):
        placement("it", stored, LoadOptions(), "auto", torch.device("cpu"))


@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize(
    ("device", "name", "message"),
    [
        ("mps", "auto", "Metal"),
        ("cuda:0", "cuda:0", "a device of its own"),
        ("cpu", "cpu", "run on the CUDA devices"),
        ("cuda:0", "auto", r"more ranks than this machine has CUDA devices \(1\)"),
    ],
)
def test_a_device_that_ranks_cannot_have_is_refused(device, name, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match=message):
        parallel.device_of_rank(torch.device(device), name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parallel.device_of_rank(torch.device("cuda:0"), "auto") == torch.device("cuda:1")


@pytest.mark.usefixtures("second_of_two")
def test_a_model_without_a_plan_is_refused():
    model = load("llava").fresh().model
    parallel.check_loaded(model, "llava")
    model._tp_plan = {"lm_head": "colwise_gather_output"}
    with pytest.raises(ModelError, match="no tensor-parallel plan for the attention of llava"):
        parallel.check_loaded(model, "llava")


def test_numbers_of_one_rank_alone_are_refused():
    model = load("llava").fresh().model
    model._tp_size = 2
    with pytest.raises(UnsupportedError, match="UniformPolicy"), prune(model, UniformPolicy(0.5)):
        pass
    for policy in (None, PLPHPConfig()):
        with pytest.raises(UnsupportedError, match="score rows"), prune(model, policy, keep_attention=True):
            pass


def test_a_launcher_that_is_none_is_not_taken_for_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert (parallel.world_size(), parallel.rank()) == (1, 0)
