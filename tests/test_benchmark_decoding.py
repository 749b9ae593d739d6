"""The benchmark's table at toy size: its columns, arms that do not fit, and words that cannot be meant.

It is run by hand, on machines where much does not fit; no timing is asserted.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from plphp_cli.profiling.machine import Machine

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import decoding
import points

QUICK = ["--vision-tokens", "40", "--batch", "2", "--new-tokens", "4", "--repeats", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(decoding, "measure_machine", lambda device, dtype: Machine(None, None, None, None))


def table(capsys, toy, *words):
    decoding.main(["--shape", toy, *QUICK, *words])
    lines = capsys.readouterr().out.splitlines()
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    names, rule, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert set(rule) == {"---"}
    return dict(zip(names, row, strict=True))


def test_every_cell_has_its_column(toy, tmp_path, capsys):
    target = tmp_path / "points.json"
    row = table(
        capsys, toy, "--arms", "stock", "unpruned", "pruned", "control", "--prefill", "--json", str(target)
    )
    assert (row["vision tokens"], row["batch"]) == ("40", "2")
    assert all(float(row[arm]) > 0 for arm in ("stock", "unpruned", "pruned"))
    ratios = ("pruned vs stock", "unpruned vs stock", "pruned vs unpruned")
    assert all(float(row[name].removesuffix("x")) > 0 for name in ratios), "one pair has no interval"
    assert not any("compiled" in name for name in row)
    (point,) = json.loads(target.read_text())["points"]
    assert point["prefill"]["peak_ratio"] > 0
    assert {arm: len(found) for arm, found in point["samples_s"].items()} == dict.fromkeys(
        ("stock", "unpruned", "pruned", "control"), 1
    )


@pytest.mark.parametrize("arm", ["stock", "unpruned", "pruned"])
def test_an_arm_that_does_not_fit_says_so_and_costs_the_others_nothing(toy, capsys, monkeypatch, arm):
    seconds = points.Point.seconds

    def full(point, of):
        found = seconds(point, of)
        if of == arm:
            raise torch.OutOfMemoryError("out of memory")
        return found

    monkeypatch.setattr(points.Point, "seconds", full)
    row = table(capsys, toy, "--arms", "stock", "unpruned", "pruned")
    for other in ("stock", "unpruned", "pruned"):
        assert (row[other] == "does not fit") == (other == arm)
        assert row[other] == "does not fit" or float(row[other]) > 0
    assert (row["pruned vs unpruned"] == "N/A") == (arm != "stock")


def test_arms_that_do_not_fit_together_run_apart(toy, tmp_path, capsys, monkeypatch):
    fill = points.Point.fill

    def full(point, side):
        if side == "unpruned" and point.rows:
            raise torch.OutOfMemoryError("out of memory")
        return fill(point, side)

    monkeypatch.setattr(points.Point, "fill", full)
    target = tmp_path / "points.json"
    row = table(capsys, toy, "--arms", "pruned", "unpruned", "--json", str(target))
    assert float(row["unpruned"]) > 0
    assert json.loads(target.read_text())["points"][0]["apart"] == ["unpruned"]


def test_memory_that_ends_in_prefill_or_with_the_weights_leaves_a_row(toy, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(points.PathArm, "prefill", full)
    assert float(table(capsys, toy, "--arms", "stock", "pruned", "--prefill")["pruned"]) > 0
    monkeypatch.setattr(decoding, "load_dummy", full)
    assert table(capsys, toy, "--arms", "stock", "pruned")["pruned"] == "does not fit"


@pytest.mark.parametrize(
    ("words", "named"), [(["control", "pruned"], "name unpruned"), (["cut"], "invalid choice: 'cut'")]
)
def test_arms_that_cannot_be_meant_are_refused(words, named, capsys):
    with pytest.raises(SystemExit):
        decoding.main(["--arms", *words])
    assert named in capsys.readouterr().err
