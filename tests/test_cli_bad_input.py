import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from toy_model import save_toy_llava

from plphp_cli.cli.app import main
from plphp_cli.cli.failures import is_out_of_memory
from plphp_cli.errors import PLPHPError

as_root = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_llava(tmp_path_factory.mktemp("models") / "toy-llava")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("images") / "red.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return str(path)


class Refusal:
    """Runs `plphp run` and holds it to the rules of a refusal."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *args: object, code: int = 2, loads: bool = False) -> str:
        """The error of a command line, after the rules that every error keeps."""
        assert main(["run", *map(str, args)]) == code
        out, err = self._capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        # What can be known before the model loads is refused before.
        assert ("loading" in err) == loads
        lines = err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1
        position = lines.index(errors[0])
        assert all(line.startswith("hint: ") for line in lines[position + 1 :])
        assert len(lines) - position <= 2
        return "\n".join(lines[position:])


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    return Refusal(capsys)


# What was typed, refused before anything is loaded


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--r", "nan"], "r = nan; expected a number in [0, 1]"),
        (["--r", "-0.1"], "r = -0.1"),
        (["--delta-r", "1.5"], "delta_r = 1.5"),
        (["--alpha", "inf"], "alpha = inf"),
        (["--beta", "2"], "beta = 2"),
        (["--alpha", "0.1", "--beta", "0.3"], "alpha = 0.1 is below beta = 0.3"),
        (["--r", "much"], "--r"),
        (["--scope", "page"], "scope = 'page'; expected prompt or image"),
        (["--head-reduce", "sum"], "head_reduce = 'sum'"),
        (["--skip-layers", "0,x"], "skip layers '0,x'"),
        (["--skip-layers", "-1"], "skip layers '-1'"),
        (["--max-new-tokens", "0"], "max-new-tokens = 0; expected 1 or more"),
        (["--max-new-tokens", "2.5"], "--max-new-tokens"),
        (["--temperature", "-1"], "temperature = -1"),
        (["--temperature", "nan"], "temperature = nan"),
        (["--top-p", "0"], "top-p = 0"),
        (["--top-p", "0.9", "--temperature", "0"], "--top-p does not go with --temperature 0"),
        (["--seed", "-1"], "seed = -1"),
        (["--seed", str(1 << 64)], "seed ="),
        (["--max-pixels", "0"], "max pixels = 0"),
        (["--config", "/nowhere/config.json"], "cannot read config"),
        (["--prompt", ""], "the prompt is blank"),
        (["--prompt", " \t\n "], "the prompt is blank"),
        (["--prompt", "caf\udce9"], "the prompt is not UTF-8"),
        (["--system", " "], "the system message is blank"),
        (["--colour", "red"], "No such option: --colour"),
        (["--prompt", "two", "words"], "unexpected extra argument"),
        (["--json", ""], "--json is empty"),
        (["--json", "/nowhere/x.json"], "no folder /nowhere"),
        (["--json", "/"], "is a directory"),
        (["--model", "buitlin"], "did you mean builtin?"),
        (["--model", ""], "unknown model ''"),
        (["--model", "/nowhere/model"], "unknown model"),
    ],
)
def test_what_was_typed_is_refused_in_one_line(
    refusal: Refusal, image: str, args: list[str], expected: str
) -> None:
    assert expected in refusal("--image", image, "--prompt", "what?", "--model", "missing", *args)


def test_missing_options_are_named(refusal: Refusal, image: str) -> None:
    assert "no image was given" in refusal("--prompt", "what?")
    assert "no prompt was given" in refusal("--image", image)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"caf\xe9", "not UTF-8: byte 3 is 0xe9"), (b"\n \n", "blank"), (b"x" * (1 << 23), "longer than 4 MiB")],
)
def test_bad_stdin_is_refused(
    refusal: Refusal, image: str, monkeypatch: pytest.MonkeyPatch, content: bytes, expected: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert expected in refusal("--image", image, "--prompt", "-")


def test_an_existing_record_is_kept_unless_forced(
    refusal: Refusal, toy: Path, image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "record.json"
    target.write_text("precious")
    args = ["--image", image, "--prompt", "what?", "--model", toy, "--max-new-tokens", 2, "--json", target]
    error = refusal(*args)
    assert "exists already" in error
    assert "--force" in error
    assert target.read_text() == "precious"
    assert main(["run", *map(str, args), "--force"]) == 0
    assert json.loads(target.read_text())["schema_version"] == 1
    assert list(tmp_path.iterdir()) == [target]
    capsys.readouterr()


@pytest.mark.skipif(as_root, reason="root may write everywhere")
def test_an_unwritable_folder_is_refused_before_the_work(
    refusal: Refusal, image: str, tmp_path: Path
) -> None:
    tmp_path.chmod(0o500)
    assert "no permission" in refusal("--image", image, "--prompt", "what?", "--json", tmp_path / "x.json")


# Images: the command refuses what the image module refuses, and runs on what it puts right


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "directory", "bomb"])
def test_broken_images_are_refused_before_the_model_loads(
    refusal: Refusal, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "image.png"
    if kind == "directory":
        path.mkdir()
    elif kind == "bomb":
        Image.new("1", (20_000, 20_000)).save(path)
    elif kind != "missing":
        content = io.BytesIO()
        Image.effect_noise((64, 64), 50).save(content, "PNG")
        data = {"empty": b"", "text": b"hello", "truncated": content.getvalue()[:500]}[kind]
        path.write_bytes(data)
    error = refusal("--image", path, "--prompt", "what?")
    assert str(path) in error
    assert "hint: " in error


def odd_images(folder: Path) -> list[Path]:
    """Images that are unusual but right."""
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("CMYK", (20, 20), (0, 255, 0, 0)).save(folder / "cmyk.jpg")
    Image.new("I;16", (20, 20), 40_000).save(folder / "deep.png")
    Image.new("P", (20, 20)).save(folder / "palette.png", transparency=0)
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    Image.new("RGB", (3000, 2)).save(folder / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(folder / "turned.jpg", exif=exif)
    return sorted(folder.iterdir())


def test_odd_images_run_and_what_was_done_is_said(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = odd_images(tmp_path)
    names = [str(path) for path in paths]
    args = ["run", "--model", str(toy), "--prompt", "what?", "--max-new-tokens", "2", "--no-baseline"]
    assert main([*args, "--json", "-", "--image", *names]) == 0
    out, err = capsys.readouterr()
    for said in ("first of 2 frames", "CMYK", "16-bit", "transparency", "EXIF orientation 6"):
        assert said in err
    shown = {
        Path(image["path"]).name: (image["width"], image["height"]) for image in json.loads(out)["images"]
    }
    assert len(shown) == len(paths)
    assert shown["turned.jpg"] == (20, 30)


# Models


def test_a_misspelt_model_folder_is_recognised(refusal: Refusal, toy: Path, image: str) -> None:
    assert f"did you mean {toy}?" in refusal(
        "--image", image, "--prompt", "what?", "--model", toy.with_name("toy-lava")
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "holds no config.json"),
        ("{", "cannot be read"),
        ("{}", "names no model_type"),
        ('{"model_type": "qwen2"}', "text-only"),
        ('{"model_type": "novel"}', "no model type 'novel'"),
    ],
)
def test_a_folder_that_is_no_vision_language_model_is_refused(
    refusal: Refusal, image: str, tmp_path: Path, content: str | None, expected: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    # What kind of model it is only transformers knows.
    loads = "model_type" in (content or "")
    assert expected in refusal("--image", image, "--prompt", "what?", "--model", tmp_path, loads=loads)


def test_an_incomplete_model_is_refused(refusal: Refusal, toy: Path, image: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(toy, folder)
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(
        "--image", image, "--prompt", "what?", "--model", folder, loads=True
    )


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        pytest.param(
            ["--device", "cuda"],
            "device cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
        (["--skip-layers", "7"], "skip_layers holds 7"),
        (["--prompt", "<image> and <image>?"], "2 <image>, but 1 image is given"),
    ],
)
def test_what_only_the_model_can_tell_is_refused_too(
    refusal: Refusal, toy: Path, image: str, args: list[str], expected: str
) -> None:
    assert expected in refusal("--image", image, "--prompt", "what?", "--model", toy, *args, loads=True)


# Failures at work


@pytest.fixture
def at_forward(request: pytest.FixtureRequest) -> Callable[[int, Callable[[], object]], None]:
    """Have something done when the model runs for the n-th time (from 1)."""

    def register(number: int, act: Callable[[], object]) -> None:
        calls = []

        def hook(module: torch.nn.Module, arguments: object) -> None:
            if type(module).__name__ == "LlavaForConditionalGeneration":
                calls.append(None)
                if len(calls) == number:
                    act()

        request.addfinalizer(torch.nn.modules.module.register_module_forward_pre_hook(hook).remove)

    return register


def test_running_out_of_memory_says_what_to_try(
    refusal: Refusal, toy: Path, image: str, at_forward: Callable[[int, Callable[[], object]], None]
) -> None:
    # Torch's own refusal: an exbibyte is more than any machine gives.
    at_forward(1, lambda: torch.empty(1 << 60, dtype=torch.uint8))
    error = refusal("--image", image, "--prompt", "what?", "--model", toy, code=1, loads=True)
    assert error.startswith("error: out of memory: 1024.00 PiB more were needed")
    assert "--max-pixels" in error


def test_a_baseline_out_of_memory_leaves_the_pruned_answer(
    toy: Path,
    image: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    at_forward: Callable[[int, Callable[[], object]], None],
) -> None:
    # Two tokens of warm-up and two of the pruned arm are four calls; the fifth is the baseline's prefill.
    at_forward(5, lambda: torch.empty(1 << 60, dtype=torch.uint8))
    args = ["run", "--image", image, "--prompt", "what?", "--model", str(toy), "--max-new-tokens", "2"]
    target = tmp_path / "record.json"
    assert main([*args, "--json", str(target)]) == 1
    err = capsys.readouterr().err
    assert "error: out of memory" in err
    assert "KV cache held" in err
    record = json.loads(target.read_text())
    assert record["pruned"]["new_tokens"] == 2
    assert record["unpruned"] is None
    assert "out of memory" in record["notes"][-1]


def test_an_unexpected_error_is_one_line_and_a_traceback_only_on_request(
    refusal: Refusal,
    toy: Path,
    image: str,
    capsys: pytest.CaptureFixture[str],
    at_forward: Callable[[int, Callable[[], object]], None],
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("a\nfault \x1b[31m")

    at_forward(1, fail)
    args = ["--image", image, "--prompt", "what?", "--model", toy]
    error = refusal(*args, code=1, loads=True)
    assert error.startswith("error: unexpected ZeroDivisionError: a fault \\x1b[31m")
    assert "--debug" in error
    at_forward(1, fail)
    assert main(["run", *map(str, args), "--debug"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" in err


def test_messages_of_running_out_of_memory_are_recognised() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(ValueError("out of memory"))
    assert not is_out_of_memory(PLPHPError("no room"))
