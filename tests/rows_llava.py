"""Rows of families that put one tower's features before a language model: LLaVA and its descendants."""

import torch
from toys import (
    HYBRID,
    IMAGE,
    TEXT,
    TOWER,
    VIDEO,
    VISION_END,
    VISION_START,
    Family,
    Inputs,
    pixels,
    prompt_ids,
    randomised,
)
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    CLIPVisionConfig,
    Cohere2Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PixtralVisionConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

MARKED = ([VISION_START], [VISION_END])


def llava(seed: int = 0) -> Family:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**{**TEXT, "num_hidden_layers": 4}),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        image_seq_length=16,
    )
    model = randomised(LlavaForConditionalGeneration(config), seed)
    images = pixels(3, seed)
    prompts = (
        {"input_ids": prompt_ids([16, 16], seed), "pixel_values": images[:2]},
        {"input_ids": prompt_ids([16], seed + 1), "pixel_values": images[2:]},
    )
    return Family("llava", model, prompts)


def of_any_size(name: str, model, seed: int, side: int) -> Family:
    """Pixtral's tower: images of any size, a marker after each row of patches."""
    prompts = []
    for sizes in ([[32, 48], [48, 16]], [[32, 32]]):
        largest = tuple(max(edges) for edges in zip(*sizes, strict=True))
        counts = [(height // side) * (width // side) for height, width in sizes]
        ids = torch.cat(
            [
                part
                for i, (_, width) in enumerate(sizes)
                for part in [prompt_ids([counts[i]], seed + i, every=width // side)[:, i and 1 :]]
            ],
            dim=1,
        )
        prompts.append(
            {
                "input_ids": ids,
                "pixel_values": pixels(len(sizes), seed, size=largest),
                "image_sizes": torch.tensor(sizes),
            }
        )
    return Family(name, randomised(model, seed), tuple(prompts))


def pixtral(seed: int = 0) -> Family:
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(**{**TOWER, "image_size": 64}),
        text_config=MistralConfig(**TEXT, sliding_window=None),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return of_any_size("pixtral", LlavaForConditionalGeneration(config), seed, 8)


def mistral3(seed: int = 0) -> Family:
    config = Mistral3Config(
        vision_config=PixtralVisionConfig(**{**TOWER, "image_size": 64, "patch_size": 4}),
        text_config=MistralConfig(**TEXT, sliding_window=None),
        image_token_id=IMAGE,
        spatial_merge_size=2,
    )
    return of_any_size("mistral3", Mistral3ForConditionalGeneration(config), seed, 8)


def any_resolution(name: str, model, seed: int) -> Family:
    """Any-resolution tiles, as many as the image's shape asks for; a newline feature ends each row."""
    tiles = pixels(9, seed).view(3, 3, 3, 32, 32)
    prompts = []
    for sizes, images in (([[30, 60], [60, 28]], tiles[:2]), ([[64, 31]], tiles[2:])):
        inputs: Inputs = {"pixel_values": images, "image_sizes": torch.tensor(sizes)}
        with torch.no_grad():
            features = model.model.get_image_features(**inputs, return_dict=True).pooler_output
        counts = [image.shape[0] for image in features]
        prompts.append({"input_ids": prompt_ids(counts, seed + len(prompts)), **inputs})
    return Family(name, model, tuple(prompts))


PINPOINTS = [[32, 32], [32, 64], [64, 32], [64, 64]]


def llava_next(seed: int = 0) -> Family:
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=MistralConfig(**TEXT, sliding_window=None),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
    )
    return any_resolution("llava_next", randomised(LlavaNextForConditionalGeneration(config), seed), seed)


def llava_onevision(seed: int = 0) -> Family:
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS,
    )
    model = randomised(LlavaOnevisionForConditionalGeneration(config), seed)
    return any_resolution("llava_onevision", model, seed)


def in_tiles(name: str, model, seed: int, each: int = 16, *, size: tuple[int, int] = (32, 32)) -> Family:
    """Tiles of one size in one stack: 3 of the first image and 2 of the second; then 1. None says whose."""
    prompts = []
    for tiles in ([3, 2], [1]):
        ids = prompt_ids([each * count for count in tiles], seed + len(prompts), MARKED, every=each)
        prompts.append({"input_ids": ids, "pixel_values": pixels(sum(tiles), seed + len(prompts), size=size)})
    return Family(name, randomised(model, seed), tuple(prompts), tells_images=False)


def internvl(seed: int = 0) -> Family:
    config = InternVLConfig(
        vision_config={**TOWER, "image_size": [32, 32], "patch_size": [4, 4]},
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=16,
    )
    return in_tiles("internvl", InternVLForConditionalGeneration(config), seed)


def aya_vision(seed: int = 0) -> Family:
    """A hybrid decoder whose full-attention layers have no rotary positions at all."""
    config = AyaVisionConfig(
        vision_config=SiglipVisionConfig(**{**TOWER, "patch_size": 4}, vision_use_head=False),
        text_config=Cohere2Config(**{**TEXT, **HYBRID}),
        image_token_id=IMAGE,
    )
    return in_tiles("aya_vision", AyaVisionForConditionalGeneration(config), seed)


def whole(name: str, model, seed: int, image_is: int, text_is: int = 0, **options) -> Family:
    """Images scaled to one size, and token types that open the mask: inside an image, or the whole prefix."""
    images = pixels(3, seed)
    prompts = []
    for shown in (images[:2], images[2:]):
        ids = prompt_ids([16] * len(shown), seed + len(prompts), MARKED)
        types = torch.where(ids == IMAGE, image_is, text_is)
        prompts.append({"input_ids": ids, "pixel_values": shown, "token_type_ids": types})
    return Family(name, randomised(model, seed), tuple(prompts), **options)


def gemma3(seed: int = 0) -> Family:
    """A hybrid decoder: every other layer has a sliding window, shorter than the prompts."""
    config = Gemma3Config(
        vision_config=TOWER,
        text_config={**TEXT, **HYBRID, "head_dim": 16},
        image_token_id=IMAGE,
        mm_tokens_per_image=16,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
    )
    return whole("gemma3", Gemma3ForConditionalGeneration(config), seed, 1, tells_images=False)


def paligemma(seed: int = 0) -> Family:
    """The whole prompt is a prefix, in which every token sees every other."""
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=GemmaConfig(**TEXT, head_dim=16),
        image_token_id=IMAGE,
        projection_dim=64,
        hidden_size=64,
    )
    return whole("paligemma", PaliGemmaForConditionalGeneration(config), seed, 0)


def paligemma2(seed: int = 0) -> Family:
    """A hybrid decoder, and capped logits, which only eager attention computes."""
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=Gemma2Config(
            **{**TEXT, **HYBRID}, head_dim=16, attn_logit_softcapping=3.0, query_pre_attn_scalar=16
        ),
        image_token_id=IMAGE,
        projection_dim=64,
        hidden_size=64,
    )
    config._attn_implementation = "eager"
    return whole("paligemma2", PaliGemmaForConditionalGeneration(config), seed, 0)


ROWS = (
    llava,
    pixtral,
    llava_next,
    llava_onevision,
    mistral3,
    internvl,
    aya_vision,
    gemma3,
    paligemma,
    paligemma2,
)
