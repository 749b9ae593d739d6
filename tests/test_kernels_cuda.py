"""The CUDA kernel against attention in double precision, and batches and captured graphs on a GPU."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton")

from torch.nn.functional import scaled_dot_product_attention

from plphp_cli.attention import prune
from plphp_cli.decoding import DecodeBatch, step_compiler
from plphp_cli.kernels import attend_and_write, splits_for
from plphp_cli.models.dummy import dummy_prompt, load_dummy
from plphp_cli.synthetic import synthetic_prefilled


@pytest.mark.parametrize(("dtype", "worst"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "lengths"),
    [(28, 4, 128, [2920]), (8, 8, 64, [1, 70, 1000]), (14, 2, 64, [129, 5000]), (16, 2, 256, [63])],
)
def test_one_token_over_caches_of_different_lengths(dtype, worst, heads, kv_heads, width, lengths):
    rows, spare = len(lengths), 5
    make = lambda *shape: torch.randn(*shape, device="cuda").to(dtype)  # noqa: E731
    buffers = [[make(1, kv_heads, n + spare, width) for _ in "kv"] for n in lengths]
    before = [[buffer.clone() for buffer in pair] for pair in buffers]
    query, key, value = make(rows, heads, width), make(rows, kv_heads, width), make(rows, kv_heads, width)
    numbers = lambda values, kind: torch.tensor(values, device="cuda", dtype=kind)  # noqa: E731
    output = attend_and_write(
        query,
        key,
        value,
        numbers([keys.data_ptr() for keys, _ in buffers], torch.int64),
        numbers([values.data_ptr() for _, values in buffers], torch.int64),
        numbers([n + spare for n in lengths], torch.int32),
        numbers(lengths, torch.int32),
        width**-0.5,
        splits_for(max(lengths), rows * kv_heads),
    )
    for row, held in enumerate(lengths):
        for buffer, old, new in zip(buffers[row], before[row], (key, value), strict=True):
            assert torch.equal(buffer[0, :, held], new[row])
            assert torch.equal(buffer[:, :, :held], old[:, :, :held])
            assert torch.equal(buffer[:, :, held + 1 :], old[:, :, held + 1 :])
        keys, values = (buffer[:, :, : held + 1].double() for buffer in buffers[row])
        expected = scaled_dot_product_attention(
            query[row, :, None][None].double(), keys, values, enable_gqa=True
        )
        assert (output[row] - expected[0, :, 0]).norm() <= worst * expected.norm()


def test_captured_steps_give_what_uncompiled_ones_give_and_serve_other_prompts():
    loaded = load_dummy("llava-onevision-0.5b", dtype="float32", device="cuda")
    prompt = dummy_prompt(loaded, 500, 2)
    compiler = step_compiler(loaded)
    for seed in (0, 10):
        found = []
        for chosen in (None, compiler):
            rows = [
                synthetic_prefilled(loaded, prompt, rates, 12, seed + number)
                for number, rates in enumerate([(0.7, 0.1), (0.4,), (0.2, 0.9, 0.5)])
            ]
            with torch.no_grad(), prune(loaded.model, None):
                batch = DecodeBatch(loaded, rows, 12, chosen)
                ids = torch.tensor([[5], [6], [7]], device="cuda")
                logits = torch.stack([batch.step(ids + step).clone() for step in range(12)])
                batch.settle()
            found.append(logits)
            assert [row.cache.layers[0].seen for row in rows] == [prompt.prompt_tokens + 12] * 3
        assert (found[0] - found[1]).abs().max() <= 1e-4 * found[0].abs().max()
    assert compiler.stats.refused is None
    assert (compiler.stats.captures, compiler.stats.hits) == (1, 1)
