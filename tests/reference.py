"""The masked reference: the whole cache, of which each KV head is shown only what a cut left it."""

import contextlib
import math
import sys
from functools import partial

import torch
from transformers import AttentionInterface, AttentionMaskInterface, LogitsProcessor
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, flex_attention_mask, sdpa_mask


class Forced(LogitsProcessor):
    """Lets `generate` take given tokens."""

    def __init__(self, tokens, start):
        self.tokens, self.start = tokens, start

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -math.inf)
        forced[:, self.tokens[input_ids.shape[1] - self.start]] = 0
        return forced


_HIDDEN = {}
_ORIGIN = []


def _from_origin_on(kept, query, mask, origin):
    """The model's mask of one forward over a conversation; from `origin` on without what was dropped."""
    heads, count = query.shape[1], query.shape[2]
    visible = torch.ones(kept.shape[0], count, count, dtype=torch.bool)
    visible[:, origin:, : kept.shape[1]] = kept[:, None]
    visible = visible.repeat_interleave(heads // kept.shape[0], dim=0)[None]
    if mask is None:
        return visible.tril()
    return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, -math.inf)


def _masked_attention(stock, module, query, key, value, attention_mask, **options):
    kept = _HIDDEN.get(module)
    if kept is not None and _ORIGIN:
        attention_mask = _from_origin_on(kept, query, attention_mask, _ORIGIN[0])
    elif kept is not None and key.shape[2] > query.shape[2]:
        heads, count = query.shape[1], query.shape[2]
        new = torch.ones(kept.shape[0], key.shape[2] - kept.shape[1], dtype=torch.bool)
        visible = torch.cat([kept, new], dim=1).repeat_interleave(heads // kept.shape[0], dim=0)
        attention_mask = visible[None, :, None].expand(1, heads, count, -1)
        if stock != "sdpa":
            attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(
                ~attention_mask, -math.inf
            )
    attend = sys.modules[type(module).__module__].eager_attention_forward
    if stock == "sdpa":
        attend = sdpa_attention_forward
    elif stock == "flex_attention" and not isinstance(attention_mask, torch.Tensor):
        attend = flex_attention_forward
    return attend(module, query, key, value, attention_mask, **options)


for _name, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask), ("flex_attention", flex_attention_mask)):
    AttentionInterface.register(f"masked_reference_{_name}", partial(_masked_attention, _name))
    AttentionMaskInterface.register(f"masked_reference_{_name}", _mask)


@contextlib.contextmanager
def masked_reference(model, states, inputs, origin=None):
    """The model with its full cache; while decoding, each KV head is shown only what `states` say it kept.

    With `origin`, one forward over a whole conversation, whose tokens from there on are shown only that.
    """
    decoder = model.get_decoder()
    before = decoder.config._attn_implementation
    ids = inputs["input_ids"][0]
    text = ids != model.config.image_token_id
    named = {"layer_idx", "head_dim"}
    modules = {module.layer_idx: module for module in decoder.modules() if named <= vars(module).keys()}
    for state in (state for state in states if state.prunable):
        _HIDDEN[modules[state.index]] = text.repeat(state.kv_heads, 1).scatter(1, state.kept, True)
    _ORIGIN[:] = [] if origin is None else [origin]
    decoder.set_attn_implementation(f"masked_reference_{before}")
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)
        _HIDDEN.clear()
        _ORIGIN.clear()
