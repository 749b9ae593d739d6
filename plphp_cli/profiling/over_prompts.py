"""Figures over several prompts: the layers' means, sums per arm, spread, the worst prompts. No torch here."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from statistics import fmean

from plphp_cli.profiling.records import (
    HeadProfile,
    LayerProfile,
    PromptProfile,
    SpreadRecord,
    ratio,
)
from plphp_cli.profiling.state import PromptState
from plphp_cli.profiling.statistics import median, spread

WORST = 3
TIMES = ("prefill_s", "ttft_s", "decode_s", "end_to_end_s")
# Ratios and quality whose spread is told.
_SPREAD_RATIOS = ("decode", "ttft", "end_to_end", "kv")
_SPREAD_QUALITY = ("kl_mean", "top1_agreement")
_MEANS = (
    "gamma",
    "rate",
    "vision_tokens_kept",
    "kv_bytes_held",
    "kv_bytes_held_per_head",
    "kv_bytes_full",
    "kv_bytes_allocated",
    "head_overlap",
)


def mean_layers(prompts: Sequence[tuple[LayerProfile, ...]]) -> tuple[LayerProfile, ...]:
    """One prompt's layers as they are; of several the means, each over the prompts that have the figure."""
    if len(prompts) < 2:
        return prompts[0] if prompts else ()
    return tuple(_mean_layer(same) for same in zip(*prompts, strict=True))


def totals(states: Sequence[PromptState], arm: str) -> dict[str, float | None]:
    """An arm's sums over the prompts that it answered, and their number."""
    answered = [state for state in states if state.prefills.get(arm)]
    found: dict[str, float | None] = {"prompts": len(answered)}
    for name in TIMES:
        found[name] = _sum(median(state.samples(arm, name)) for state in answered)
    found["kv_bytes_held"] = _sum(state.kv[arm].held for state in answered if arm in state.kv)
    found["kv_bytes_allocated"] = _sum(state.kv[arm].allocated for state in answered if arm in state.kv)
    return found


def spreads(prompts: Sequence[PromptProfile]) -> dict[str, SpreadRecord]:
    """Five numbers of each ratio and of the quality over the prompts; nothing of a single one."""
    if len(prompts) < 2:
        return {}
    values = {name: [ratio(prompt.ratios, name) for prompt in prompts] for name in _SPREAD_RATIOS}
    values |= {name: [getattr(prompt.quality, name) for prompt in prompts] for name in _SPREAD_QUALITY}
    found = {name: spread([v for v in column if v is not None]) for name, column in values.items()}
    return {name: five for name, five in found.items() if five is not None}


def worst(prompts: Sequence[PromptProfile]) -> dict[str, tuple[int, ...]]:
    """The indices of the prompts with the largest KL, and of those with the smallest decode ratio."""
    if len(prompts) < 2:
        return {}
    judged = [p for p in prompts if p.quality.kl_mean is not None]
    timed = [p for p in prompts if ratio(p.ratios, "decode") is not None]
    by_kl = sorted(judged, key=lambda p: -(p.quality.kl_mean or 0.0))
    by_speed = sorted(timed, key=lambda p: ratio(p.ratios, "decode") or 0.0)
    return {"kl": tuple(p.index for p in by_kl[:WORST]), "decode": tuple(p.index for p in by_speed[:WORST])}


def _mean_layer(layers: Sequence[LayerProfile]) -> LayerProfile:
    groups = Counter(layer.group for layer in layers if layer.group is not None)
    means = {name: _mean(getattr(layer, name) for layer in layers) for name in _MEANS}
    return LayerProfile(
        index=layers[0].index,
        group=next(iter(groups)) if len(groups) == 1 else None,
        groups=dict(groups.most_common()),
        kv_heads=layers[0].kv_heads,
        image_shares=_mean_shares([layer.image_shares for layer in layers]),
        heads=_mean_heads([layer.heads for layer in layers if layer.heads]),
        **means,
    )


def _mean_heads(prompts: Sequence[tuple[HeadProfile, ...]]) -> tuple[HeadProfile, ...]:
    """The same model has the same heads, so head h of one prompt stands beside head h of another."""
    return tuple(
        HeadProfile(
            gamma=_mean(head.gamma for head in same),
            attention_kept=_mean(head.attention_kept for head in same),
            image_shares=_mean_shares([head.image_shares for head in same]),
        )
        for same in zip(*prompts, strict=False)
    )


def _mean_shares(prompts: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """Of image i over the prompts that have an image i."""
    columns = zip_longest(*prompts)
    return tuple(fmean(share for share in column if share is not None) for column in columns)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
