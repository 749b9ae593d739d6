"""The back-ends on a CUDA device, flash attention by the kernels that torch carries; skipped without one."""

from dataclasses import replace

import laws
import pytest
import torch
from fake_flash import flash  # noqa: F401
from families import as_prompt, load
from laws import CUT

from plphp_cli.attention import prune
from plphp_cli.prefilling import advance, prefill

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LAWS = [
    laws.rate_one_equals_stock,
    laws.first_token_is_unpruned,
    laws.bytes_are_as_predicted,
    laws.the_model_is_restored,
    laws.one_prefill_serves_many,
]


def on_device(name, backend):
    """A family in bfloat16 on the device, its decoder on a back-end."""
    family = load(name).fresh()
    family.model.to("cuda", torch.bfloat16)
    family.model.get_decoder().set_attn_implementation(backend)
    prompts = [
        {
            key: value.to("cuda", torch.bfloat16 if value.is_floating_point() else None)
            for key, value in inputs.items()
        }
        for inputs in family.prompts
    ]
    return replace(family, prompts=tuple(prompts))


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("backend", ["sdpa", "flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law_on_a_device(law, backend):
    law(on_device("llava", backend))


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("backend", ["flash_attention_2", "flex_attention"])
def test_a_chunk_over_a_cut_cache_equals_its_tokens_one_by_one(backend):
    family = on_device("llava", backend)
    tokens = torch.tensor([[5, 17, 250, 8]], device="cuda")
    with prune(family.model, CUT) as pruner:
        runs = [prefill(family.loaded, as_prompt(family.prompts[0]), pruner, 8) for _ in range(2)]
        chunk = advance(family.loaded, runs[0], tokens)
        single = torch.cat([advance(family.loaded, runs[1], token[None]) for token in tokens.T])
    assert (chunk - single).abs().max() <= 0.05 * single.abs().max()  # bfloat16 has 8 bits
