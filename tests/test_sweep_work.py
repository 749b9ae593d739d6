"""One prompt under many settings: what each holds, costs and answers, as if it were alone."""

import dataclasses
import gc
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, as_prompt, load
from PIL import Image
from runs import CUT, NEW_TOKENS
from toy_model import save_toy_llava
from toys import randomised
from transformers import LlavaForConditionalGeneration

from plphp_cli import models
from plphp_cli.attention import prune
from plphp_cli.config import PLPHPConfig
from plphp_cli.images import load_image
from plphp_cli.models.options import LoadOptions
from plphp_cli.prefilling import advance, prefill
from plphp_cli.profiling import session as session_module
from plphp_cli.profiling.answers import answer_with
from plphp_cli.profiling.fresh import FreshPeaks
from plphp_cli.profiling.machine import Machine
from plphp_cli.profiling.peaks import LiveBytes
from plphp_cli.profiling.session import ProfileSession
from plphp_cli.profiling.state import ProfileRequest, Question
from plphp_cli.pruning import LayerOnlyPolicy, PLPHPPolicy
from plphp_cli.quality import kl
from plphp_cli.sweep import work
from plphp_cli.sweep.grid import expand
from plphp_cli.sweep.matching import Budget, policy_of
from plphp_cli.sweep.plan import plan
from plphp_cli.sweep.records import METHODS, PLPHP, RANDOM, Setting
from plphp_cli.sweep.work import Job, Refused, Tally, measure_prompt

TOKENS = 12
EXEMPT = CUT.replace(skip_layers=[0], head_reduce="max")
GRID = expand(CUT, {"r": [0.2, 0.5, 0.7], "delta_r": [0.1, 0.3]}, METHODS)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """With weights so large that a cut changes the answer."""
    folder = save_toy_llava(tmp_path_factory.mktemp("toy"))
    randomised(LlavaForConditionalGeneration.from_pretrained(folder)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def loaded(toy):
    return models.load(toy, device="cpu")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    Image.radial_gradient("L").save(folder / "ring.png")
    images = tuple(load_image(str(folder / name)) for name in ("red.png", "ring.png"))
    return Question(images, "what changed?", answer="the circle is red."), Question(images[:1], "what is it?")


def measured(loaded, question, settings=GRID.settings, index=0, tally=None):
    return list(measure_prompt(loaded, Job(index, question, tuple(settings), TOKENS), tally or Tally()))


def test_rows_are_what_profile_reports(toy, loaded, questions, monkeypatch):
    monkeypatch.setattr(session_module, "measure_machine", lambda device, dtype: Machine(1e9, 1e9, None, 1))
    monkeypatch.setattr(session_module, "measure_fresh", lambda job: [FreshPeaks(1, 2, 3)])
    for question in questions:
        settings = [s for s in GRID.settings if s.method == PLPHP][:3]
        for row in measured(loaded, question, settings):
            request = ProfileRequest(
                (question,),
                row.config,
                ("pruned", "unpruned"),
                toy,
                options=LoadOptions(device="cpu"),
                repeats=1,
                max_new_tokens=TOKENS,
            )
            session = ProfileSession(request)
            session.load()
            session.run()
            found = session.record()
            quality = found.quality
            assert (row.kl_mean, row.kl_max) == (quality.kl_mean, quality.kl_max)
            assert row.kl_mean > 0
            assert (row.top1_agreement, row.first_divergence) == (
                quality.top1_agreement,
                quality.first_divergence,
            )
            assert row.answer_tokens == quality.answer_tokens
            assert row.kv_bytes_held == found.arms.pruned.kv_bytes_held
            assert row.kv_ratio == found.ratios["kv"].median
            assert row.rate == pytest.approx(sum(layer.rate for layer in found.layers) / len(found.layers))
            exact = quality.exact_match["pruned"]
            assert row.answer_correct == (None if exact is None else bool(exact))
            assert row.answer == (None if question.answer is None else quality.texts.pruned)


def test_every_familys_rows_are_those_of_a_prefill_of_its_own_decoded_step_by_step(family, monkeypatch):
    """Prompts of different image sizes take turns: a position or a mask of another would show."""
    toy = SimpleNamespace(**vars(family.loaded), name="toy", device=torch.device("cpu"))
    settings = [Setting(method, config) for method in ("plphp", "layer-only") for config in (CUT, EXEMPT)]
    for index, inputs in enumerate(family.prompts):
        prompt = as_prompt(inputs)
        monkeypatch.setattr(work, "prepare", lambda *arguments, prompt=prompt: prompt)
        rows = list(measure_prompt(toy, Job(index, Question((), "?"), tuple(settings), NEW_TOKENS), Tally()))
        _, ids = answer_with(toy, prompt, None, NEW_TOKENS)
        reference = step_by_step(toy, prompt, None, ids)[0]
        for row in rows:
            policy = (PLPHPPolicy if row.method == PLPHP else LayerOnlyPolicy)(row.config)
            logits, state = step_by_step(toy, prompt, policy, ids)
            expected = kl(reference, logits)[1:]
            worst = abs(row.kl_mean - expected.mean().item())
            assert worst <= 1e-4 * max(1, expected.mean().item()), f"{row.method}: off by {worst}"
            assert row.kv_bytes_held == sum(layer.held_bytes for layer in state.layers)
            assert row.kv_bytes_full == sum(layer.full_bytes for layer in state.layers)


def step_by_step(loaded, prompt, policy, ids):
    with prune(loaded.model, policy) as pruner:
        run = prefill(loaded, prompt, pruner, len(ids))
        rows = [advance(loaded, run, torch.tensor([[token]]))[-1] for token in ids[:-1]]
    return torch.stack([run.logits, *rows]), run.state


def test_kept_tokens_are_those_of_pruning_itself(loaded, questions):
    prompt = models.prepare(loaded, questions[0].images, questions[0].prompt)
    with prune(loaded.model, None, keep_attention=True) as pruner:
        whole = prefill(loaded, prompt, pruner, 0)
    for setting in GRID.settings[1:]:
        if setting.method not in ("plphp", "layer-only"):
            continue
        policy = policy_of(setting, None)
        with prune(loaded.model, policy) as pruner:
            own = prefill(loaded, prompt, pruner)
        cuts = plan(whole.state, policy).cuts
        for layer in own.state.layers:
            assert torch.equal(cuts[layer.index].kept.cpu(), layer.kept)
            assert cuts[layer.index].rate == layer.rate


def test_ablations_hold_the_bytes_of_the_setting_that_they_are_compared_to(loaded, questions):
    uneven = expand(EXEMPT, {"r": [0.2, 0.33, 0.61], "delta_r": [0.07, 0.3]}, METHODS)
    for question in questions:
        rows = measured(loaded, question, uneven.settings[1:])
        for config in uneven.configs:
            mine = [row for row in rows if row.config == config]
            assert len(mine) == 4 + 5
            assert len({row.kv_bytes_held for row in mine}) == 1, [r.kv_bytes_held for r in mine]
            assert mine[0].kv_bytes_held < mine[0].kv_bytes_full
            # Chance draws anew for every seed, and methods keep other tokens.
            assert len({row.cut_id for row in mine if row.method == RANDOM}) == 5


@pytest.mark.parametrize("tokens", [(0, 0, 0), (3, 3, 3), (1, 0, 0), (10, 0, 3), (5, 5, 4)])
def test_an_even_budget_has_the_same_total_and_layers_differ_by_a_token(tokens):
    budget = Budget(dict(enumerate(tokens, 4)), 10)
    shares = [rate * 10 for rate in budget.even.values()]
    assert sum(shares) == pytest.approx(sum(tokens))
    assert max(shares) - min(shares) <= 1 + 1e-9
    assert list(budget.even) == [4, 5, 6]


def test_one_prefill_serves_all_settings_and_equal_cuts_are_made_once(loaded, questions):
    tally = Tally()
    # Thresholds above every gamma: their settings cut alike.
    grid = expand(CUT, {"alpha": [0.97, 0.6, 0.98]}, METHODS)
    rows = measured(loaded, questions[0], grid.settings, tally=tally)
    assert len(rows) == len(grid.settings)
    assert tally.prefills == 1
    distinct = {row.cut_id for row in rows}
    # The baseline is one of the distinct cuts, and needs no chunk.
    assert tally.chunks == len(distinct) - 1
    assert tally.chunks + tally.shared_cuts == len(rows) - 1
    assert tally.shared_cuts >= 4 + 5
    by_cut = {}
    for row in rows:
        figures = (row.kv_bytes_held, row.kl_mean, row.kl_max, row.first_divergence, row.answer)
        assert by_cut.setdefault(row.cut_id, figures) == figures


def test_a_setting_that_cuts_nothing_is_the_baseline(loaded, questions):
    whole = Setting(PLPHP, PLPHPConfig(r=1, delta_r=0))
    tally = Tally()
    baseline, row = measured(loaded, questions[0], [GRID.settings[0], whole], tally=tally)
    assert (tally.chunks, tally.shared_cuts) == (0, 1)
    assert (row.cut_id, row.kv_ratio, row.kl_mean, row.answer) == (baseline.cut_id, 1.0, 0.0, baseline.answer)
    assert baseline.rate is None
    assert row.rate == 1.0


def test_own_answers_are_those_of_generation_with_the_cut(loaded, questions):
    question = questions[0]
    prompt = models.prepare(loaded, question.images, question.prompt)
    tally = Tally()
    rows = measured(loaded, question, tally=tally)
    unpruned = answer_with(loaded, prompt, None, TOKENS)[0]
    others = 0
    for row in rows:
        if row.method in ("plphp", "layer-only"):
            expected = answer_with(loaded, prompt, policy_of(row.setting, None), TOKENS)[0]
            assert row.answer == expected
            others += expected != unpruned
    assert others > 0
    assert tally.own_answers > 0
    assert rows[0].answer == unpruned
    # Without an expected answer there is nothing to decode on for.
    tally = Tally()
    rows = measured(loaded, questions[1], tally=tally)
    assert tally.own_answers == 0
    assert [row.answer is None for row in rows] == [False] + [True] * (len(rows) - 1)


def test_an_answer_of_one_token_has_no_divergence(loaded, questions):
    job = Job(0, questions[0], GRID.settings[:2], 1)
    for row in measure_prompt(loaded, job, Tally()):
        assert (row.answer_tokens, row.kl_mean, row.kl_max, row.top1_agreement) == (1, None, None, None)


def test_a_setting_that_cannot_cut_a_prompt_is_told_and_the_others_go_on(monkeypatch):
    family = next(name for name in FAMILIES if not load(name).tells_images)
    family = load(family)
    toy = SimpleNamespace(**vars(family.loaded), name="toy", device=torch.device("cpu"))
    prompt = max(map(as_prompt, family.prompts), key=lambda prompt: prompt.prompt_tokens)
    monkeypatch.setattr(work, "prepare", lambda *arguments: prompt)
    settings = (Setting(PLPHP, CUT), Setting(PLPHP, CUT.replace(scope="image")), Setting("uniform", CUT))
    outcomes = list(measure_prompt(toy, Job(0, Question((), "?"), settings, 4), Tally()))
    assert [type(outcome) is Refused for outcome in outcomes] == [False, True, False]
    assert "scope = 'image'" in outcomes[1].reason


def test_memory_is_bounded_by_one_whole_cache_and_one_cut(loaded, questions):
    """The most that is held is that of the largest cut, whatever the grid; between settings there is none."""
    question = dataclasses.replace(questions[0], answer=None)
    rows = [row for row in measured(loaded, question) if row.kv_ratio < 1]
    largest = max(rows, key=lambda row: row.kv_bytes_held).setting
    alone, among_all = (peak_of(loaded, question, each) for each in ([largest], GRID.settings))
    assert among_all == alone

    held = []
    for row in measure_prompt(loaded, Job(0, question, GRID.settings, TOKENS), Tally()):
        held.append(cache_bytes(loaded))
        assert held[-1] == row.kv_bytes_full
    assert len(held) == len(GRID.settings)


def peak_of(loaded, question, settings):
    gc.collect()
    mode = LiveBytes(loaded.device)
    with mode:
        measured(loaded, question, settings)
    return mode.peak


def cache_bytes(loaded):
    """Bytes of all live keys and values: four dimensions, and the heads and width of the cache."""
    text = loaded.model.config.get_text_config()
    heads, width = text.num_key_value_heads, text.head_dim
    tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.dim() == 4]
    caches = [t for t in tensors if (t.shape[0], t.shape[1], t.shape[3]) == (1, heads, width)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in caches}
    return sum(storages.values())
