"""The harness against known quantities: a model whose costs are known on a clock of its own."""

import json
from types import SimpleNamespace

import pytest
import torch
from profiles import ALL, TOKENS, profiled, request

from plphp_cli import models
from plphp_cli.cache import given_cache
from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import PLPHPError
from plphp_cli.profiling.layers import check_bytes
from plphp_cli.profiling.records import FASTER, NO_DIFFERENCE, PRUNED, SLOWER, STOCK, UNPRUNED, from_json
from plphp_cli.profiling.session import ProfileSession
from plphp_cli.profiling.state import Question
from plphp_cli.profiling.statistics import MIN_PAIRS
from plphp_cli.quality import kl, teacher_forced
from plphp_cli.serialize import to_json


class Costs:
    """A clock that moves only when the model runs, by what prefill and a step cost."""

    def __init__(self, prefill=0.0, step=0.0, unpruned_step=None):
        self.now = 0.0
        self._prefill, self._step, self._unpruned = prefill, step, unpruned_step

    def __call__(self):
        return self.now

    def install(self, session):
        decoder = session._loaded.model.get_decoder()
        decoder.register_forward_pre_hook(self._run, with_kwargs=True)

    def _run(self, decoder, args, kwargs):
        cache, embeds = given_cache(kwargs), kwargs["inputs_embeds"]
        if embeds.shape[1] > 1:
            self.now += self._prefill
            return
        layer = cache.layers[0]
        whole = getattr(layer, "held", None) in (None, layer.get_seq_length())
        self.now += self._step if self._unpruned is None or not whole else self._unpruned


def with_costs(asked, **costs):
    clock = Costs(**costs)
    return profiled(asked, clock, clock.install)


def test_known_costs_come_out_exactly(toy, images, quick):
    record = with_costs(request(toy, images), prefill=2.0, step=0.25)
    for name, arm in record.arms.items():
        assert arm.prefill_s == 2.0
        assert arm.ttft_s == 2.0 + arm.preprocess_s
        assert arm.tpot_s.p50 == arm.tpot_s.p99 == 0.25, name
        assert arm.decode_s == 0.25 * (TOKENS - 1)
        assert arm.decode_tokens_per_s == 4.0
        assert arm.new_tokens == TOKENS
        assert arm.end_to_end_s == pytest.approx(arm.ttft_s + arm.decode_s)
        assert len(arm.samples.prefill_s) == len(arm.samples.step_s) == MIN_PAIRS
    assert record.arms.pruned.prune_s == 0.0
    for name in ("decode", "ttft", "end_to_end", "loop_decode"):
        assert record.ratios[name].median == 1.0
        assert record.ratios[name].verdict == NO_DIFFERENCE


def test_a_doubled_decode_cost_yields_one_half(toy, images, quick):
    record = with_costs(request(toy, images, arms=(PRUNED, UNPRUNED)), step=0.5, unpruned_step=0.25)
    found = record.ratios["decode"]
    assert (found.median, found.low, found.high, found.verdict) == (0.5, 0.5, 0.5, SLOWER)
    assert found.control_low == found.control_high == 1.0
    assert record.ratios["ttft"].verdict == NO_DIFFERENCE
    assert record.arms.stock is None


def test_a_saving_names_when_pruning_is_repaid(toy, images, quick):
    record = with_costs(request(toy, images, arms=(PRUNED, UNPRUNED)), step=0.25, unpruned_step=0.5)
    assert record.ratios["decode"].median == 2.0
    assert record.ratios["decode"].verdict == FASTER
    assert record.bound.repaid_after_tokens == 1
    assert record.bound.attained[PRUNED] == record.bound.ideal_step_s[PRUNED] / 0.25


def test_the_record_has_every_key_and_round_trips(toy, images, quick):
    record = profiled(request(toy, images))
    text = to_json(record)
    assert from_json(text) == record
    found = json.loads(text)
    assert found["command"] == "profile"
    assert {"schema_version", "config", "layers", "environment"} <= found.keys()
    figures = {"prefill_s", "prune_s", "ttft_s", "decode_tokens_per_s", "tpot_s", "kv_bytes_held"}
    figures |= {"kv_bytes_allocated", "peak_bytes", "samples"}
    for arm in ALL:
        assert figures <= found["arms"][arm].keys()
        assert {"p50", "p90", "p99"} == found["arms"][arm]["tpot_s"].keys()
    for name in ("decode", "ttft", "end_to_end", "kv"):
        assert {"median", "low", "high"} <= found["ratios"][name].keys()
    bound = {"weight_bytes", "kv_bytes_per_step", "ideal_decode_ratio", "bandwidth_bytes_per_s", "attained"}
    assert bound <= found["bound"].keys()
    quality = {"kl_mean", "kl_p95", "kl_max", "top1_agreement", "first_divergence", "texts"}
    assert quality <= found["quality"].keys()
    assert found["environment"]["command"] == "plphp profile"
    assert found["environment"]["image_sha256"] == [image.sha256 for image in images]


def test_two_profiles_agree_to_the_last_digit_but_for_times(toy, images, quick):
    one, two = (profiled(request(toy, images, repeats=1)) for _ in range(2))
    assert one.quality == two.quality
    assert one.layers == two.layers
    assert one.quality.kl_mean > 0
    for (_, first), (_, second) in zip(one.arms.items(), two.arms.items(), strict=True):
        assert (first.kv_bytes_held, first.kv_bytes_allocated) == (
            second.kv_bytes_held,
            second.kv_bytes_allocated,
        )


def test_bytes_are_predicted_exactly_and_anything_else_is_an_error(toy, images, quick):
    for config in (PLPHPConfig(), PLPHPConfig(scope="image", r=0.3), PLPHPConfig(skip_layers=(1,))):
        record = profiled(request(toy, images, config=config, repeats=1))
        arm = record.arms.pruned
        assert (
            arm.kv_bytes_held
            == arm.kv_bytes_held_predicted
            == sum(layer.kv_bytes_held for layer in record.layers)
        )
        assert arm.kv_bytes_allocated == arm.kv_bytes_allocated_predicted > arm.kv_bytes_held
    layer = SimpleNamespace(
        index=0, held_bytes=96, allocated_bytes=120, prunable=True, full_bytes=100, rate=None
    )
    vision = SimpleNamespace(positions=torch.arange(3), spans=None)
    state = SimpleNamespace(layers=[layer], prompt_tokens=10, vision=vision)
    with pytest.raises(PLPHPError, match="layer 0 of the pruned arm holds 96"):
        check_bytes(state, 2, PLPHPConfig(), "pruned")


def test_with_everything_kept_nothing_differs(toy, images, quick):
    record = profiled(request(toy, images, config=PLPHPConfig(r=1.0, delta_r=0.0), repeats=1))
    assert record.quality.kl_max == 0.0
    assert record.quality.top1_agreement == 1.0
    assert record.quality.texts.pruned == record.quality.texts.unpruned
    assert record.ratios["kv"].median == 1.0
    assert "No speed-up" in record.bound.speed_up_expected


def test_one_new_token_has_no_decoding_and_no_quality(toy, images, quick):
    record = profiled(request(toy, images, max_new_tokens=1, repeats=1))
    assert record.arms.pruned.decode_s is None
    assert record.arms.pruned.ttft_s == record.arms.pruned.end_to_end_s
    assert record.ratios["decode"] is None
    assert record.quality.kl_mean is None
    assert record.quality.first_token_agrees


def test_short_decodes_are_not_rated(toy, images, quick):
    record = profiled(request(toy, images, max_new_tokens=16, repeats=1))
    assert (record.arms.pruned.decode_tokens_per_s, record.arms.pruned.tpot_s) == (None, None)
    assert record.ratios["decode"] is None
    assert len(record.arms.pruned.samples.step_s[0]) == 15


def test_a_prompt_without_images_prunes_nothing(toy, quick):
    asked = request(toy, (), questions=(Question((), "what colour?"),), repeats=1)
    record = profiled(asked)
    assert [layer.gamma for layer in record.layers] == [None] * 3
    assert record.ratios["kv"].median == 1.0
    assert record.bound.capacity[PRUNED].images is None
    assert from_json(to_json(record)) == record


def test_several_prompts_give_totals_spread_and_the_worst(toy, images, quick):
    questions = tuple(
        Question(images[:count], text) for count, text in ((1, "what?"), (2, "where?"), (1, "why?"))
    )
    record = profiled(request(toy, images, questions=questions, arms=(PRUNED, UNPRUNED), repeats=2))
    held = [prompt.arms.pruned.kv_bytes_held for prompt in record.prompts]
    assert record.totals[PRUNED]["kv_bytes_held"] == sum(held)
    assert record.arms.pruned.kv_bytes_held == round(sum(held) / 3)
    means = {prompt.index: prompt.quality.kl_mean for prompt in record.prompts}
    assert record.worst["kl"] == tuple(sorted(means, key=lambda index: -means[index]))
    assert record.spread["kl_mean"].maximum == max(means.values())
    assert record.quality.kl_mean_over_prompts == pytest.approx(sum(means.values()) / 3)
    prefills = [
        sum(column) for column in zip(*(p.arms.pruned.samples.prefill_s for p in record.prompts), strict=True)
    ]
    assert record.arms.pruned.samples.prefill_s == pytest.approx(prefills)


def test_layers_over_prompts_are_means_over_those_that_have_the_figure(toy, images, quick):
    counts = (0, 1, 2)
    questions = tuple(Question(images[:count], "what is it?") for count in counts)
    config = PLPHPConfig(alpha=0.4, beta=0.35)
    record = profiled(request(toy, images, questions=questions, config=config, arms=(PRUNED,), repeats=1))
    assert len(record.layers) == 3
    for place, layer in enumerate(record.layers):
        none, one, two = (prompt.layers[place] for prompt in record.prompts)
        assert none.gamma is None
        assert layer.gamma == pytest.approx((one.gamma + two.gamma) / 2)
        assert layer.kv_bytes_held == pytest.approx(
            (none.kv_bytes_held + one.kv_bytes_held + two.kv_bytes_held) / 3
        )
        assert sum(layer.groups.values()) == 2
        assert layer.group == (one.group if one.group == two.group else None)
        assert layer.image_shares[0] == pytest.approx((one.image_shares[0] + two.image_shares[0]) / 2)
        assert layer.image_shares[1:] == two.image_shares[1:]
        for head, (first, second) in zip(layer.heads, zip(one.heads, two.heads, strict=True), strict=True):
            assert head.gamma == pytest.approx((first.gamma + second.gamma) / 2)
            kept = (first.attention_kept + second.attention_kept) / 2
            assert head.attention_kept == pytest.approx(kept)


def test_the_bound_is_composed_of_the_models_own_sizes(toy, images, quick):
    session = ProfileSession(request(toy, images, repeats=1))
    session.load()
    text = session._loaded.model.config.get_text_config()
    session.run()
    record = session.record()
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    found, tokens = record.bound, record.prompts[0].prompt_tokens
    assert record.arms.unpruned.kv_bytes_held == tokens * token
    assert found.kv_bytes_per_step[UNPRUNED] == tokens * token + token * TOKENS / 2
    assert found.kv_bytes_per_step[STOCK] == 3 * found.kv_bytes_per_step[UNPRUNED]
    cut = found.kv_bytes_per_step[UNPRUNED] - found.kv_bytes_per_step[PRUNED]
    assert cut == record.arms.unpruned.kv_bytes_held - record.arms.pruned.kv_bytes_held > 0
    # Attention multiplies and adds for scores and for values: 4 H d operations for a token of each layer.
    attention = 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim
    weights = 2 * found.weight_bytes / 4
    assert found.operations_per_step[UNPRUNED] == weights + attention * (tokens + TOKENS / 2)


def test_quality_is_of_positions_from_the_second_on(toy, images, quick):
    session = ProfileSession(request(toy, images, repeats=1))
    session.load()
    session.run()
    record, answers = session.record(), session.states[0].answers
    loaded = models.load(toy, device="cpu")
    prompt = session.states[0].prompt
    rows = {name: teacher_forced(loaded, prompt, config, answers.ids) for name, config in
            ((PRUNED, PLPHPConfig()), (UNPRUNED, None))}  # fmt: skip
    expected = kl(rows[UNPRUNED], rows[PRUNED])
    assert record.quality.answer_tokens == len(answers.ids) > 1
    assert record.quality.kl_mean == pytest.approx(expected[1:].mean().item())
    for name, logits in rows.items():
        nats = torch.nn.functional.cross_entropy(logits, torch.tensor(answers.ids))
        assert record.quality.perplexity[name] == pytest.approx(nats.exp().item(), rel=1e-4)
    assert record.quality.perplexity[PRUNED] != record.quality.perplexity[UNPRUNED]


@pytest.mark.parametrize("interrupted", [False, True])
def test_what_is_known_of_the_model_s_products_is_told_once(toy, images, quick, monkeypatch, interrupted):
    """Also where the measurement was broken off, and though the model is gone by the end of a whole one."""
    monkeypatch.setattr("plphp_cli.profiling.session.remarks", lambda model: [f"of {type(model).__name__}"])
    if interrupted:
        session = ProfileSession(request(toy, images))
        session.load()
        record = session.record(interrupted=True)
    else:
        record = profiled(request(toy, images))
    assert [warning for warning in record.warnings if warning.startswith("of ")] == [
        "of LlavaForConditionalGeneration"
    ]
