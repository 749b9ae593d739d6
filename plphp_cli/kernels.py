"""Attention of one new token a sequence over caches of different lengths, in Triton. Imported on CUDA alone.

Split over the cache ("flash decoding"): with one query token a sequence there are too few rows to fill a GPU,
so every KV head's tokens are shared out to several programs, whose parts a second kernel puts together. Where
the caches lie and how long they are is read from tensors, so that one CUDA graph serves any prompts: torch's
own attention takes lengths as Python numbers, or as tensors but without the split (slower from 1.5 to 6 times
where it was tried).
"""

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

_BLOCK = 64
# Programs that keep every multiprocessor of a large GPU busy a few times over.
_PROGRAMS = 1024
_MOST_SPLITS = 64


def splits_for(tokens: int, rows: int) -> int:
    """Into how many parts, a power of two, caches of up to `tokens` tokens are split; `rows` is B K."""
    splits = 1
    while splits < _MOST_SPLITS and splits * rows < _PROGRAMS and splits * 2 * _BLOCK <= tokens:
        splits *= 2
    return splits


@triton.jit
def _attend_part(  # type: ignore[no-untyped-def]
    query, new_key, new_value, key_at, value_at, capacity, length, part, weight,
    query_stride, key_stride, value_stride, scaling,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS, tl.program_id(1)
    held = tl.load(length + row)
    room = tl.load(capacity + row).to(tl.int64)
    kind = new_key.dtype.element_ty
    keys = tl.load(key_at + row).to(tl.pointer_type(kind)) + head * room * WIDTH
    values = tl.load(value_at + row).to(tl.pointer_type(kind)) + head * room * WIDTH
    keys, values = tl.multiple_of(keys, 16), tl.multiple_of(values, 16)
    rows, columns, block = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    mine = rows[:, None] < GROUP
    at = row * query_stride + (head * GROUP + rows[:, None]) * WIDTH + columns[None, :]
    q = tl.load(query + at, mask=mine, other=0.0)

    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    if split == 0:
        # The new token: written into the cache here, and attended to from where it came.
        k = tl.load(new_key + row * key_stride + head * WIDTH + columns)
        v = tl.load(new_value + row * value_stride + head * WIDTH + columns)
        tl.store(keys + held.to(tl.int64) * WIDTH + columns, k)
        tl.store(values + held.to(tl.int64) * WIDTH + columns, v)
        most = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], axis=1) * scaling
        total += 1.0
        sums += v.to(tl.float32)[None, :]
    each = tl.cdiv(tl.cdiv(held, SPLITS), BLOCK) * BLOCK
    for start in range(split * each, tl.minimum(held, (split + 1) * each), BLOCK):
        token = start + block
        there = token < held
        place = token[:, None].to(tl.int64) * WIDTH + columns[None, :]
        k = tl.load(keys + place, mask=there[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        scores = tl.where(there[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        shrink = tl.exp(most - higher)
        share = tl.exp(scores - higher[:, None])
        v = tl.load(values + place, mask=there[:, None], other=0.0)
        sums = sums * shrink[:, None] + tl.dot(share.to(kind), v, input_precision="ieee")
        total = total * shrink + tl.sum(share, axis=1)
        most = higher
    out = ((row * KV_HEADS + head) * GROUP + rows) * SPLITS + split
    tl.store(part + out[:, None] * WIDTH + columns[None, :], sums, mask=mine)
    tl.store(weight + out * 2, most, mask=rows < GROUP)
    tl.store(weight + out * 2 + 1, total, mask=rows < GROUP)


@triton.jit
def _put_together(part, weight, output, WIDTH: tl.constexpr, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    split, columns = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    most = tl.load(weight + (row * SPLITS + split) * 2)
    total = tl.load(weight + (row * SPLITS + split) * 2 + 1)
    scale = tl.exp(most - tl.max(most, axis=0))
    parts = tl.load(part + (row * SPLITS + split)[:, None] * WIDTH + columns[None, :])
    value = tl.sum(parts * scale[:, None], axis=0) / tl.sum(total * scale, axis=0)
    tl.store(output + row * WIDTH + columns, value.to(output.dtype.element_ty))


def attend_and_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_at: Tensor,
    value_at: Tensor,
    capacity: Tensor,
    length: Tensor,
    scaling: float,
    splits: int,
) -> Tensor:
    """Write each sequence's new token into its cache and attend over all that the cache then holds.

    Args:
        query: [B, H, d], d a power of two.
        key: [B, K, d], the new token's; written at place `length` of each head.
        value: [B, K, d].
        key_at: int64 [B], addresses of buffers [K, capacity, d].
        value_at: int64 [B].
        capacity: int32 [B], tokens that one head of the buffer has room for.
        length: int32 [B], tokens held before the new one; below `capacity`.
        scaling: factor on query . key.
        splits: a power of two; see `splits_for`.

    Returns:
        [B, H, d], as `query` is.
    """
    rows, heads, width = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    query, key, value = (t if t.stride()[1:] == (width, 1) else t.contiguous() for t in (query, key, value))
    part = torch.empty(rows, heads, splits, width, dtype=torch.float32, device=query.device)
    weight = torch.empty(rows, heads, splits, 2, dtype=torch.float32, device=query.device)
    output = torch.empty(rows, heads, width, dtype=query.dtype, device=query.device)
    # Keys and values of a few blocks are in flight at a time, and must fit in shared memory.
    wide = width * query.element_size() > 256
    with torch.cuda.device(query.device):
        _attend_part[(rows * kv_heads, splits)](
            query, key, value, key_at, value_at, capacity, length, part, weight,
            query.stride(0), key.stride(0), value.stride(0), scaling,
            KV_HEADS=kv_heads, GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), WIDTH=width,
            SPLITS=splits, BLOCK=32 if wide else _BLOCK, num_warps=4, num_stages=2 if wide else 3,
        )  # fmt: skip
        _put_together[(rows * heads,)](part, weight, output, WIDTH=width, SPLITS=splits, num_warps=2)
    return output
