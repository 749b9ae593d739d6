"""What makes training quicker on a CPU; used by the training script alone.

Attention by matrix products back-propagates faster than SDPA at small head sizes, and compiling the
elementwise parts of the decoder saves memory traffic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AttentionInterface
from transformers.models.qwen2 import modeling_qwen2

NAME = "plphp_builtin_training"


@dataclass(frozen=True, eq=False)
class VisionDropout:
    """Part of the vision tokens hidden by chance from generated tokens, anew in every layer and KV head.

    No score decides what is hidden: the model learns to answer from what is left, whatever that is. What is
    left is scattered in half of the draws; in the others a run of neighbours, like an object's patches.

    Attributes:
        kept_share: [B], the share of vision tokens that stays visible in a row.
        whole_share: [B], the probability that a layer of this row hides nothing.
        vision: bool [prefix], where the vision tokens are.
        generated: per group of blocks bool [B, blocks, tokens]; prompt tokens see everything, as in prefill.
    """

    kept_share: torch.Tensor
    whole_share: torch.Tensor
    vision: torch.Tensor
    generated: tuple[torch.Tensor, ...]

    def hidden(self, kv_heads: int) -> torch.Tensor:
        """A draw for one layer: bool [B, K, 1, 1, 1, prefix]."""
        batch, prefix = len(self.kept_share), len(self.vision)
        scattered = torch.rand(batch, kv_heads, prefix)
        order = self.vision.cumsum(0) / self.vision.sum()
        run = (order + torch.rand(batch, kv_heads, 1)) % 1.0
        rank = torch.where(torch.rand(batch, 1, 1) < 0.5, scattered, run)
        whole = torch.rand(batch) < self.whole_share
        kept = torch.where(whole, 1.0, self.kept_share)[:, None, None]
        return ((rank >= kept) & self.vision)[:, :, None, None, None, :]


@dataclass(frozen=True)
class Packing:
    """How one row of tokens is laid out: a causal prefix, then blocks that see the prefix and themselves.

    ``groups`` lists (number of blocks, tokens per block); the row is prefix + sum(number * tokens) long.
    """

    prefix: int
    groups: tuple[tuple[int, int], ...]
    dropout: VisionDropout | None = None


def _softmax_mix(scores: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.softmax(scores, dim=-1) @ value


def _causal(scores: torch.Tensor) -> torch.Tensor:
    size = scores.shape[-1]
    mask = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(mask, float("-inf"))


def training_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    packing: Packing | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Full attention without ``packing`` (the tower), packed attention with it (the decoder).

    Shapes: query [B, H, S, d], key and value [B, K, S, d]; result [B, S, H, d].
    """
    query = query * scaling
    if packing is None:
        mixed = _softmax_mix(query @ key.transpose(-1, -2), value)
        return mixed.transpose(1, 2), None
    batch, heads, length, size = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    # Queries of one group stand side by side, so that keys need no repetition: [B, K, G, S, d].
    query = query.view(batch, kv_heads, group, length, size)
    sections = [packing.prefix, *(count * tokens for count, tokens in packing.groups)]
    # One split, not many slices: the gradient of every slice would be a zero-filled tensor of full length.
    prefix_query, *queries = query.split(sections, dim=3)
    prefix_key, *keys = key.split(sections, dim=2)
    prefix_value, *values = value.split(sections, dim=2)
    p = packing.prefix
    prefix_keys = prefix_key.transpose(-1, -2)
    scores = prefix_query.reshape(batch, kv_heads, group * p, size) @ prefix_keys
    weights = torch.softmax(_causal(scores.view(batch, kv_heads, group, p, p)), dim=-1)
    parts = [
        (weights.view(batch, kv_heads, group * p, p) @ prefix_value).view(batch, kv_heads, group, p, size)
    ]
    hidden = packing.dropout.hidden(kv_heads) if packing.dropout else None
    for number, (count, tokens) in enumerate(packing.groups):
        q, own_key, own_value = queries[number], keys[number], values[number]
        own_shape = (batch, kv_heads, 1, count, tokens, size)
        far = q.reshape(batch, kv_heads, group * count * tokens, size) @ prefix_keys
        near = q.reshape(batch, kv_heads, group, count, tokens, size) @ own_key.reshape(own_shape).transpose(
            -1, -2
        )
        far = far.view(batch, kv_heads, group, count, tokens, p)
        if packing.dropout is not None and hidden is not None:
            generated = packing.dropout.generated[number][:, None, None, :, :, None]
            far = far.masked_fill(hidden & generated, float("-inf"))
        far_weights, near_weights = torch.softmax(torch.cat([far, _causal(near)], dim=-1), dim=-1).split(
            [p, tokens], dim=-1
        )
        seen = far_weights.reshape(batch, kv_heads, group * count * tokens, p) @ prefix_value
        own = near_weights @ own_value.reshape(own_shape)
        whole = (batch, kv_heads, group, count * tokens, size)
        parts.append(seen.view(whole) + own.view(whole))
    mixed = torch.cat(parts, dim=3).view(batch, heads, length, size)
    return mixed.transpose(1, 2), None


AttentionInterface.register(NAME, training_attention)


def compile_elementwise() -> None:
    """Compile the decoder's norm, MLP and rotary embedding for this process (needs a C++ compiler)."""
    for owner, name in (
        (modeling_qwen2.Qwen2RMSNorm, "forward"),
        (modeling_qwen2.Qwen2MLP, "forward"),
        (modeling_qwen2, "apply_rotary_pos_emb"),
    ):
        setattr(owner, name, torch.compile(getattr(owner, name), dynamic=True))
