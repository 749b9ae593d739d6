"""A whole sweep: what a kill leaves is continued to the same files; speed as `profile` takes it."""

import dataclasses
import random
import shutil

import pytest
from PIL import Image
from toy_model import save_toy_llava

from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import ConfigError, UsageError
from plphp_cli.images import load_image
from plphp_cli.models import load
from plphp_cli.models.options import LoadOptions
from plphp_cli.profiling.state import Question
from plphp_cli.profiling.timing import DecodeSample
from plphp_cli.reports.sweep_csv import sweep_csv
from plphp_cli.sweep import speed as speed_module
from plphp_cli.sweep.benchmark import compare, grid_of
from plphp_cli.sweep.grid import expand
from plphp_cli.sweep.records import BASELINE, PLPHP, RANDOM, Constraint
from plphp_cli.sweep.request import ALL, FRONT, NONE, SweepRequest
from plphp_cli.sweep.session import SweepSession
from plphp_cli.sweep.store import RESULTS

BASE = PLPHPConfig(alpha=0.6, beta=0.3)
TOKENS = 18


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return str(save_toy_llava(tmp_path_factory.mktemp("toy")))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    found = []
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 30), colour).save(folder / f"{colour}.png")
        image = load_image(str(folder / f"{colour}.png"))
        found.append(Question((image,) * (1 + number % 2), f"what is {number}?", answer="red", line=number))
    return tuple(found)


@pytest.fixture
def request_of(toy, questions, tmp_path):
    def make(**changes):
        base = SweepRequest(
            questions=questions,
            grid=expand(BASE, {"r": [0.2, 0.5]}, ["plphp", "uniform"]),
            constraint=Constraint("kl", 0.05),
            model=toy,
            out=tmp_path / "out",
            options=LoadOptions(device="cpu"),
            max_new_tokens=TOKENS,
            measure_speed=NONE,
            command=("plphp", "sweep"),
        )
        return dataclasses.replace(base, **changes)

    return make


def swept(request, **callbacks):
    with SweepSession(request, **callbacks) as session:
        session.prepare()
        session.run()
        return session.record()


def figures(record):
    """What a sweep found, without what finding it took."""
    return dataclasses.replace(record, cost=None, environment={}, warnings=())


def test_every_setting_on_every_prompt_and_one_prefill_each(request_of, questions):
    shown = []
    record = swept(request_of(), show=shown.append)
    assert (record.rows_done, record.rows_expected) == (15, 15)
    assert (record.cost.rows, record.cost.resumed_rows, record.cost.prefills) == (15, 0, 3)
    assert [point.setting.method for point in record.points] == [BASELINE, *[PLPHP, "uniform"] * 2]
    assert record.environment["model"]["id"] == record.model
    assert [prompt.line for prompt in record.prompts] == [0, 1, 2]
    assert all(prompt.unpruned_answer is not None for prompt in record.prompts)
    assert [prompt.vision_tokens for prompt in record.prompts] == [16, 32, 16]
    done = [progress.done_rows for progress in shown]
    assert done == sorted(done)
    assert done[-1] == 15
    assert shown[-1].remaining_s == 0


def test_a_kill_at_any_byte_is_continued_to_the_same_files(request_of):
    whole = swept(request_of())
    out = request_of().out
    content = (out / RESULTS).read_bytes()
    places = random.Random(1).sample(range(len(content)), 4)
    for number, place in enumerate([0, *places, len(content)]):
        copy = out.with_name(f"copy{number}")
        shutil.copytree(out, copy)
        (copy / RESULTS).write_bytes(content[:place])
        record = swept(request_of(out=copy, resume=True))
        assert (copy / RESULTS).read_bytes() == content
        assert figures(record) == figures(whole)
        assert sweep_csv(record) == sweep_csv(whole)
        assert record.cost.resumed_rows == content[:place].count(b"\n")
        assert record.cost.rows == 15 - record.cost.resumed_rows


def test_an_interrupted_sweep_keeps_what_it_measured(request_of):
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt

    with SweepSession(request_of(), check=check) as session:
        session.prepare()
        with pytest.raises(KeyboardInterrupt):
            session.run()
        assert session.started
        record = session.record(interrupted=True)
    assert record.interrupted
    assert record.rows_done == (request_of().out / RESULTS).read_bytes().count(b"\n") == 5
    assert figures(swept(request_of(resume=True))).rows_done == 15


def test_a_larger_grid_and_more_prompts_measure_only_what_is_new(request_of, questions):
    swept(request_of(questions=questions[:2]))
    grid = expand(BASE, {"r": [0.1, 0.2, 0.5]}, ["plphp", "uniform"])
    record = swept(request_of(grid=grid, resume=True))
    assert (record.cost.resumed_rows, record.cost.rows) == (2 * 5, 2 * 2 + 7)
    fresh = swept(request_of(grid=grid, out=request_of().out.with_name("fresh")))
    assert figures(record) == figures(fresh)
    assert sweep_csv(record) == sweep_csv(fresh)


def test_rows_stand_where_this_invocation_has_their_prompt_and_config(request_of, questions):
    swept(request_of())
    calibrated = expand(BASE.replace(calibrated=True, calibrated_on="these"), {"r": [0.5]})
    turned = request_of(grid=calibrated, questions=questions[::-1], resume=True)
    with SweepSession(turned) as session:
        assert [row.prompt_index for row in session.rows()] == [0, 0, 1, 1, 2, 2]
        assert {row.config for row in session.rows()} == {None, *calibrated.configs}
        record = session.record()
    assert record.rows_done == record.rows_expected == 6
    assert [point.setting for point in record.points] == list(calibrated.settings)


def test_another_length_of_answers_is_another_sweep(request_of):
    swept(request_of())
    with pytest.raises(UsageError, match="max new tokens was 18 and is 19"):
        SweepSession(request_of(max_new_tokens=19, resume=True))


def test_layers_that_the_model_lacks_are_refused_before_any_work(request_of):
    grid = expand(BASE.replace(skip_layers=[7]), {})
    with SweepSession(request_of(grid=grid)) as session, pytest.raises(ConfigError, match="layers 0 to 2"):
        session.prepare()


class KnownSpeed:
    """A decode costs two seconds where nothing was cut, one where something was."""

    def __init__(self):
        self.cuts = []

    def __call__(self, loaded, prompts, new_tokens, timer):
        (prefilled,) = prompts
        ratio = sum(s.held_bytes for s in prefilled.state.layers) / sum(
            s.full_bytes for s in prefilled.state.layers
        )
        self.cuts.append(round(ratio, 3))
        seconds = 2.0 if ratio == 1 else 1.0
        return DecodeSample((seconds / (new_tokens - 1),) * (new_tokens - 1), (0,) * new_tokens)


def test_speed_is_paired_with_the_baseline_in_turns(request_of, monkeypatch):
    known = KnownSpeed()
    monkeypatch.setattr(speed_module, "time_decode", known)
    grid = expand(BASE, {"r": [0.2, 0.5]}, ["plphp", "random"])
    record = swept(request_of(grid=grid, measure_speed=ALL))
    # Nine pairs over three prompts, and a warm-up: baseline, two of plphp, two first seeds, the control.
    assert len(known.cuts) == 3 * (3 + 1) * 6
    ratio = [cut == 1 for cut in known.cuts[:12]]
    assert ratio == [True, *[False] * 4, True] * 2
    for point in record.points:
        if point.setting.method == BASELINE:
            assert (point.decode_tokens_per_s, point.decode_ratio) == (pytest.approx((TOKENS - 1) / 2), None)
        else:
            assert point.decode_tokens_per_s == pytest.approx(TOKENS - 1)
            assert point.decode_ratio.mean == pytest.approx(2.0)
            assert point.decode_verdict == "faster"
    rows = (request_of().out / RESULTS).read_text().splitlines()
    assert len(rows) == record.rows_done
    assert sum('"decode_tokens_per_s": null' not in row for row in rows) == 3 * 5
    # All is known: nothing is timed again.
    again = swept(request_of(grid=grid, measure_speed=ALL, resume=True))
    assert len(known.cuts) == 3 * 4 * 6
    assert again.points == record.points


def test_by_default_the_front_is_timed_for_real(request_of, questions):
    record = swept(request_of(measure_speed=FRONT, questions=questions[:1], repeats=9))
    for point in record.points:
        wanted = point.on_front or point.on_accuracy_front or point.setting.method == BASELINE
        assert (point.decode_tokens_per_s is not None) == wanted
        if wanted and point.setting.method != BASELINE:
            assert point.decode_ratio.low <= point.decode_ratio.mean <= point.decode_ratio.high
            assert point.decode_verdict is not None


def test_answers_too_short_to_time_are_not_timed(request_of, monkeypatch):
    monkeypatch.setattr(speed_module, "time_decode", None)
    record = swept(request_of(measure_speed=ALL, max_new_tokens=16))
    assert all(point.decode_tokens_per_s is None for point in record.points)


def test_seeds_of_chance_are_one_point(request_of):
    grid = expand(BASE, {"r": [0.3]}, ["random"], seeds=5)
    record = swept(request_of(grid=grid))
    assert [(p.setting.method, p.seeds) for p in record.points] == [(BASELINE, None), (RANDOM, 5)]


def test_the_benchmark_compares_ways_to_the_same_figures(request_of, questions):
    bare = tuple(dataclasses.replace(question, answer=None) for question in questions[:2])
    request = request_of(questions=bare, grid=grid_of(6, BASE))
    found = compare(load(request.model, device="cpu"), request, 3)
    assert (found["settings"], found["prompts"], found["naive_pairs_timed"]) == (6, 2, 6)
    assert found["largest_kl_difference"] <= 1e-4
    assert found["naive_s"] > 0 < found["sweep_s"]
