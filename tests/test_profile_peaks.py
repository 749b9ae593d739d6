"""What the profile's readings are worth by themselves: peaks, fresh processes, stock's tokens, overlaps."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from families import as_prompt, load
from profiles import CPU, TOKENS
from transformers import GenerationConfig

from plphp_cli import models
from plphp_cli.config import PLPHPConfig
from plphp_cli.models.options import LoadOptions
from plphp_cli.profiling import peaks as peaks_module
from plphp_cli.profiling.answers import stock_answer
from plphp_cli.profiling.fresh import FreshJob, FreshPeaks, FreshPrompt, measure_fresh
from plphp_cli.profiling.layers import head_overlap, image_shares
from plphp_cli.profiling.machine import buffer_bytes, read_bandwidth
from plphp_cli.profiling.peaks import LiveBytes, measure_peaks
from plphp_cli.profiling.records import PRUNED, STOCK, UNPRUNED
from plphp_cli.profiling.timing import PathArm, StockArm, Timer
from plphp_cli.support import left_out


def test_an_allocation_of_known_size_is_seen():
    with LiveBytes(CPU) as live:
        one = torch.empty(1 << 20, dtype=torch.uint8)
        assert live.live == 1 << 20
        view = one.view(2, -1)[0]
        two = one + 1
        assert live.live == 2 << 20
        del one, two
        assert live.live == 1 << 20  # the view holds its storage
        del view
        assert (live.live, live.peak) == (0, 2 << 20)


def test_peaks_hold_the_weights_and_the_cache():
    family = load("llava")
    loaded = SimpleNamespace(model=family.model, processor=None, device=CPU)
    prompt = as_prompt(family.prompts[0])
    weights = sum({t.data_ptr(): t.nbytes for t in family.model.parameters()}.values())
    peaks = {arm: measure_peaks(loaded, prompt, arm, config, TOKENS) for arm, config in
             ((PRUNED, PLPHPConfig(r=0.3)), (UNPRUNED, None), (STOCK, None))}  # fmt: skip
    for found in peaks.values():
        assert weights < found.decode_bytes < found.prefill_decoder_bytes <= found.prefill_bytes < 2 * weights
    assert peaks[PRUNED].decode_bytes < peaks[UNPRUNED].decode_bytes
    # Stock holds one cache, too: what it concatenates anew is a part of one layer at a time.
    text = family.model.config.get_text_config()
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    cache = token * (prompt.prompt_tokens + TOKENS)
    assert abs(peaks[STOCK].decode_bytes - peaks[UNPRUNED].decode_bytes) < cache / 2


def test_a_batch_peaks_by_as_many_caches_in_every_arm():
    family = load("llava")
    loaded = SimpleNamespace(model=family.model, processor=None, device=CPU)
    prompt = as_prompt(family.prompts[0])
    text = family.model.config.get_text_config()
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    cache = token * (prompt.prompt_tokens + TOKENS)
    for arm in (UNPRUNED, STOCK):
        one, three = (measure_peaks(loaded, prompt, arm, None, TOKENS, count) for count in (1, 3))
        assert three.prefill_bytes == pytest.approx(one.prefill_bytes, rel=0.02)
        # Beyond the caches a step has a little of its own, which grows with the batch as well.
        assert 2 * cache * 0.95 < three.decode_bytes - one.decode_bytes < 2 * cache * 1.4
        assert three.decode_unknown is None


def test_a_peak_that_is_prefill_s_alone_passes_for_nothing(monkeypatch):
    family = load("llava")
    loaded = SimpleNamespace(model=family.model, processor=None, device=CPU)
    monkeypatch.setattr(peaks_module, "stock_rows", lambda cache, count: None)
    found = measure_peaks(loaded, as_prompt(family.prompts[0]), STOCK, None, TOKENS, 2)
    assert (found.decode_bytes, found.decode_unknown) == (None, "its cache cannot be copied into a batch")
    assert FreshPeaks(**dataclasses.asdict(found)).peak_bytes is None
    assert FreshPeaks(5, 4).peak_bytes == 5, "of one new token prefill is all there is"


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_stock_and_the_unpruned_arm_make_the_same_tokens(name):
    family = load(name)
    loaded = SimpleNamespace(model=family.model, processor=None, device=CPU)
    for inputs in family.prompts:
        arms = [arm(loaded, as_prompt(inputs), *rest, TOKENS, Timer(CPU)) for arm, rest in
                ((StockArm, ()), (PathArm, (None,)))]  # fmt: skip
        for arm in arms:
            arm.prefill()
        # Twice: the first decode must leave the prefilled cache as it was.
        tokens = {arm.decode().token_ids for arm in arms for _ in range(2)}
        assert len(tokens) == 1
        assert len(tokens.pop()) == TOKENS


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        {"guidance_scale": 2.0},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"stop_strings": ["a"], "max_time": 1e-9, "use_cache": False},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_stock_leaves_out_of_the_models_own_wishes_what_the_arms_do(toy, images, asked):
    loaded = models.load(toy, device="cpu")
    prompt = models.prepare(loaded, images[:1], "what?")
    plain = stock_answer(loaded, prompt, 4)[1]
    loaded.model.generation_config = GenerationConfig(
        **{**loaded.model.generation_config.to_diff_dict(), **asked}
    )
    assert left_out(loaded.model.generation_config)
    assert stock_answer(loaded, prompt, 4)[1] == plain
    arms = (StockArm(loaded, prompt, 4, Timer(CPU)), PathArm(loaded, prompt, None, 4, Timer(CPU)))
    for arm in arms:
        arm.prefill()
    assert arms[0].decode().token_ids == arms[1].decode().token_ids


def test_a_fresh_process_measures_each_prompt_and_says_why_it_cannot(toy, images):
    prompts = (FreshPrompt(tuple(image.path for image in images), "what?"), FreshPrompt((), "what?"))
    job = FreshJob(PRUNED, PLPHPConfig(), prompts, None, TOKENS, toy, LoadOptions("float32", "cpu"))
    first, second = measure_fresh(job)
    assert first.failed is None
    assert first.peak_bytes == max(first.prefill_bytes, first.decode_bytes) > second.peak_bytes
    assert first.memory.rss_peak_bytes > first.peak_bytes
    lost = measure_fresh(dataclasses.replace(job, model=toy + "/nowhere"))
    assert [peaks.peak_bytes for peaks in lost] == [None, None]
    assert "nowhere" in lost[0].failed


def test_the_bandwidth_buffer_is_large_and_fits():
    assert buffer_bytes(CPU, None) == 1 << 30
    assert read_bandwidth(CPU, 1 << 24) > 1e6


def test_overlap_and_shares_are_of_what_heads_keep():
    kept = torch.tensor([[0, 1, 4], [1, 2, 5]])
    assert head_overlap(kept) == pytest.approx(1 / 5)
    assert head_overlap(kept[:1]) is None
    assert image_shares(kept, torch.arange(6), ((0, 4), (4, 6))) == [[0.5, 0.5], [0.5, 0.5]]
