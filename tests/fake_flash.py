"""What the package flash_attn offers, in torch alone, so that transformers' own flash path runs on a CPU.

The contract: [B, q, H, d] in and out, grouped heads as they are, no mask but the causal one, which is aligned
with the last key (bottom right), as flash attention has it since 2.1.
"""

import importlib.machinery
import sys
from types import ModuleType

import pytest
import torch
from transformers import modeling_flash_attention_utils as utils
from transformers.modeling_utils import PreTrainedModel


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    assert q.dim() == k.dim() == v.dim() == 4
    assert q.shape[0] == k.shape[0] == 1
    assert q.shape[2] % k.shape[2] == 0
    assert dropout_p == 0
    queries, keys = q.shape[1], k.shape[1]
    if q.is_cuda:  # flash attention itself, as torch carries it
        return torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, queries, keys, 0.0, causal, False, scale=softmax_scale
        )[0]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.mT * softmax_scale
    if causal:
        visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        scores = scores.masked_fill(~visible, float("-inf"))
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
    raise AssertionError("a prompt was taken for several packed ones")


def _unused(*args, **kwargs):
    raise AssertionError("not part of what decoding one prompt needs")


@pytest.fixture
def flash(monkeypatch):
    """The package, as far as transformers looks for it, and none of its checks for a GPU."""
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    package.flash_attn_with_kvcache = padding.pad_input = padding.unpad_input = _unused
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda: True)
    check = utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    monkeypatch.setitem(check, "general_availability_check", lambda: True)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *args, **kwargs: True)
