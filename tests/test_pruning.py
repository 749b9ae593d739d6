import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import plain_cut

from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import ConfigError, UnsupportedError, UsageError
from plphp_cli.pruning import (
    FixedRates,
    HeadOnlyPolicy,
    LayerOnlyPolicy,
    PLPHPPolicy,
    RandomPolicy,
    UniformPolicy,
    allocate,
    as_policy,
    head_scores,
    keep_top,
    last_token_attention,
    ranking,
    retained,
)


@st.composite
def layers(draw):
    kv_heads, group_size = draw(st.sampled_from([(1, 1), (2, 1), (2, 4), (3, 2)]))
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    text = draw(st.integers(1, 5))
    vision = sorted(draw(st.permutations(range(sum(sizes) + text)))[: sum(sizes)])
    # Few different exact weights, so that ties are common and sums are exact in float32.
    cells = (sum(sizes) + text) * kv_heads * group_size
    weights = draw(st.lists(st.sampled_from([0, 1, 2, 3]), min_size=cells, max_size=cells))
    attention = torch.tensor(weights, dtype=torch.float32).view(kv_heads * group_size, -1) / 64
    stops = torch.tensor(sizes).cumsum(0).tolist()
    spans = list(zip([0, *stops[:-1]], stops, strict=True))
    tenths = st.integers(0, 10).map(lambda n: n / 10)
    beta, alpha = sorted([draw(tenths), draw(tenths)])
    config = PLPHPConfig(
        r=draw(tenths),
        delta_r=draw(tenths),
        alpha=alpha,
        beta=beta,
        scope=draw(st.sampled_from(["prompt", "image"])),
        head_reduce=draw(st.sampled_from(["mean", "max"])),
        skip_layers=draw(st.sampled_from([(), (0,), (1,)])),
    )
    return attention, vision, spans, kv_heads, config


@settings(max_examples=300, deadline=None)
@given(layers())
def test_a_cut_equals_the_plain_reimplementation(layer):
    attention, vision, spans, kv_heads, config = layer
    cut = PLPHPPolicy(config).cut(0, attention, torch.tensor(vision), spans, kv_heads)
    gamma, group, rate, kept = plain_cut(attention.tolist(), vision, spans, kv_heads, config, 0)
    assert cut.gamma == pytest.approx(gamma, abs=1e-6)
    assert (cut.group, cut.rate, cut.kept.tolist()) == (group, rate, kept)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_last_token_attention_equals_a_plain_softmax_over_repeated_keys(softcap, sinks, dtype):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(4, 8, generator=generator).to(dtype)
    key = torch.randn(2, 5000, 8, generator=generator).to(dtype)  # more than one block
    attention = last_token_attention(query, key, 0.3, softcap, sinks)
    repeated = key.double().repeat_interleave(2, dim=0)
    logits = torch.einsum("hd,hnd->hn", query.double(), repeated) * 0.3
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    weights = logits.exp()
    total = weights.sum(dim=-1, keepdim=True) + (0 if sinks is None else sinks.double().exp()[:, None])
    assert attention.dtype == torch.float32
    assert attention.shape == (4, 5000)
    torch.testing.assert_close(attention.double(), weights / total, rtol=1e-4, atol=1e-9)


def test_retained_ignores_floating_point_dust():
    assert retained(0.4 - 0.3, 10) == 1
    assert retained(0.1 + 0.2, 10) == 3
    assert retained(0.11, 10) == 2
    assert retained(0.0, 10) == 0
    assert retained(1.0, 10) == 10
    assert retained(0.5, 0) == 0


@pytest.mark.parametrize(
    ("gamma", "group", "rate"),
    [
        (0.25, "attentive", 0.7),
        (0.2499, "balanced", 0.4),
        (0.1, "balanced", 0.4),
        (0.0999, "indifferent", 0.1),
    ],
)
def test_the_thresholds_belong_to_the_upper_group(gamma, group, rate):
    assert allocate(gamma, PLPHPConfig()) == (group, pytest.approx(rate), False)


def test_a_rate_outside_0_1_is_clamped_and_the_cut_says_so():
    attention, vision = torch.full((2, 4), 0.25), torch.tensor([0, 1])
    high = PLPHPPolicy(PLPHPConfig(r=0.8, delta_r=0.5)).cut(0, attention, vision, None, 1)
    low = PLPHPPolicy(PLPHPConfig(r=0.2, delta_r=0.5, alpha=1, beta=1)).cut(0, attention, vision, None, 1)
    exact = PLPHPPolicy(PLPHPConfig(r=0.7, delta_r=0.3)).cut(0, attention, vision, None, 1)
    assert (high.rate, high.clamped, high.kept.tolist()) == (1.0, True, [[0, 1]])
    assert (low.rate, low.clamped, low.kept.shape) == (0.0, True, (1, 0))
    assert (exact.rate, exact.clamped) == (1.0, False)


@pytest.mark.parametrize(
    "policy", [PLPHPPolicy(PLPHPConfig()), HeadOnlyPolicy(0.5), UniformPolicy(0.5), RandomPolicy(0.5, 1)]
)
def test_without_vision_tokens_gamma_group_and_rate_are_null(policy):
    cut = policy.cut(0, torch.full((4, 3), 1 / 3), torch.tensor([], dtype=torch.long), [], 2)
    assert (cut.gamma, cut.group, cut.rate, cut.kept.shape) == (None, None, None, (2, 0))


def test_ties_go_to_the_earlier_position_even_among_thousands():
    vision = torch.arange(5000)
    cut = FixedRates({}, 0.3).cut(0, torch.full((2, 5000), 1 / 5000), vision, None, 2)
    assert cut.kept.tolist() == [list(range(1500))] * 2


def test_scope_image_needs_images_that_can_be_told_apart():
    policy = PLPHPPolicy(PLPHPConfig(scope="image"))
    with pytest.raises(UnsupportedError, match="scope"):
        policy.cut(0, torch.full((2, 4), 0.25), torch.tensor([0, 1]), None, 1)


def scores_that_disagree():
    """Two KV heads that want opposite tokens of four; position 4 is text."""
    return torch.tensor([[0.40, 0.30, 0.15, 0.05, 0.1], [0.10, 0.12, 0.28, 0.40, 0.1]]), torch.arange(4)


def test_shared_rankings_give_every_head_the_same_tokens():
    attention, vision = scores_that_disagree()
    own = PLPHPPolicy(PLPHPConfig(r=0.5, delta_r=0)).cut(0, attention, vision, None, 2)
    layer_only = LayerOnlyPolicy(PLPHPConfig(r=0.5, delta_r=0)).cut(0, attention, vision, None, 2)
    uniform = UniformPolicy(0.5).cut(0, attention, vision, None, 2)
    assert own.kept.tolist() == [[0, 1], [2, 3]]
    assert layer_only.kept.tolist() == uniform.kept.tolist() == [[0, 3], [0, 3]]
    assert layer_only.group == own.group == "attentive"
    assert uniform.group is None


def test_fixed_rates_cut_only_the_layers_they_name():
    attention, vision = scores_that_disagree()
    policy = FixedRates({1: 0.25})
    assert policy.cut(0, attention, vision, None, 2).kept.shape == (2, 4)
    assert policy.cut(1, attention, vision, None, 2).kept.tolist() == [[0], [3]]


def test_random_depends_on_seed_and_layer_alone():
    attention, vision = torch.full((2, 100), 0.01), torch.arange(100)
    kept = [
        RandomPolicy(0.3, seed).cut(layer, attention, vision, None, 2).kept
        for seed, layer in [(0, 0), (0, 0), (1, 0), (0, 1)]
    ]
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])
    assert not torch.equal(kept[0], kept[3])
    assert not torch.equal(kept[0][0], kept[0][1])
    assert torch.equal(kept[0], kept[0].sort(dim=-1).values)


def test_a_config_stands_for_the_method():
    assert as_policy(PLPHPConfig(r=0.5)) == PLPHPPolicy(PLPHPConfig(r=0.5))
    assert as_policy(None) is None
    assert isinstance(as_policy(UniformPolicy(0.5)), UniformPolicy)
    with pytest.raises(ConfigError, match="dict is no setting"):
        as_policy({"r": 0.5})


# What the method has no answer to


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -0.1, 1.0001, True, "0.5", None])
@pytest.mark.parametrize(
    "take",
    [
        lambda rate: retained(rate, 10),
        lambda rate: keep_top(ranking(torch.rand(2, 4)), torch.arange(4), rate),
        lambda rate: FixedRates({3: rate}),
        lambda rate: FixedRates({}, rate),
        HeadOnlyPolicy,
        UniformPolicy,
        lambda rate: RandomPolicy(rate, 0),
    ],
    ids=["retained", "keep_top", "fixed", "fixed default", "head-only", "uniform", "random"],
)
def test_a_rate_that_is_no_share_is_refused_with_its_value(take, rate):
    with pytest.raises(ConfigError, match=r"rate.* = .*; expected a number in \[0, 1\]") as error:
        take(rate)
    assert str(rate)[:5] in error.value.message


@pytest.mark.parametrize(
    "spans",
    [[], [(0, 3)], [(1, 4)], [(0, 2), (3, 4)], [(0, 3), (2, 4)], [(2, 4), (0, 2)], [(0, 5)], [(4, 0)]],
)
def test_spans_that_are_not_the_vision_tokens_image_by_image_are_refused(spans):
    order, vision = ranking(torch.rand(2, 4)), torch.arange(10, 14)
    with pytest.raises(UsageError, match="expected ranges that follow each other from 0 to 4") as error:
        keep_top(order, vision, 0.5, spans)
    assert str(spans) in error.value.message
    with pytest.raises(UsageError, match="a ranking of 4 tokens; expected one of 3"):
        keep_top(order, vision[:3], 0.5)


def test_an_image_without_tokens_keeps_none_and_so_does_a_prompt_without_images():
    order, vision = ranking(torch.tensor([[0.1, 0.4, 0.2, 0.3]])), torch.arange(10, 14)
    assert keep_top(order, vision, 0.5, [(0, 2), (2, 2), (2, 4)]).tolist() == [[11, 13]]
    assert keep_top(order[:, :0], vision[:0], 0.5, []).shape == (1, 0)


def test_heads_and_reductions_that_do_not_fit_are_refused():
    attention, vision = torch.rand(4, 5), torch.arange(3)
    for kv_heads in (0, 3):
        with pytest.raises(UsageError, match=f"{kv_heads} KV heads for 4 query heads"):
            head_scores(attention, vision, kv_heads)
    with pytest.raises(ConfigError, match="head_reduce = 'sum'; expected mean or max"):
        HeadOnlyPolicy(0.5, "sum").cut(0, attention, vision, None, 2)


def test_scores_without_bounds_are_ordered_and_nan_of_either_sign_comes_last():
    nan, inf = float("nan"), float("inf")
    signed = torch.tensor([0x7FC00000, -0x400000], dtype=torch.int32).view(torch.float32)
    assert signed.isnan().all()
    scores = torch.tensor([[nan, -inf, 0.5, inf, -2.0, nan]])
    scores[0, [0, 5]] = signed
    assert keep_top(ranking(scores), torch.arange(6), 0.5).tolist() == [[2, 3, 4]]
    assert ranking(scores)[0].argsort(descending=True).tolist() == [3, 2, 4, 0, 1, 5]


def test_a_layer_that_attends_with_nan_is_balanced_and_keeps_its_share():
    attention = torch.full((4, 12), float("nan"))
    cut = PLPHPPolicy(PLPHPConfig(r=0.3)).cut(0, attention, torch.arange(10), None, 2)
    assert (cut.group, cut.rate) == ("balanced", 0.3)
    assert cut.kept.tolist() == [[0, 1, 2]] * 2


def test_no_value_of_a_tensor_is_read_back_to_choose_tokens():
    """Meta tensors have none: what would make a GPU's host wait fails here."""
    attention, vision = torch.rand(4, 30, device="meta"), torch.arange(20, device="meta")
    order = ranking(head_scores(attention, vision, 2, "max"))
    for spans, kept in ((None, 8), ([(0, 5), (5, 20)], 8), ([(0, 3), (3, 20)], 9)):
        assert keep_top(order, vision, 0.4, spans).shape == (2, kept)
