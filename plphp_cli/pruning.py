"""PLPHP as pure tensor functions (arXiv 2502.14504), and the policies built from them.

Level 1 gives each layer a retention rate from its vision attention score gamma; level 2 lets each KV head
keep the vision tokens that its query heads attend to most. Nothing here knows a model or a cache.

What the host knows (rates, spans, shapes) is checked. What tensors hold is not: reading it back would make a
device wait at every layer. A model whose numbers overflow may attend with NaN: such a layer is balanced, and
a token that scores NaN ranks behind all others.

Shapes: H query heads, K key/value heads, N prompt tokens, n_v vision tokens, of which each head of layer l
keeps n_l.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from plphp_cli.config import HEAD_REDUCES, PLPHPConfig, fraction
from plphp_cli.errors import ConfigError, UnsupportedError, UsageError

Span = tuple[int, int]

# Floating-point dust must not add a token: 0.4 - 0.3 keeps 1 of 10, not 2.
_DUST = 1e-6
# Positions whose keys are widened to float32 at a time.
_BLOCK = 4096


@dataclass(frozen=True, eq=False)
class Cut:
    """What one layer keeps.

    Attributes:
        gamma: vision attention score of the layer, in [0, 1]; None without vision tokens.
        group: `attentive`, `balanced`, `indifferent`, `skipped`; None where the policy has no groups.
        rate: retention rate r_l, in [0, 1]; None without vision tokens.
        kept: LongTensor [K, n_l], prompt positions of the vision tokens that each head keeps, ascending.
        clamped: True when `r + delta_r` or `r - delta_r` left [0, 1] and was clamped.
    """

    gamma: float | None
    group: str | None
    rate: float | None
    kept: Tensor
    clamped: bool = False


class Policy(Protocol):
    """Decides, layer by layer, which vision tokens each KV head keeps."""

    def cut(
        self, layer: int, attention: Tensor, vision: Tensor, spans: Sequence[Span] | None, kv_heads: int
    ) -> Cut:
        """Cut one layer.

        Args:
            layer: index of the decoder layer.
            attention: float32 [H, N], attention of the last prompt token over all prompt tokens.
            vision: LongTensor [n_v], prompt positions of the vision tokens, ascending.
            spans: per image the half-open range of its tokens in `vision`; None when that is not known.
            kv_heads: K, the number of heads that the cache stores.
        """
        ...


def last_token_attention(
    query: Tensor, key: Tensor, scaling: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """A[l, h, j]: attention of the last prompt token over all prompt tokens, float32 [H, N].

    Args:
        query: [H, d], the last token's queries after RoPE.
        key: [K, N, d], the keys after RoPE; they are read in blocks, never copied whole or repeated.
        scaling: factor on query . key, as the layer has it.
        softcap: the layer's cap on attention logits, if it has one.
        sinks: [H], the layer's learned sink logits, which take a share of the softmax, if it has any.
    """
    kv_heads, width = key.shape[0], key.shape[-1]
    rows = query.reshape(kv_heads, -1, width)
    if key.is_cuda and key.dtype in (torch.bfloat16, torch.float16):
        # The products of two such numbers are exact in float32, which cuBLAS can sum and return.
        logits = torch.bmm(rows, key.mT, out_dtype=torch.float32).flatten(0, 1) * scaling
    else:
        blocks = [torch.matmul(rows.float(), block.float().mT) for block in key.split(_BLOCK, dim=1)]
        logits = torch.cat(blocks, dim=-1).flatten(0, 1) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if sinks is None:
        return logits.softmax(dim=-1)
    return torch.cat([logits, sinks.float()[:, None]], dim=-1).softmax(dim=-1)[:, :-1]


def vision_attention_score(attention: Tensor, vision: Tensor) -> float | None:
    """gamma_l: attention [H, N] summed over positions `vision` [n_v], mean over heads; None if n_v = 0."""
    if vision.numel() == 0:
        return None
    return attention[:, vision].sum(dim=-1).mean().item()


def allocate(gamma: float, config: PLPHPConfig) -> tuple[str, float, bool]:
    """Level 1: group, retention rate in [0, 1], and whether it was clamped, of a layer with score `gamma`.

    NaN, which no threshold divides, is balanced.
    """
    if gamma >= config.alpha:
        group, rate = "attentive", config.r + config.delta_r
    elif gamma < config.beta:
        group, rate = "indifferent", config.r - config.delta_r
    else:
        group, rate = "balanced", config.r
    clamped = min(max(rate, 0.0), 1.0)
    return group, clamped, abs(clamped - rate) > _DUST


def retained(rate: float, count: int) -> int:
    """How many of `count` vision tokens a head keeps: ceil(rate * count - 1e-6).

    Raises:
        ConfigError: the rate is no number in [0, 1].
    """
    return max(0, math.ceil(fraction("rate", rate) * count - _DUST))


def head_scores(attention: Tensor, vision: Tensor, kv_heads: int, reduce: str = "mean") -> Tensor:
    """Scores [K, n_v] of the vision tokens: attention [H, N] reduced over the query heads of each KV head.

    Raises:
        ConfigError: `reduce` is neither `mean` nor `max`.
        UsageError: H is not a multiple of `kv_heads`.
    """
    if reduce not in HEAD_REDUCES:
        raise ConfigError(f"head_reduce = {reduce!r}; expected {' or '.join(HEAD_REDUCES)}")
    if kv_heads < 1 or attention.shape[0] % kv_heads:
        raise UsageError(f"{kv_heads} KV heads for {attention.shape[0]} query heads; expected a divisor")
    grouped = attention[:, vision].unflatten(0, (kv_heads, -1))
    return grouped.amax(dim=1) if reduce == "max" else grouped.mean(dim=1)


def ranking(scores: Tensor) -> Tensor:
    """Keys int64 [K, n_v] that order as `scores` [K, n_v] do, the earlier position first on a tie.

    Infinite scores have their place at the ends; NaN ranks with minus infinity, on every device.
    No two keys of a head are equal, so `topk`, which leaves the order of equal values open, has one answer:
    that of a stable sort, at a third of its time (4 heads, 7,290 tokens, CPU).
    """
    if scores.device.type == "mps":
        scores = scores.cpu()  # there, long integers may be ordered as the nearest float32
    numbers = scores.float().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    bits = (numbers + 0.0).view(torch.int32)  # the sum makes -0.0 the equal of 0.0
    # Floats are ordered as their bits are; negative ones the other way around.
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (bits << 32) + torch.arange(scores.shape[-1], 0, -1, device=scores.device)


def keep_top(order: Tensor, vision: Tensor, rate: float, spans: Sequence[Span] | None = None) -> Tensor:
    """Level 2: the best of `vision` [n_v] by `ranking` [K, n_v], as prompt positions [K, n_l], ascending.

    With `spans` each image keeps its own share, by its own ranking.

    Raises:
        ConfigError: the rate is no number in [0, 1].
        UsageError: the ranking is of another number of tokens, or the spans do not follow each other from the
            first of them to the last.
    """
    whole = (0, vision.numel())
    if order.shape[-1] != whole[1]:
        raise UsageError(f"a ranking of {order.shape[-1]} tokens; expected one of {whole[1]} vision tokens")
    if spans is not None:
        _check_spans(spans, whole[1])
    best = []
    for start, stop in spans or [whole]:
        count = retained(rate, stop - start)
        best.append(start + order[:, start:stop].topk(count, dim=-1, sorted=False).indices)
    chosen = torch.cat(best, dim=-1)
    places = marked(torch.zeros_like(order, dtype=torch.bool).scatter(1, chosen, True), chosen.shape[1])
    return vision[places.to(vision.device)]


def _check_spans(spans: Sequence[Span], count: int) -> None:
    position = 0
    for start, stop in spans:
        if start != position or stop < start:
            break
        position = stop
    else:
        if position == count:
            return
    raise UsageError(
        f"spans = {list(spans)!r:.200}; expected ranges that follow each other from 0 to {count}",
        hint="each image's half-open range in the vision tokens",
    )


def marked(mask: Tensor, count: int) -> Tensor:
    """LongTensor [K, count], ascending: where each row of `mask` [K, N] is True, which is `count` times."""
    heads, width = mask.shape
    places = torch.arange(width, device=mask.device).expand(heads, -1)
    # What is not marked goes to one slot past the end: nothing is sorted, and no number waited for.
    slots = torch.where(mask, mask.cumsum(dim=-1) - 1, count)
    return places.new_empty(heads, count + 1).scatter_(1, slots, places)[:, :count]


def keep_all(vision: Tensor, kv_heads: int) -> Tensor:
    """LongTensor [K, n_v]: every head keeps every vision token."""
    return vision.expand(kv_heads, -1)


def _shared(scores: Tensor) -> Tensor:
    """One ranking for all heads: the mean of `scores` [K, n_v] over heads, repeated to [K, n_v]."""
    return scores.mean(dim=0, keepdim=True).expand_as(scores)


@dataclass(frozen=True)
class PLPHPPolicy:
    """The method itself: both levels, with the options of `config`; `score` gives a layer's gamma."""

    config: PLPHPConfig
    score: Callable[[Tensor, Tensor], float | None] = vision_attention_score

    def cut(
        self, layer: int, attention: Tensor, vision: Tensor, spans: Sequence[Span] | None, kv_heads: int
    ) -> Cut:
        """See `Policy.cut`. Raises `UnsupportedError` for scope `image` when images cannot be told apart."""
        # Asked for before gamma, which the host waits for: a GPU has something to do meanwhile.
        order = ranking(self._rank(head_scores(attention, vision, kv_heads, self.config.head_reduce)))
        gamma = self.score(attention, vision)
        if gamma is None:
            return Cut(None, None, None, keep_all(vision, kv_heads))
        if layer in self.config.skip_layers:
            return Cut(gamma, "skipped", 1.0, keep_all(vision, kv_heads))
        group, rate, clamped = allocate(gamma, self.config)
        if self.config.scope == "prompt":
            spans = None
        elif spans is None:
            raise UnsupportedError(
                "scope = 'image', but it cannot be told which vision tokens belong to which image",
                hint="use scope = 'prompt'",
            )
        return Cut(gamma, group, rate, keep_top(order, vision, rate, spans), clamped)

    def _rank(self, scores: Tensor) -> Tensor:
        return scores


class LayerOnlyPolicy(PLPHPPolicy):
    """Ablation: level 1 alone. The layer's own rate, but one ranking shared by all its heads."""

    def _rank(self, scores: Tensor) -> Tensor:
        return _shared(scores)


@dataclass(frozen=True)
class FixedRates:
    """Given rates: layer -> rate in [0, 1], `default` for layers not named; each head ranks for itself.

    Raises:
        ConfigError: a rate is no number in [0, 1].
    """

    rates: Mapping[int, float]
    default: float = 1.0

    def __post_init__(self) -> None:
        fraction("default rate", self.default)
        for layer, rate in self.rates.items():
            fraction(f"rate of layer {layer}", rate)

    def cut(
        self, layer: int, attention: Tensor, vision: Tensor, spans: Sequence[Span] | None, kv_heads: int
    ) -> Cut:
        """See `Policy.cut`."""
        scores = head_scores(attention, vision, kv_heads)
        return _cut_at(self.rates.get(layer, self.default), attention, vision, scores)


@dataclass(frozen=True)
class HeadOnlyPolicy:
    """Ablation: level 2 alone. One rate for all layers, each head ranks for itself.

    Raises:
        ConfigError: the rate is no number in [0, 1].
    """

    rate: float
    head_reduce: str = "mean"

    def __post_init__(self) -> None:
        fraction("rate", self.rate)

    def cut(
        self, layer: int, attention: Tensor, vision: Tensor, spans: Sequence[Span] | None, kv_heads: int
    ) -> Cut:
        """See `Policy.cut`."""
        scores = head_scores(attention, vision, kv_heads, self.head_reduce)
        return _cut_at(self.rate, attention, vision, scores)


@dataclass(frozen=True)
class UniformPolicy:
    """Neither level: one rate for all layers, one ranking shared by the heads of a layer.

    Raises:
        ConfigError: the rate is no number in [0, 1].
    """

    rate: float
    head_reduce: str = "mean"

    def __post_init__(self) -> None:
        fraction("rate", self.rate)

    def cut(
        self, layer: int, attention: Tensor, vision: Tensor, spans: Sequence[Span] | None, kv_heads: int
    ) -> Cut:
        """See `Policy.cut`."""
        scores = _shared(head_scores(attention, vision, kv_heads, self.head_reduce))
        return _cut_at(self.rate, attention, vision, scores)


@dataclass(frozen=True)
class RandomPolicy:
    """Chance: one rate for all layers, each head keeps random tokens; equal seeds keep equal tokens.

    Raises:
        ConfigError: the rate is no number in [0, 1].
    """

    rate: float
    seed: int

    def __post_init__(self) -> None:
        fraction("rate", self.rate)

    def cut(
        self, layer: int, attention: Tensor, vision: Tensor, spans: Sequence[Span] | None, kv_heads: int
    ) -> Cut:
        """See `Policy.cut`."""
        # Drawn on the CPU, from the seed and the layer alone, so that neither device nor call order matters.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
        scores = torch.rand(kv_heads, vision.numel(), generator=generator).to(attention.device)
        return _cut_at(self.rate, attention, vision, scores)


def _cut_at(rate: float, attention: Tensor, vision: Tensor, scores: Tensor) -> Cut:
    """The cut that keeps `rate` of `vision` by `scores` [K, n_v]."""
    kept = keep_top(ranking(scores), vision, rate)
    gamma = vision_attention_score(attention, vision)
    return Cut(gamma, None, None if gamma is None else rate, kept)


def as_policy(policy: PLPHPConfig | Policy | None) -> Policy | None:
    """The policy that a config stands for; policies and None (the unpruned arm) are returned as they are.

    Raises:
        ConfigError: it is neither.
    """
    if not (policy is None or isinstance(policy, PLPHPConfig) or callable(getattr(policy, "cut", None))):
        raise ConfigError(
            f"{type(policy).__name__} is no setting; expected a PLPHPConfig or a policy",
            hint="PLPHPConfig.from_dict makes a config of a dict",
        )
    return PLPHPPolicy(policy) if isinstance(policy, PLPHPConfig) else policy
