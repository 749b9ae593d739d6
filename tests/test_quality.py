import math

import pytest
import torch
from families import as_prompt, load
from runs import CUT, NEW_TOKENS, answer, settings_of

from plphp_cli.attention import prune
from plphp_cli.prefilling import advance, prefill
from plphp_cli.pruning import FixedRates
from plphp_cli.quality import divergence, kl, layer_need, teacher_forced


def step_by_step(family, inputs, policy, ids):
    with prune(family.model, policy) as pruner:
        run = prefill(family.loaded, as_prompt(inputs), pruner, len(ids))
        rows = [advance(family.loaded, run, torch.tensor([[token]]))[-1] for token in ids[:-1]]
    return torch.stack([run.logits, *rows])


def test_one_chunk_equals_step_by_step(specimen):
    for inputs in specimen.prompts:
        ids = answer(specimen.model, inputs)[0].tolist()
        for name, policy in {"unpruned": None, **settings_of(specimen)}.items():
            chunk = teacher_forced(specimen.loaded, as_prompt(inputs), policy, ids)
            steps = step_by_step(specimen, inputs, policy, ids)
            assert chunk.shape == (NEW_TOKENS, steps.shape[1])
            assert chunk.dtype == torch.float32
            worst = (chunk - steps).abs().max().item()
            assert worst <= 1e-4 * steps.abs().max().item(), f"{name}: logits differ by {worst}"


def test_one_chunk_equals_step_by_step_with_eager_attention():
    family = load("qwen2_5_vl").fresh()
    family.model.set_attn_implementation("eager")
    test_one_chunk_equals_step_by_step(family)


def test_the_first_position_costs_exactly_nothing(specimen):
    inputs = as_prompt(specimen.prompts[0])
    ids = answer(specimen.model, specimen.prompts[0])[0].tolist()
    reference = teacher_forced(specimen.loaded, inputs, None, ids)
    for policy in settings_of(specimen).values():
        divergence = kl(reference, teacher_forced(specimen.loaded, inputs, policy, ids))
        assert divergence[0] == 0
        assert divergence[1:].max() > 0
    assert torch.equal(
        kl(reference, teacher_forced(specimen.loaded, inputs, None, ids)), torch.zeros(NEW_TOKENS)
    )


def test_an_answer_of_one_token_needs_no_decoding():
    family = load("llava")
    prompt = as_prompt(family.prompts[0])
    reference = teacher_forced(family.loaded, prompt, None, [5])
    pruned = teacher_forced(family.loaded, prompt, CUT, [5])
    assert torch.equal(reference, pruned)
    found = divergence(reference, pruned)
    assert (found.first_kl, found.kl, found.agree) == (0.0, [], [])
    assert found.kl_mean is found.kl_max is found.top1_agreement is found.first_divergence is None
    assert layer_need(family.loaded, prompt, [5]) == [None] * 4


def test_kl_is_in_nats_and_directed():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    # Logits are free up to a constant.
    assert kl(p.log() + 3, q.log() - 7).item() == pytest.approx(0.25 * math.log(2), abs=1e-6)
    skewed = torch.tensor([[0.9, 0.05, 0.05]])
    forth, back = kl(p.log(), skewed.log()).item(), kl(skewed.log(), p.log()).item()
    assert forth == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.25 / 0.05), abs=1e-5)
    assert abs(forth - back) > 0.1


def test_kl_survives_extreme_logits():
    reference = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]])
    other = torch.tensor([[1e4, 1.0, -1e4], [0.0, 0.0, 0.0]])
    assert torch.equal(kl(reference, other), torch.zeros(2))


def test_agreement_leaves_out_the_first_position_and_divergence_counts_from_one():
    reference = torch.eye(4)
    other = torch.eye(4)[[0, 1, 0, 3]]
    found = divergence(reference, other)
    assert found.top1_agreement == pytest.approx(2 / 3)
    assert found.first_divergence == 3
    alike = divergence(reference, reference)
    assert alike.first_divergence is None
    assert (alike.top1_agreement, alike.kl_mean, alike.kl_max) == (1.0, 0.0, 0.0)


def test_a_first_position_that_differs_is_never_called_equal():
    reference = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert divergence(reference, reference).first_kl == 0.0
    # A constant more in every logit is the same distribution, so its KL is zero.
    assert divergence(reference, reference + 1).first_kl > 0.0


def test_the_need_of_a_layer_is_what_losing_its_vision_cache_costs(specimen):
    inputs = as_prompt(specimen.prompts[0])
    ids = answer(specimen.model, specimen.prompts[0])[0].tolist()
    reference = teacher_forced(specimen.loaded, inputs, None, ids)
    needs = layer_need(specimen.loaded, inputs, ids)
    assert len(needs) == specimen.model.config.get_text_config().num_hidden_layers
    for layer, need in enumerate(needs):
        alone = teacher_forced(specimen.loaded, inputs, FixedRates({layer: 0.0}), ids)
        divergence = kl(reference, alone)[1:].mean().item()
        if need is None:
            assert divergence == 0, "a layer that was said to be left alone was cut"
        else:
            assert need == pytest.approx(divergence, rel=1e-5)
            assert need > 0
    assert any(needs)
