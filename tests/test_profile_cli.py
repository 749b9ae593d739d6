"""`plphp profile` as it is typed: files, streams, refusals and interruptions."""

import csv
import io
import json
import signal

import pytest
import torch
from PIL import Image
from toy_model import save_toy_llava

from plphp_cli.cli.app import main
from plphp_cli.profiling import session as session_module
from plphp_cli.profiling.fresh import FreshPeaks
from plphp_cli.profiling.machine import Machine
from plphp_cli.profiling.records import from_json
from plphp_cli.reports.profile_csv import COLUMNS, profile_csv
from plphp_cli.reports.profile_html import profile_html
from plphp_cli.reports.profile_terminal import profile_report


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return str(save_toy_llava(tmp_path_factory.mktemp("toy")))


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "red.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return str(path)


@pytest.fixture
def command(toy, image, monkeypatch):
    """A quick profile: the measurements of the machine and of fresh processes have tests of their own."""
    monkeypatch.setattr(
        session_module, "measure_machine", lambda device, dtype: Machine(1e9, 1e9, None, 1 << 30)
    )
    monkeypatch.setattr(session_module, "measure_fresh", lambda job: [FreshPeaks(1, 2, 3)] * len(job.prompts))
    what = ["profile", "--model", toy, "--device", "cpu", "--image", image, "--prompt", "what <b>colour</b>?"]
    return [*what, "--compare-baseline", "--repeats", "3", "--max-new-tokens", "18"]


def test_the_report_goes_to_stdout_and_the_files_are_whole(command, tmp_path, capsys):
    files = {kind: tmp_path / f"report.{kind}" for kind in ("json", "csv", "html")}
    options = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    assert main([*command, *options]) == 0
    out, err = capsys.readouterr()
    assert "Pruning holds" in out
    assert "One prompt is an anecdote" in out
    assert "config:" not in out
    assert "config: defaults, not calibrated" in err
    assert sorted(tmp_path.iterdir()) == sorted(files.values())
    record = from_json(files["json"].read_text())
    assert record.arms.stock is None
    assert record.arms.unpruned is not None
    rows = list(csv.DictReader(io.StringIO(files["csv"].read_text())))
    assert tuple(rows[0]) == COLUMNS
    steps = [row for row in rows if row["figure"] == "step_s" and row["arm"] == "pruned"]
    # The same of one prompt as over all, which is told once.
    assert len(steps) == 3 * 17
    assert [float(row["value"]) for row in steps[:17]] == list(record.arms.pruned.samples.step_s[0])
    told = {row["figure"]: row["value"] for row in rows if not row["prompt"]}
    assert told["environment.torch"] == record.environment["torch"]
    assert told["config.alpha"] == str(record.config.alpha)
    page = files["html"].read_text()
    assert page == profile_html(record)
    for foreign in ("<script", "http-equiv", "<link", "src=", "@import", "url(http", "<b>colour</b>"):
        assert foreign not in page
    assert page.count("<svg") == 4

    before = files["json"].read_bytes()
    assert main([*command, "--json", str(files["json"])]) == 2
    assert "exists already" in capsys.readouterr().err
    assert files["json"].read_bytes() == before
    assert main([*command, "--json", str(files["json"]), "--force"]) == 0
    assert files["json"].read_bytes() != before

    for width in (40, 80, 200):
        lines = profile_report(record, width, colour=True)
        assert all(line.cell_len <= width for line in lines)


def test_json_on_stdout_is_the_record_alone(command, capsys):
    assert main([*command, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["command"] == "profile"
    assert "Pruning holds" in err


def test_without_a_baseline_only_the_pruned_arm_is_measured(command, capsys):
    command.remove("--compare-baseline")
    assert main([*command, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["arms"]["unpruned"] is None
    assert found["arms"]["pruned"]["decode_tokens_per_s"] > 0
    assert found["ratios"] == {"decode": None, "ttft": None, "end_to_end": None, "kv": None}


def test_a_file_of_prompts_is_measured_whole(command, image, tmp_path, capsys):
    data = tmp_path / "prompts.jsonl"
    rows = [
        {"images": [image], "prompt": "what?", "answer": "red"},
        {"images": [image] * 2, "prompt": "why?"},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = command.index("--image")
    assert main([*command[:start], *command[start + 4 :], "--data", str(data), "--json", "-"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [prompt["line"] for prompt in found["prompts"]] == [1, 2]
    assert found["quality"]["exact_match"]["pruned"] == 0.0
    assert "2 prompts are few (under 10): indication only" in " ".join(err.split())


def test_ctrl_c_reports_what_was_measured(command, tmp_path, capsys, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    decode, count = session_module.PathArm.decode, []

    def interrupted(arm):
        count.append(1)
        if len(count) == 5:
            signal.raise_signal(signal.SIGINT)
        return decode(arm)

    monkeypatch.setattr(session_module.PathArm, "decode", interrupted)
    path = tmp_path / "report.json"
    try:
        assert main([*command, "--json", str(path)]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    out, err = capsys.readouterr()
    record = from_json(path.read_text())
    assert record.interrupted
    assert record.ratios["ttft"] is not None
    assert "Interrupted: the figures are of what had been measured" in " ".join(out.split())
    assert {"interrupted", f"json: {path}"} <= set(err.splitlines())


def test_ctrl_c_while_files_are_written_costs_neither_them_nor_the_report(
    command, tmp_path, capsys, monkeypatch
):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(record):
        signal.raise_signal(signal.SIGINT)
        return profile_csv(record)

    monkeypatch.setattr("plphp_cli.reports.profile_csv.profile_csv", interrupted)
    files = [tmp_path / "a.json", tmp_path / "a.csv", tmp_path / "a.html"]
    options = [word for path in files for word in (f"--{path.suffix[1:]}", str(path))]
    try:
        assert main([*command, *options]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert all(path.stat().st_size for path in files)
    assert not from_json(files[0].read_text()).interrupted
    assert "Pruning holds" in capsys.readouterr().out


def test_a_file_that_cannot_be_written_costs_neither_the_others_nor_the_report(
    command, tmp_path, capsys, monkeypatch
):
    def meanwhile(record):
        path.write_text("another's")
        raise ValueError("no plot")

    path = tmp_path / "a.json"
    monkeypatch.setattr("plphp_cli.reports.profile_html.profile_html", meanwhile)
    monkeypatch.setattr("plphp_cli.cli.profile.profile_html", meanwhile, raising=False)
    page = tmp_path / "b.html"
    assert main([*command, "--html", str(page), "--csv", str(tmp_path / "c.csv")]) == 1
    out, err = capsys.readouterr()
    assert "Pruning holds" in out
    assert f"cannot write the html file {page}: ValueError: no plot" in err
    assert (tmp_path / "c.csv").exists()


def test_an_arm_out_of_memory_still_gives_a_report(command, capsys, monkeypatch):
    def full(arm):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(session_module.PathArm, "decode", full)
    assert main([*command, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["arms"]["unpruned"]["failed"] == "out of memory"
    assert "The unpruned arm failed: out of memory" in " ".join(err.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "0"], "repeats = 0"),
        (["--warmup", "-1"], "warmup = -1"),
        (["--max-new-tokens", "0"], "max-new-tokens = 0"),
        (["--data", "x.jsonl"], "--data was given with --image or --prompt"),
        (["--csv", ""], "--csv is empty"),
        (["--csv", "same", "--html", "same"], "name the same file"),
        (["--html", "no/such/folder/a.html"], "there is no folder"),
    ],
)
def test_bad_input_is_one_line_before_any_work(command, capsys, options, message):
    assert main([*command, *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err
