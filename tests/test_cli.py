import io
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from toy_model import save_toy_llava

from plphp_cli.cli.app import main
from plphp_cli.cli.commands import repeat_options
from plphp_cli.results import from_json

# With these the toy model writes a few words, control characters among them, and ends by itself.
WORDY = ["--temperature", "1.5", "--seed", "3"]
WARM_UP_CALLS = 4


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_llava(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / "red.png", folder / "blue.png"]
    Image.new("RGB", (40, 30), "red").save(paths[0])
    Image.new("RGB", (30, 60), "blue").save(paths[1])
    return [str(path) for path in paths]


@pytest.fixture
def command(toy: Path, images: list[str]) -> list[str]:
    return [
        "run",
        "--model",
        str(toy),
        "--image",
        *images,
        "--prompt",
        "what colour?",
        "--max-new-tokens",
        "8",
    ]


@pytest.fixture
def on_forward() -> Iterator[Callable[[int, Callable[[], None]], None]]:
    """Have something done when the model runs for the n-th time (from 1): a real point in a real run."""
    handles = []

    def register(number: int, act: Callable[[], None]) -> None:
        calls = 0

        def hook(module: torch.nn.Module, arguments: Any) -> None:
            nonlocal calls
            if type(module).__name__ == "LlavaForConditionalGeneration":
                calls += 1
                if calls == number:
                    act()

        handles.append(torch.nn.modules.module.register_module_forward_pre_hook(hook))

    yield register
    for handle in handles:
        handle.remove()


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """Sends this process a real SIGINT, also where the tests were started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


class Pieces(io.StringIO):
    """An output that remembers what was written between two flushes."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed: list[str] = []

    def flush(self) -> None:
        text = self.getvalue()[sum(map(len, self.flushed)) :]
        if text:
            self.flushed.append(text)


# Streams


def test_stdout_is_the_answer_alone(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, *WORDY, "--json", os.devnull]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert out.endswith("\n")
    assert "KV cache" not in out
    for expected in ("config: defaults, not calibrated", "KV cache held", "single sample", "layer gamma"):
        assert expected in err


def test_stdout_is_the_pruned_text_of_the_record(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "record.json"
    assert main([*command, *WORDY, "--json", str(target)]) == 0
    out, _ = capsys.readouterr()
    record = from_json(target.read_text())
    unescaped = re.sub(r"\\x([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), out)
    assert unescaped == record.pruned.text + "\n"


def test_the_answer_is_flushed_piece_by_piece(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = Pieces()
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main([*command, *WORDY]) == 0
    assert len(stdout.flushed) >= 5
    assert stdout.flushed[-1] == "\n"


def test_controls_in_the_answer_are_shown_not_sent(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *WORDY, "--max-new-tokens", "30"]) == 0
    out, err = capsys.readouterr()
    assert "\\x" in out
    assert not set(map(chr, [*range(9), *range(11, 32)])) & set(out + err)


def test_json_on_stdout_is_one_object_and_nothing_else(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *WORDY, "--json", "-"]) == 0
    out, _ = capsys.readouterr()
    record = json.loads(out)
    assert set(record) >= {
        *(
            "schema_version",
            "model",
            "config",
            "prompt_tokens",
            "vision_tokens",
            "images",
            "pruned",
            "unpruned",
        ),
        *("layers", "memory", "environment", "interrupted"),
    }
    assert set(record["config"]) >= {"r", "delta_r", "alpha", "beta", "scope", "head_reduce", "calibrated"}
    arm = {"text", "new_tokens", "ttft_s", "decode_tokens_per_s", "kv_bytes_held", "kv_bytes_allocated"}
    assert set(record["pruned"]) >= arm
    assert set(record["unpruned"]) >= arm
    assert record["interrupted"] is False
    assert record["vision_tokens"] == 32
    held = [layer["kv_bytes_held"] for layer in record["layers"]]
    assert sum(held) == record["pruned"]["kv_bytes_held"] < record["unpruned"]["kv_bytes_held"]
    assert record["ratios"]["kv"]["value"] == sum(held) / record["unpruned"]["kv_bytes_held"]


def test_without_a_baseline_there_is_none(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--no-baseline", "--json", "-"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["unpruned"] is None
    assert record["memory"]["unpruned"] is None


def test_the_prompt_may_come_from_stdin(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("welche Farbe? äöü\n".encode())))
    words = ["-" if word == "what colour?" else word for word in command]
    assert main([*words, "--no-baseline", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "welche Farbe? äöü"


def test_the_answers_line_ends_before_the_baseline_begins(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Pieces()
    monkeypatch.setattr(sys, "stdout", both)
    monkeypatch.setattr(sys, "stderr", both)
    assert main([*command, *WORDY]) == 0
    assert "\nunpruned arm\n" in both.getvalue()


# Options


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--image", "a", "b", "--prompt", "x"], ["--image", "a", "--image", "b", "--prompt", "x"]),
        (["--image=a", "b", "--image", "c"], ["--image=a", "--image", "b", "--image", "c"]),
        (["--prompt", "x", "y"], ["--prompt", "x", "y"]),
        (["--image", "a", "--", "b"], ["--image", "a", "--", "b"]),
    ],
)
def test_image_takes_several_values(args: list[str], expected: list[str]) -> None:
    assert repeat_options(args) == expected


def test_knobs_change_a_config_file_and_end_its_calibration(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"r": 0.5, "alpha": 0.6, "beta": 0.2, "calibrated": true, "calibrated_on": "x"}')
    base = [*command, "--no-baseline", "--config", str(path), "--json", "-"]
    assert main([*base, "--r", "0.3"]) == 0
    out, err = capsys.readouterr()
    config = json.loads(out)["config"]
    assert (config["r"], config["alpha"], config["calibrated"]) == (0.3, 0.6, True)
    assert "calibrated, changed by options" in err
    assert main([*base, "--alpha", "0.9", "--skip-layers", "0,2", "--scope", "image"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["config"]["calibrated"] is False
    assert record["config"]["skip_layers"] == [0, 2]
    assert [layer["group"] for layer in record["layers"]][::2] == ["skipped", "skipped"]


def test_the_built_in_model_runs_with_its_own_config_and_says_so_first(
    toy: Path,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(toy, folder)
    (folder / "plphp_config.json").write_text('{"alpha": 0.9, "beta": 0.5, "calibrated": true}')
    monkeypatch.setattr("plphp_cli.models.sources.BUILTIN_FOLDER", folder)
    words = [word for word in command if word not in ("--model", str(toy))]
    assert main([*words, "--no-baseline", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    first = "config: calibrated for the built-in model: r 0.4 delta_r 0.3 alpha 0.9 beta 0.5"
    assert err.splitlines()[0] == first
    assert json.loads(out)["model"] == "builtin"
    assert json.loads(out)["config"]["calibrated"] is True


def test_a_raw_prompt_is_sent_without_the_chat_template(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = []
    for options in ([], ["--raw-prompt"]):
        assert main([*command, "--no-baseline", "--json", "-", *options]) == 0
        tokens.append(json.loads(capsys.readouterr().out)["prompt_tokens"])
    assert tokens[1] < tokens[0]
    assert main([*command, "--raw-prompt", "--system", "be brief"]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_max_pixels_reduces_before_the_processor(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--no-baseline", "--max-pixels", "100", "--json", "-"]) == 0
    sizes = [(image["width"], image["height"]) for image in json.loads(capsys.readouterr().out)["images"]]
    assert all(width * height <= 100 for width, height in sizes)


def test_two_runs_differ_in_times_and_memory_alone(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def timeless(value: Any) -> Any:
        if isinstance(value, list):
            return [timeless(item) for item in value]
        if not isinstance(value, dict):
            return value
        measured = ("memory", "machine_state", "ratios", "decode_tokens_per_s")
        return {
            key: timeless(item)
            for key, item in value.items()
            if key not in measured and not key.endswith("_s")
        }

    records = []
    for _ in range(2):
        assert main([*command, *WORDY, "--json", "-"]) == 0
        records.append(timeless(json.loads(capsys.readouterr().out)))
    assert records[0] == records[1]
    assert main([*command, "--temperature", "1.5", "--seed", "4", "--json", "-"]) == 0
    assert timeless(json.loads(capsys.readouterr().out))["pruned"] != records[0]["pruned"]


# Interruption


@pytest.mark.parametrize(
    ("call", "pruned_tokens", "unpruned_tokens"),
    [
        (1, 0, None),  # warm-up
        (WARM_UP_CALLS + 1, 0, None),  # prefill of the pruned arm
        (WARM_UP_CALLS + 4, 3, None),  # its decoding
        (WARM_UP_CALLS + 9, 8, 0),  # prefill of the baseline
        (WARM_UP_CALLS + 12, 8, 3),  # its decoding
    ],
)
def test_ctrl_c_prints_and_writes_what_there_is(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    on_forward: Callable[[int, Callable[[], None]], None],
    ctrl_c: Callable[[], None],
    call: int,
    pruned_tokens: int,
    unpruned_tokens: int | None,
) -> None:
    on_forward(call, ctrl_c)
    target = tmp_path / "record.json"
    assert main([*command, *WORDY, "--json", str(target)]) == 130
    out, err = capsys.readouterr()
    record = from_json(target.read_text())
    assert record.interrupted
    assert record.pruned.new_tokens == pruned_tokens
    assert record.pruned.stop_reason == ("length" if pruned_tokens == 8 else "interrupted")
    assert (None if record.unpruned is None else record.unpruned.new_tokens) == unpruned_tokens
    assert bool(out.strip()) == bool(pruned_tokens)
    assert "interrupted" in err
    assert "Traceback" not in err


def test_a_run_after_an_interrupted_one_is_unharmed(
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    on_forward: Callable[[int, Callable[[], None]], None],
    ctrl_c: Callable[[], None],
) -> None:
    assert main([*command, *WORDY]) == 0
    whole = capsys.readouterr().out
    on_forward(WARM_UP_CALLS + 3, ctrl_c)
    assert main([*command, *WORDY]) == 130
    assert whole.startswith(capsys.readouterr().out.rstrip("\n"))
    assert main([*command, *WORDY]) == 0
    assert capsys.readouterr().out == whole


def test_a_closed_pipe_ends_quietly_and_keeps_the_record(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    target = tmp_path / "record.json"
    with open(writer, "w") as stdout:  # noqa: PTH123 - a file descriptor
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main([*command, *WORDY, "--json", str(target)]) == 141
    assert "error" not in capsys.readouterr().err
    assert from_json(target.read_text()).interrupted
