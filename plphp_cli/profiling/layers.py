"""Where the attention goes, and what each layer holds: from a prefilled prompt to its layer table."""

from collections.abc import Sequence
from itertools import combinations
from statistics import fmean

import torch
from torch import Tensor

from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import PLPHPError
from plphp_cli.profiling.records import HeadProfile, LayerProfile
from plphp_cli.pruning import Span, retained
from plphp_cli.sequence import LayerState, SequenceState
from plphp_cli.units import finite


def layer_profiles(state: SequenceState) -> tuple[LayerProfile, ...]:
    """The layer table of a prompt that was prefilled under `prune(model, config, keep_attention=True)`."""
    return tuple(_layer(layer, state) for layer in state.layers)


def head_overlap(kept: Tensor) -> float | None:
    """Mean Jaccard overlap of what two heads keep, `kept` [K, n]; None of one head, or of nothing kept."""
    heads = [set(row) for row in kept.tolist()]
    if len(heads) < 2 or not heads[0]:
        return None
    return fmean(len(one & two) / len(one | two) for one, two in combinations(heads, 2))


def image_shares(kept: Tensor, vision: Tensor, spans: Sequence[Span] | None) -> list[list[float]]:
    """Per head of `kept` [K, n] and image, the share of the image's vision tokens that is kept."""
    shares = []
    for row in kept.tolist():
        held = set(row)
        images = [vision[start:stop].tolist() for start, stop in spans or ()]
        shares.append([sum(p in held for p in image) / len(image) for image in images if image])
    return shares


def check_bytes(
    state: SequenceState, room: int, config: PLPHPConfig | None, arm: str
) -> tuple[int, int, int, int]:
    """Bytes (held, allocated, held by arithmetic, allocated by arithmetic) of a prompt's cache.

    Raises:
        PLPHPError: they differ in a layer: a fault of the tool.
    """
    totals = [0, 0, 0, 0]
    for layer in state.layers:
        held, allocated = layer.held_bytes, layer.allocated_bytes
        expected = (held, allocated)
        if layer.prunable:
            tokens = state.prompt_tokens - _dropped(layer, state, config)
            each = layer.full_bytes // state.prompt_tokens
            expected = (tokens * each, (tokens + room) * each)
        if (held, allocated) != expected:
            raise PLPHPError(
                f"layer {layer.index} of the {arm} arm holds {held} and allocates {allocated} bytes, "
                f"but arithmetic says {expected[0]} and {expected[1]}",
                hint="this is a fault of the tool: please report it",
            )
        for position, value in enumerate((held, allocated, *expected)):
            totals[position] += value
    return totals[0], totals[1], totals[2], totals[3]


def _dropped(layer: LayerState, state: SequenceState, config: PLPHPConfig | None) -> int:
    """Vision tokens that each head of the layer drops, by its rate."""
    count = state.vision.positions.numel()
    if config is None or layer.rate is None:
        return 0
    spans = state.vision.spans if config.scope == "image" and state.vision.spans else ((0, count),)
    return count - sum(retained(layer.rate, stop - start) for start, stop in spans)


def _layer(layer: LayerState, state: SequenceState) -> LayerProfile:
    shares: list[list[float]] = []
    if layer.kept is not None:
        shares = image_shares(layer.kept, state.vision.positions.cpu(), state.vision.spans)
    heads = _heads(layer, state, shares)
    return LayerProfile(
        index=layer.index,
        gamma=finite(layer.gamma),
        group=layer.group,
        rate=finite(layer.rate),
        vision_tokens_kept=layer.vision_tokens,
        kv_bytes_held=layer.held_bytes,
        kv_bytes_held_per_head=layer.held_bytes // layer.kv_heads if layer.kv_heads else None,
        kv_bytes_full=layer.full_bytes,
        kv_bytes_allocated=layer.allocated_bytes,
        kv_heads=layer.kv_heads,
        head_overlap=None if layer.kept is None else head_overlap(layer.kept),
        image_shares=tuple(fmean(column) for column in zip(*shares, strict=True)),
        heads=heads,
    )


def _heads(layer: LayerState, state: SequenceState, shares: list[list[float]]) -> tuple[HeadProfile, ...]:
    rows = state.attention.get(layer.index)
    vision = state.vision.positions
    if rows is None or layer.kept is None or not layer.kv_heads or not vision.numel():
        return ()
    grouped = rows.float().cpu().unflatten(0, (layer.kv_heads, -1)).mean(dim=1)
    whole = grouped[:, vision.cpu()].sum(dim=-1)
    kept = torch.gather(grouped, 1, layer.kept).sum(dim=-1)
    return tuple(
        HeadProfile(
            gamma=finite(mass),
            attention_kept=finite(share / mass) if mass > 0 else None,
            image_shares=tuple(images),
        )
        for mass, share, images in zip(whole.tolist(), kept.tolist(), shares, strict=True)
    )
