"""Loading onto a GPU, in few bits, and over several devices. Skipped where there is no CUDA."""

import gc
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from toy_model import save_toy_llava

from plphp_cli import models, prune
from plphp_cli.config import PLPHPConfig
from plphp_cli.decoding import Done
from plphp_cli.errors import DeviceMemoryError
from plphp_cli.generate import stream
from plphp_cli.models.loaded import decoder_weight_bytes, model_bytes
from plphp_cli.sampling import Settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
needs_accelerate = pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate")
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
CONFIG = PLPHPConfig(r=0.4)


@pytest.fixture
def text_weights(toy: str) -> int:
    """Bytes in float32 of the linear layers of the toy's decoder, which are those that are quantised."""
    decoder = models.load(toy, device="cpu").model.get_decoder()
    return sum(m.weight.nbytes for m in decoder.modules() if isinstance(m, torch.nn.Linear))


def answer(loaded: models.LoadedModel, images) -> tuple[list[int], list[list[int]], torch.Tensor]:
    """Greedy tokens of the pruned model, what each head of each layer kept, the logits after the prompt."""
    prompt = models.prepare(loaded, images, "what?")
    with prune(loaded.model, CONFIG) as pruner:
        tokens = loaded.model.generate(**prompt.inputs, max_new_tokens=8, do_sample=False)
        kept = [layer.kept.tolist() for layer in pruner.layers]
        logits = loaded.model(**prompt.inputs).logits[0, -1]
    return tokens[0].tolist(), kept, logits.float().cpu()


def ids(loaded: models.LoadedModel, prompt) -> tuple[int, ...]:
    """Greedy tokens of the tool's own loop."""
    done = [event for event in stream(loaded, prompt, CONFIG, Settings(8)) if isinstance(event, Done)]
    return done[0].token_ids


def test_a_gpu_gives_the_answer_of_a_cpu(toy: str, images) -> None:
    here, there = (answer(models.load(toy, device=d, dtype="float32"), images) for d in ("cpu", "cuda"))
    assert here[:2] == there[:2]
    torch.testing.assert_close(here[2], there[2], atol=1e-3, rtol=1e-3)


@needs_accelerate
@needs_bitsandbytes
@pytest.mark.parametrize(("bits", "share"), [("4bit", 1 / 8), ("8bit", 1 / 4)])
def test_quantised_weights_run_and_count_as_packed(
    toy: str, images, text_weights: int, tmp_path: Path, bits: str, share: float
) -> None:
    plain = models.load(toy, device="cuda", dtype="float32")
    loaded = models.load(toy, device="cuda", dtype="float32", quantize=bits)
    assert loaded.device == torch.device("cuda", 0)
    whole, packed = decoder_weight_bytes(plain), decoder_weight_bytes(loaded)
    # The scales come on top, one float a row, or a block of 64 weights and a table a layer.
    least = whole - text_weights * (1 - share)
    assert least < packed < least + text_weights * 0.25
    assert model_bytes(loaded) < model_bytes(plain)
    tokens, kept, logits = answer(loaded, images)
    assert torch.nn.functional.cosine_similarity(logits, answer(plain, images)[2], dim=0) > 0.9
    # What it wrote is an already quantised checkpoint, and loads as one.
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    again = models.load(str(tmp_path), device="cuda")
    assert decoder_weight_bytes(again) == packed
    assert answer(again, images)[:2] == (tokens, kept)


@needs_accelerate
def test_layers_kept_in_the_machine_s_memory_give_the_same_answer(toy: str, images) -> None:
    from accelerate import dispatch_model

    loaded = models.load(toy, device="cuda", dtype="float32")
    expected = answer(loaded, images), decoder_weight_bytes(loaded)
    places = {"": 0, "model.language_model.layers.1": "cpu", "model.language_model.layers.2": "cpu"}
    names = [name for name, _ in loaded.model.model.language_model.named_children() if name != "layers"]
    places |= {f"model.language_model.{name}": 0 for name in names}
    places |= {"model.language_model.layers.0": 0, "model.vision_tower": 0, "lm_head": 0}
    places |= {"model.multi_modal_projector": 0}
    del places[""]
    dispatch_model(loaded.model, places, force_hooks=True)
    found = answer(loaded, images), decoder_weight_bytes(loaded)
    assert found[0][:2] == expected[0][:2]
    assert torch.equal(found[0][2], expected[0][2])
    assert found[1] == expected[1]


@needs_accelerate
def test_layers_on_two_devices_give_the_same_answer(toy: str, images) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    loaded = models.load(toy, device="cuda", dtype="float32")
    expected, prompt = answer(loaded, images), models.prepare(loaded, images, "what?")
    streamed = ids(loaded, prompt)
    # One layer on the CPU stands for one on another GPU: its cache stays where it is.
    layer = loaded.model.get_decoder().layers[1].to("cpu")
    back = AlignDevicesHook(
        execution_device="cpu", io_same_device=True, skip_keys=["past_key_values", "cache"]
    )
    add_hook_to_module(layer, back)
    found = answer(loaded, images)
    assert found[:2] == expected[:2]
    torch.testing.assert_close(found[2], expected[2], atol=1e-3, rtol=1e-3)
    assert ids(loaded, prompt) == streamed


def test_out_of_memory_on_a_gpu_names_the_sizes(tmp_path: Path) -> None:
    folder, filler = str(save_toy_llava(tmp_path / "toy")), []
    free, _ = torch.cuda.mem_get_info()
    size = free
    try:
        # Everything, down to what is left in the allocator's own pools.
        while size >= 512:
            try:
                filler.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                size //= 2
        with pytest.raises(DeviceMemoryError, match=r"out of memory on cuda:0 .* of weights; .* are free"):
            models.load(folder, device="cuda", dtype="float32")
    finally:
        filler.clear()
        gc.collect()
        torch.cuda.empty_cache()
