"""What a profile still tells when memory ends, the user interrupts, or figures are none."""

from types import SimpleNamespace

import pytest
import torch
from profiles import ALL, profiled, request

from plphp_cli import quality as quality_module
from plphp_cli.compiled import CompileStats
from plphp_cli.config import PLPHPConfig
from plphp_cli.profiling import session as session_module
from plphp_cli.profiling.records import PRUNED, UNPRUNED, from_json
from plphp_cli.profiling.session import ProfileSession
from plphp_cli.profiling.state import Question
from plphp_cli.profiling.statistics import MIN_PAIRS
from plphp_cli.reports.profile_terminal import profile_report
from plphp_cli.serialize import to_json


@pytest.mark.parametrize("arm", [PRUNED, UNPRUNED])
def test_an_arm_without_memory_leaves_the_other(toy, images, quick, monkeypatch, arm):
    class Full(session_module.PathArm):
        def decode(self):
            if (self._policy is None) == (arm == UNPRUNED):
                raise torch.OutOfMemoryError("out of memory")
            return super().decode()

    monkeypatch.setattr(session_module, "PathArm", Full)
    record = profiled(request(toy, images, arms=(PRUNED, UNPRUNED), repeats=2))
    other = UNPRUNED if arm == PRUNED else PRUNED
    assert record.arms[arm].failed == "out of memory"
    assert record.arms[arm].decode_s is None
    assert record.arms[other].failed is None
    assert record.arms[other].decode_tokens_per_s is not None
    assert record.ratios["decode"] is None
    assert any("out of memory" in warning for warning in record.warnings)


@pytest.mark.parametrize("piece", ["prepare", "_answer", "PathArm.prefill", "StockArm.prefill", "judge"])
def test_memory_that_ends_anywhere_leaves_a_report(toy, images, quick, monkeypatch, piece):
    def full(*args):
        raise torch.OutOfMemoryError("out of memory")

    owner, _, name = piece.rpartition(".")
    target = getattr(session_module, owner) if owner else session_module
    monkeypatch.setattr(ProfileSession if name == "_answer" else target, name, full)
    record = profiled(request(toy, images, repeats=2))
    failed = [arm for arm, one in record.arms.items() if one.failed]
    expected = {"prepare": ALL, "_answer": ALL, "PathArm.prefill": ALL[:2], "StockArm.prefill": ALL[2:]}
    assert tuple(failed) == expected.get(piece, ())
    assert any("out of memory" in warning for warning in record.warnings)
    assert from_json(to_json(record)) == record
    assert record.arms.unpruned.decode_tokens_per_s is not None or UNPRUNED in failed


def test_the_bound_does_without_a_pruned_arm(toy, images, quick, monkeypatch):
    answer = ProfileSession._answer

    def full(session, state, arm):
        if arm == PRUNED:
            raise torch.OutOfMemoryError("out of memory")
        return answer(session, state, arm)

    monkeypatch.setattr(ProfileSession, "_answer", full)
    record = profiled(request(toy, images, repeats=1))
    assert record.layers == ()
    assert record.bound.kv_bytes_per_step[UNPRUNED] > record.arms.unpruned.kv_bytes_held
    assert record.bound.kv_bytes_per_step[PRUNED] is None
    assert record.bound.attained[UNPRUNED] > 0
    assert "was not measured" in record.bound.speed_up_expected


def test_what_is_interrupted_while_loading_knows_its_circumstances(toy, images, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(session_module, "load_model", interrupted)
    session = ProfileSession(request(toy, images))
    with pytest.raises(KeyboardInterrupt):
        session.load()
    found = session.record(interrupted=True).environment
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert found["image_sha256"] == [image.sha256 for image in images]
    assert found["config"] == PLPHPConfig().to_dict()
    assert (found["model"], found["device"]) == (None, None)


def test_an_unfinished_prompt_does_not_cost_the_others_their_pairs(toy, images, quick):
    questions = tuple(Question(images[:1], text) for text in ("what?", "where?"))
    session = ProfileSession(request(toy, images, questions=questions, arms=(PRUNED, UNPRUNED)))
    session.load()

    def check():
        if (
            min(map(len, session.states[1].decodes.values()), default=0)
            and len(session.states[1].decodes) == 3
        ):
            raise KeyboardInterrupt

    session._check = check
    with pytest.raises(KeyboardInterrupt):
        session.run()
    record = session.record(interrupted=True)
    assert len(record.prompts) == 2
    assert len(record.ratios["decode"].samples) == MIN_PAIRS
    assert record.ratios["decode"].verdict is not None
    assert record.totals[PRUNED]["prompts"] == record.totals[UNPRUNED]["prompts"] == 1
    assert any("prompt 2 was not timed to the end" in warning for warning in record.warnings)


def test_an_interval_needs_pairs(toy, images, quick):
    found = profiled(request(toy, images, repeats=2, arms=(PRUNED, UNPRUNED))).ratios
    assert found["decode"].median > 0
    assert (found["decode"].low, found["decode"].high, found["decode"].verdict) == (None, None, None)
    assert found["kv"].low == found["kv"].high == found["kv"].median


def test_an_interrupted_profile_holds_what_was_measured(toy, images, quick):
    session = ProfileSession(request(toy, images))
    session.load()
    pieces = []

    def check():
        pieces.append(1)
        if session.started and len(session.states[0].prefills) == 4 and session.states[0].decodes:
            raise KeyboardInterrupt

    session._check = check
    with pytest.raises(KeyboardInterrupt):
        session.run()
    record = session.record(interrupted=True)
    assert record.interrupted
    assert record.ratios["ttft"].median > 0
    assert record.quality.kl_mean is not None
    assert from_json(to_json(record)) == record


def test_an_interrupted_profile_says_how_many_tokens_were_asked_for(toy, images, quick):
    session = ProfileSession(request(toy, images))
    session.load()

    def check():
        if session.started:
            raise KeyboardInterrupt

    session._check = check
    with pytest.raises(KeyboardInterrupt):
        session.run()
    record = session.record(interrupted=True)
    assert record.arms.pruned.new_tokens is None
    lines = [line.plain for line in profile_report(record, 80, False)]
    row = next(line for line in lines if line.startswith("end to end, "))
    assert row.split()[3] == str(record.plan.max_new_tokens)
    assert "N/A" in row
    assert from_json(to_json(record)) == record


def test_peaks_of_decoding_say_that_their_steps_were_not_compiled(toy, images, quick):
    session = ProfileSession(request(toy, images, repeats=1))
    session.load()
    session.run()
    told = "peaks of decoding are of uncompiled steps"
    cases = [(None, 0), (CompileStats(refused="no compiler"), 0), (CompileStats(captures=1), 1)]
    for stats, expected in cases:
        session._compiler = None if stats is None else SimpleNamespace(stats=stats)
        assert sum(told in warning for warning in session.record().warnings) == expected


def test_a_first_token_that_differs_is_a_fault_of_the_tool(toy, images, quick):
    session = ProfileSession(request(toy, images, repeats=1))
    session.load()
    session.run()
    assert session.record().faults == ()
    session.states[0].answers.first_tokens["pruned answer"] += 1
    record = session.record()
    assert "fault of the tool" in record.faults[0]
    assert record.quality.first_token_agrees is False


def test_logits_that_are_not_finite_cost_their_figures_only(toy, images, quick, monkeypatch):
    monkeypatch.setattr(quality_module, "kl", lambda one, two: torch.full((len(one),), float("nan")))
    record = profiled(request(toy, images, repeats=1))
    assert (record.quality.kl_mean, record.quality.kl_max) == (None, None)
    assert record.quality.top1_agreement is not None
    assert record.faults == ()
    assert any("not finite" in warning for warning in record.warnings)
    assert from_json(to_json(record)) == record
