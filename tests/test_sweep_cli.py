"""`plphp sweep` as it is typed: files, streams, refusals, a kill and an interruption."""

import csv
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from toy_model import save_toy_llava

from plphp_cli.cli.app import main
from plphp_cli.config import PLPHPConfig
from plphp_cli.serialize import parse
from plphp_cli.sweep import session as session_module
from plphp_cli.sweep import store as store_module
from plphp_cli.sweep.records import SweepRecord

FILES = ["recommended.json", "report.html", "report.json", "results.jsonl", "run.json", "summary.csv"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return str(save_toy_llava(tmp_path_factory.mktemp("toy")))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    rows = [
        {"images": ["red.png"], "prompt": "what?", "answer": "red"},
        {"images": ["red.png", "red.png"], "prompt": "why?"},
        {"images": ["red.png"], "prompt": "who?", "answer": "nobody"},
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "prompts.jsonl"


@pytest.fixture
def command(toy, data, tmp_path):
    return [
        *("sweep", "--alpha", "0.3", "0.9", "--beta", "0.05", "0.4", "--r", "0.2", "0.5"),
        *("--model", toy, "--device", "cpu", "--data", str(data), "--max-new-tokens", "6"),
        *("--measure-speed", "none", "--out", str(tmp_path / "out")),
    ]


def test_the_report_goes_to_stdout_and_the_folder_holds_all_files(command, tmp_path, capsys):
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "Indication only" in out
    assert "base config: defaults, not calibrated" in err
    assert "7 settings (the unpruned baseline among them) on 3 prompts" in err
    assert "2 combinations skipped, such as: alpha = 0.3 is below beta = 0.4" in err
    assert "prompt 3 of 3" in err
    folder = tmp_path / "out"
    assert sorted(file.name for file in folder.iterdir()) == FILES
    record = parse(SweepRecord, (folder / "report.json").read_text())
    assert (record.rows_done, record.rows_expected, len(record.points)) == (21, 21, 7)
    assert record.environment["tool"]["name"] == "plphp-cli"
    assert len(list(csv.reader(io.StringIO((folder / "summary.csv").read_text())))) > 7
    chosen = record.points[record.recommendation.point].setting.config
    assert PLPHPConfig.from_file(folder / "recommended.json") == chosen
    assert record.recommendation.config_file == str(folder / "recommended.json")
    words = shlex.split(record.recommendation.next_command)
    assert words[:2] == ["plphp", "profile"]
    assert {"--config", "--data", "--model", "--device", "--compare-baseline"} <= set(words)
    length = command[command.index("--max-new-tokens") + 1]
    assert words[words.index("--max-new-tokens") + 1] == length


def test_the_same_command_again_is_refused_and_continues_with_resume(command, tmp_path, capsys):
    assert main(command) == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert (out, "not empty" in err, "--resume" in err) == ("", True, True)
    assert main([*command, "--resume", "--json", "-", "--max-kl", "0"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert (record["cost"]["rows"], record["cost"]["resumed_rows"]) == (0, 21)
    assert record["constraint"] == {"name": "kl", "limit": 0.0}
    after = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    for name in ("results.jsonl", "run.json"):
        assert after[name] == before[name]
    # Nothing of this grid has no divergence at all, so nothing is recommended any more.
    assert record["recommendation"]["point"] is None
    assert "recommended.json" not in after


def test_a_killed_sweep_is_continued_to_the_files_of_one_that_was_not(command, tmp_path, capsys):
    assert main([*command, "--resume"]) == 0
    whole = tmp_path / "out"
    killed = tmp_path / "killed"
    words = [str(killed) if word == str(whole) else word for word in command]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-m", "plphp_cli", *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    results = killed / "results.jsonl"
    while process.poll() is None and not (results.exists() and results.read_bytes().count(b"\n") >= 4):
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert main([*words, "--resume"]) == 0
    for name in ("results.jsonl", "summary.csv", "recommended.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def test_ctrl_c_keeps_and_reports_what_was_measured(command, tmp_path, capsys, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    append, count = store_module.Store.append, []

    def interrupted(store, row):
        append(store, row)
        count.append(1)
        if len(count) == 10:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(store_module.Store, "append", interrupted)
    try:
        assert main(command) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    _, err = capsys.readouterr()
    record = parse(SweepRecord, (tmp_path / "out" / "report.json").read_text())
    assert record.interrupted
    assert record.rows_done == 10
    assert "interrupted: continue with the same command and --resume" in err


def test_a_failure_midway_is_one_line_after_the_files_were_written(command, tmp_path, capsys, monkeypatch):
    measure = session_module.measure_prompt

    def broken(loaded, job, tally):
        if job.index == 2:
            raise MemoryError
        yield from measure(loaded, job, tally)

    monkeypatch.setattr(session_module, "measure_prompt", broken)
    assert main(command) == 1
    _, err = capsys.readouterr()
    assert "error: out of memory" in err
    assert "Traceback" not in err
    assert parse(SweepRecord, (tmp_path / "out" / "report.json").read_text()).rows_done == 14
    monkeypatch.undo()
    assert main([*command, "--resume"]) == 0
    assert parse(SweepRecord, (tmp_path / "out" / "report.json").read_text()).rows_done == 21


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-kl", "0.1", "--min-agreement", "0.9"], "--max-kl and --min-agreement were both given"),
        (["--max-kl", "-1"], "max-kl = -1; expected a number of nats"),
        (["--min-agreement", "90"], "min-agreement = 90; expected a number in [0, 1]"),
        (["--method", "plphp", "magic"], "method 'magic'; expected plphp, layer-only"),
        (["--method", "random", "--seeds", "2"], "seeds = 2; expected 5 or more"),
        (["--method", "uniform", "--seeds", "5"], "--seeds was given without --method random"),
        (["--repeats", "3"], "--repeats does not go with --measure-speed none"),
        (["--system", " "], "the system message is blank"),
        (["--scope", "prompt", "picture"], "scope = 'picture'; expected prompt or image"),
        (["--measure-speed", "some"], "measure-speed 'some'; expected all, front, none"),
        (["--repeats", "0"], "repeats = 0"),
        (["--workers", "0"], "workers = 0"),
        (["--out", ""], "--out is empty"),
        (["--json", ""], "--json is empty"),
        (["--image", "a.png"], "--data was given with --image or --prompt"),
        (["--alpha", "0.3", "high"], "Invalid value for '--alpha'"),
        (["--beta", "0.95", "1.5"], "no combination is valid"),
        (["--model", "no/such/folder/x"], "unknown model"),
    ],
)
def test_bad_input_is_one_line_before_any_work(command, tmp_path, capsys, options, message):
    words = (
        command[: command.index("--beta")] + command[command.index("--r") :]
        if "--beta" in options
        else command
    )
    assert main([*words, *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_constraint_on_accuracy_needs_answers_and_pruning_needs_images(command, tmp_path, capsys):
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"prompt": "what?"}\n')
    words = [str(bare) if word.endswith(".jsonl") else word for word in command]
    assert main(words) == 2
    assert "no prompt has an image" in capsys.readouterr().err
    start = command.index("--data")
    image = str(Path(command[start + 1]).parent / "red.png")
    words = [*command[:start], *command[start + 2 :], "--image", image, "--prompt", "what?"]
    assert main([*words, "--max-accuracy-drop", "0.1"]) == 2
    assert "no prompt has an expected answer" in capsys.readouterr().err


def test_more_workers_need_ray_and_say_so(command, capsys, monkeypatch):
    from plphp_cli.cli import sweep_options

    monkeypatch.setattr(sweep_options, "find_spec", lambda name: None)
    assert main([*command, "--workers", "2"]) == 2
    err = capsys.readouterr().err
    assert "spreading prompts needs Ray" in err
    assert "plphp-cli[ray]" in err


def test_prompts_given_twice_count_once(command, data, tmp_path, capsys):
    double = data.with_name("double.jsonl")
    double.write_text(data.read_text() * 2)
    words = [str(double) if word == str(data) else word for word in command]
    assert main(words) == 0
    record = parse(SweepRecord, (tmp_path / "out" / "report.json").read_text())
    assert len(record.prompts) == 3
    assert "3 prompts given more than once: each counts once" in record.warnings
