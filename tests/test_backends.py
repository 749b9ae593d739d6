"""The laws on each attention back-end that prefill can run on; sdpa has them in `test_attention.py`."""

import shutil
from dataclasses import replace

import laws
import pytest
import torch
import transformers
from fake_flash import flash  # noqa: F401
from families import as_prompt, load
from laws import CUT, answer
from packaging.version import Version

from plphp_cli import backends, models
from plphp_cli.attention import prune
from plphp_cli.errors import UnsupportedError, UsageError
from plphp_cli.models.choices import ATTENTION, check_attention
from plphp_cli.prefilling import advance, prefill

FLEX, FLASH = "flex_attention", "flash_attention_2"
LAWS = [
    laws.rate_one_equals_stock,
    laws.physical_cut_equals_masked_reference,
    laws.first_token_is_unpruned,
    laws.bytes_are_as_predicted,
    laws.the_model_is_restored,
    laws.no_state_is_left_behind,
    laws.one_prefill_serves_many,
]


@pytest.fixture
def uncompiled():
    """Flex attention without its compiler, which takes a minute; our code is the same either way."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def on(name, backend):
    family = load(name).fresh()
    family.model.get_decoder().set_attn_implementation(backend)
    return family


def test_the_command_line_names_every_back_end():
    assert set(ATTENTION) == set(backends.REGISTERED)


@pytest.mark.parametrize("name", ["llava", "paligemma"])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law_with_flex_attention(law, name, uncompiled):
    law(on(name, FLEX))


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="flex attention needs a compiler")
@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.12") and Version(transformers.__version__) < Version("5.15"),
    reason="torch 2.11 makes faulty C++ of this transformers' own call, pruned or not, and keeps its tensors",
)
def test_rate_one_equals_stock_with_compiled_flex_attention():
    family = on("llava", FLEX)
    laws.rate_one_equals_stock(replace(family, prompts=family.prompts[:1]))


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("law", [LAWS[0], *LAWS[2:]], ids=lambda law: law.__name__)
def test_law_with_flash_attention(law, name):
    law(on(name, FLASH))


@pytest.mark.usefixtures("flash", "uncompiled")
@pytest.mark.parametrize(("name", "backend"), [("llava", FLEX), ("llava", FLASH), ("qwen2_vl", FLASH)])
def test_a_back_end_keeps_and_answers_what_sdpa_does(name, backend):
    family = load(name)
    other = on(name, backend)
    for inputs in family.prompts:
        with prune(family.model, CUT) as expected:
            tokens, logits = answer(family.model, inputs)
        with prune(other.model, CUT) as pruner:
            other_tokens, other_logits = answer(other.model, inputs)
        assert torch.equal(other_tokens, tokens)
        assert (other_logits - logits).abs().max() <= 1e-4 * logits.abs().max()
        for state, reference in zip(pruner.layers, expected.layers, strict=True):
            assert torch.equal(state.kept, reference.kept)


@pytest.mark.usefixtures("flash", "uncompiled")
@pytest.mark.parametrize(("name", "backend"), [("llava", FLEX), ("llava", FLASH), ("qwen2_vl", FLASH)])
def test_a_chunk_over_a_cut_cache_equals_its_tokens_one_by_one(name, backend):
    family = on(name, backend)
    tokens = torch.tensor([[5, 17, 250, 8]])
    with prune(family.model, CUT) as pruner:
        runs = [prefill(family.loaded, as_prompt(family.prompts[0]), pruner, 8) for _ in range(2)]
        assert any(state.held_bytes < state.full_bytes for state in pruner.layers)
        chunk = advance(family.loaded, runs[0], tokens)
        single = torch.cat([advance(family.loaded, runs[1], token[None]) for token in tokens.T])
    assert (chunk - single).abs().max() <= 1e-4 * single.abs().max()


def test_flex_attention_takes_a_mask_of_ones_and_zeros_as_eager_takes_its_own():
    module = load("llava").model.get_decoder().layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, n, 16, generator=generator) for heads, n in [(4, 3), (2, 9), (2, 9)]
    )
    visible = torch.ones(3, 9, dtype=torch.bool).tril(6)[None, None]
    expected = backends.stock("sdpa", module)(module, query, key, value, visible, scaling=0.25)[0]
    found = backends.stock(FLEX, module)(module, query, key, value, visible, scaling=0.25)[0]
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_batch_on_flash_attention_is_refused():
    module = load("llava").model.get_decoder().layers[0].self_attn
    with pytest.raises(UnsupportedError, match="a batch on flash_attention_2"):
        backends.stock(FLASH, module)(module, *[torch.zeros(2, 2, 1, 16)] * 3, torch.zeros(2, 1, 1, 1))


def test_what_torch_cannot_compile_is_told_in_a_line():
    class Broken(Exception):
        __module__ = "torch._inductor.exc"

    def fails():
        raise Broken("CppCompileError: C++ compile error\n\nCommand: g++")

    with pytest.raises(UnsupportedError, match="torch cannot compile flex_attention") as error:
        backends._compiled(fails)
    assert "\n" not in error.value.message
    with pytest.raises(ZeroDivisionError):
        backends._compiled(lambda: 1 / 0)


def test_a_back_end_that_cannot_run_here_is_refused(monkeypatch):
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    with pytest.raises(UsageError, match="runs on CUDA devices, not on cpu"):
        check_attention(FLASH, cpu, "auto")
    with pytest.raises(UsageError, match="needs the package flash-attn"):
        check_attention(FLASH, cuda, "auto")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(UsageError, match="not in float32"):
        check_attention(FLASH, cuda, torch.float32)
    check_attention(FLASH, cuda, torch.bfloat16)


def test_the_decoder_is_loaded_on_flex_attention_and_the_vision_encoder_on_sdpa(toy):
    loaded = models.load(toy, device="cpu", attn=FLEX)
    config = loaded.model.config
    assert (loaded.attn, config.text_config._attn_implementation) == (FLEX, FLEX)
    assert config.vision_config._attn_implementation == "sdpa"


def test_a_decoder_that_has_no_flex_attention_is_refused(tmp_path):
    model = load("qwen2_vl").fresh().model
    with pytest.raises(UnsupportedError, match="does not run qwen on flex_attention"):
        models.choices.set_attention(model, FLEX, "qwen")
