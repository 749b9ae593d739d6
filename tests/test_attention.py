import laws
import pytest
import torch
from families import IMAGE, VIDEO, as_prompt, load, prompt_ids
from laws import CUT, answer, snapshot
from transformers import DynamicCache, GenerationConfig, StoppingCriteria

from plphp_cli.attention import prune
from plphp_cli.cache import cache_name, cache_of
from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import ConfigError, ImageError, UnsupportedError
from plphp_cli.prefilling import prefill

LAWS = [
    *laws.OF_EVERY_MODEL,
    laws.no_cache_tensor_is_kept,
    laws.the_cost_is_small,
    laws.one_prefill_serves_many,
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law, family):
    law(family)


@pytest.mark.parametrize("law", LAWS[:3], ids=lambda law: law.__name__)
def test_law_with_eager_attention(law):
    family = load("qwen2_vl").fresh()
    family.model.set_attn_implementation("eager")
    law(family)


@pytest.mark.parametrize(
    "law",
    [
        laws.rate_one_equals_stock,
        laws.first_token_is_unpruned,
        laws.bytes_are_as_predicted,
        laws.no_state_is_left_behind,
    ],
    ids=lambda law: law.__name__,
)
def test_law_in_bfloat16(law):
    family = load("llava").fresh()
    family.model.to(torch.bfloat16)
    law(family)


class Stop(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def test_stop_conditions_end_a_pruned_call(llava):
    inputs = llava.prompts[0]
    with prune(llava.model, CUT):
        tokens, _ = answer(llava.model, inputs)
        stop = next(i for i in range(2, 8) if tokens[i] not in tokens[:i])
        for options in ({"stopping_criteria": [Stop(tokens[stop])]}, {"eos_token_id": int(tokens[stop])}):
            output = llava.model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)
            assert output[0, inputs["input_ids"].shape[1] :].tolist() == tokens[: stop + 1].tolist()


def test_sampling_with_nothing_cut_draws_the_tokens_of_the_plain_model(llava):
    def sample():
        torch.manual_seed(3)
        return llava.model.generate(**llava.prompts[0], max_new_tokens=8, do_sample=True, temperature=1.5)

    stock = sample()
    with prune(llava.model, laws.WHOLE):
        assert torch.equal(sample(), stock)


@pytest.mark.parametrize("length", [{"max_new_tokens": 5}, {"max_length": 52}, {}])
def test_generate_tells_how_much_room_to_make(llava, length):
    inputs = llava.prompts[0]  # 47 tokens
    with prune(llava.model, None) as pruner:
        llava.model.generate(**inputs, **length, min_new_tokens=5, do_sample=False)
    token_bytes = pruner.layers[0].full_bytes // 47
    room = pruner.layers[0].allocated_bytes // token_bytes - 47
    assert room == (5 if length else 20)  # transformers' own default


def test_the_pruner_tells_the_latest_prompt(llava):
    with prune(llava.model, CUT) as pruner:
        assert pruner.layers == ()
        assert pruner.sequences == ()
        for inputs in llava.prompts:
            answer(llava.model, inputs)
            assert pruner.sequences[0].prompt_tokens == inputs["input_ids"].shape[1]
            assert [layer.index for layer in pruner.layers] == [0, 1, 2, 3]
            assert all(layer.kept.device.type == "cpu" for layer in pruner.layers)


def test_a_prompt_without_images_is_not_cut(llava):
    inputs = {"input_ids": prompt_ids([], 5)}
    tokens, logits = answer(llava.model, inputs)
    with prune(llava.model, CUT) as pruner:
        pruned = answer(llava.model, inputs)
    assert torch.equal(pruned[0], tokens)
    assert torch.equal(pruned[1], logits)
    assert {(s.gamma, s.group, s.rate, s.vision_tokens) for s in pruner.layers} == {(None, None, None, 0)}


def test_one_forward_call_is_a_prefill_of_its_own(llava):
    with prune(llava.model, CUT) as pruner, torch.no_grad():
        output = llava.model(llava.prompts[0]["input_ids"], llava.prompts[0]["pixel_values"])
    cache = cache_of(output)
    assert cache.layers[0].held < cache.get_seq_length() == 47
    assert pruner.layers[0].held_bytes < pruner.layers[0].full_bytes


predicts_many = pytest.mark.skipif(
    not hasattr(GenerationConfig(), "use_mtp"), reason="this transformers has no multi-token prediction"
)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
        ({"prompt_lookup_num_tokens": 2}, "assisted decoding"),
        ({"assistant_model": "itself"}, "assisted decoding"),
        ({"assistant_early_exit": 1}, "assisted decoding"),
        pytest.param({"use_mtp": True}, "assisted decoding", marks=predicts_many),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
        ({"dola_layers": "low"}, "DoLa"),
        ({"force_words_ids": [[5]]}, "constrained beam search"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size"),
        ({"cache_implementation": "static"}, "static"),
        ({"cache_implementation": "offloaded"}, "offloaded"),
        ({"past_key_values": "filled"}, "past_key_values"),
        ({"use_cache": False}, "use_cache"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"guidance_scale": 2.0}, "guidance"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 4, 64), "pixel_values": None}, "inputs_embeds"),
        ({"attention_mask": "padded"}, "padding"),
        ({"input_ids": "two"}, "batch"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_supported_is_refused_by_name(llava, options, named):
    inputs = {**llava.prompts[0], **options}
    ids = llava.prompts[0]["input_ids"]
    if options.get("past_key_values"):
        with torch.no_grad():
            filled = llava.model(ids[:, :4], **{cache_name(llava.model): DynamicCache()})
        inputs["past_key_values"] = cache_of(filled)
    if options.get("assistant_model"):
        inputs["assistant_model"] = llava.model
    if options.get("attention_mask"):
        inputs["attention_mask"] = torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0)
    if options.get("input_ids"):
        inputs |= {"input_ids": ids.repeat(2, 1), "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}
    before = snapshot(llava.model)
    with pytest.raises(UnsupportedError, match=named) as error, prune(llava.model, CUT):
        llava.model.generate(**inputs, max_new_tokens=4)
    assert error.value.hint
    assert snapshot(llava.model) == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"attention_mask": torch.zeros(1, 48)}, "a mask of one's own"),
        ({"attention_mask": torch.zeros(1, 1, 1, 48)}, "a mask of one's own"),
        ({"output_attentions": True}, "output_attentions"),
        ({"input_ids": torch.zeros(2, 1, dtype=torch.long)}, "batch of 2"),
    ],
    ids=["padding", "four dimensions", "attentions", "batch"],
)
def test_what_a_cut_cache_cannot_obey_is_refused_by_name(llava, options, named):
    first = llava.prompts[0]
    step = {"input_ids": torch.zeros(1, 1, dtype=torch.long), "use_cache": True, **options}
    with prune(llava.model, CUT), torch.no_grad():
        cache = cache_of(llava.model(first["input_ids"], first["pixel_values"]))
        with pytest.raises(UnsupportedError, match=named):
            llava.model(**step, **{cache_name(llava.model): cache})


def test_calling_a_part_of_the_model_is_refused(llava):
    with pytest.raises(UnsupportedError, match="part of the model"), prune(llava.model, CUT):
        llava.model.model(**llava.prompts[0])


@pytest.mark.parametrize("backend", ["flash_attention_3", "paged|eager"])
def test_a_back_end_that_was_not_proven_is_refused(llava, backend):
    model = llava.fresh().model
    model.get_decoder().config._attn_implementation_internal = backend
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match="is not supported"), prune(model, CUT):
        pass
    assert snapshot(model) == before


def test_capped_logits_are_refused_on_a_back_end_that_does_not_cap():
    family = load("paligemma2")
    model = family.fresh().model
    if not model.get_decoder()._supports_sdpa:
        pytest.skip("this transformers does not load the model with sdpa")
    for module in (model.config, model.get_decoder().config):
        module._attn_implementation_internal = "sdpa"
    with (
        pytest.raises(UnsupportedError, match="caps its attention logits"),
        prune(model, CUT),
        torch.no_grad(),
    ):
        model(**family.prompts[0])


def test_a_layer_that_is_not_there_cannot_be_skipped(llava):
    before = snapshot(llava.model)
    config = CUT.replace(skip_layers=[4])
    with pytest.raises(ConfigError, match="skip_layers holds 4"), prune(llava.model, config):
        pass
    assert snapshot(llava.model) == before


@pytest.mark.parametrize("change", ["a token more", "no pixels", "no tokens"])
def test_vision_tokens_that_do_not_fit_the_images_are_an_error(family, change):
    inputs = dict(family.prompts[1])
    ids = inputs["input_ids"]
    image = family.model.config.image_token_id
    if change == "a token more":
        inputs["input_ids"] = torch.cat([ids, torch.tensor([[image]])], dim=1)
    elif change == "no pixels":
        inputs = {"input_ids": ids}
    else:
        inputs["input_ids"] = ids.masked_fill(ids == image, 5)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == image).int()
    with pytest.raises(ImageError, match="vision tokens"), prune(family.model, CUT), torch.no_grad():
        family.model(**inputs)


def test_video_is_refused_by_name():
    family = load("qwen2_vl")
    ids = family.prompts[0]["input_ids"].masked_fill(family.prompts[0]["input_ids"] == IMAGE, VIDEO)
    with pytest.raises(UnsupportedError, match="video"), prune(family.model, CUT), torch.no_grad():
        family.model(input_ids=ids)


def test_the_images_of_a_prompt_are_told_apart(family):
    inputs = family.prompts[0]
    with prune(family.model, None) as pruner:
        vision = prefill(family.loaded, as_prompt(inputs), pruner).state.vision
    ids = inputs["input_ids"][0]
    if not family.tells_images:
        assert vision.spans is None
        with pytest.raises(UnsupportedError, match="scope"), prune(family.model, CUT.replace(scope="image")):
            answer(family.model, inputs)
        return
    assert len(vision.spans) == 2
    for start, stop in vision.spans:
        positions = vision.positions[start:stop]
        assert (ids[positions] == family.model.config.image_token_id).all()
        # What lies between the first and the last token of an image is that image's own.
        between = vision.positions[(vision.positions >= positions[0]) & (vision.positions <= positions[-1])]
        assert torch.equal(between, positions)


def test_sliding_windows_are_left_alone_and_reported_as_such():
    family = load("gemma3")
    with prune(family.model, PLPHPConfig(r=0, delta_r=0)) as pruner:
        answer(family.model, family.prompts[0])
    assert [layer.group == "sliding" for layer in pruner.layers] == [True, False, True, False]
    assert [layer.prunable for layer in pruner.layers] == [False, True, False, True]
    for layer in pruner.layers[::2]:
        assert (layer.gamma, layer.rate, layer.vision_tokens, layer.kept) == (None, None, None, None)
        assert layer.held_bytes == layer.full_bytes == 2 * 2 * 16 * 15 * 4
