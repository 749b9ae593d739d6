"""Toy models: the true architecture of each family, random weights, prompts made without a processor.

One row per family in `FAMILIES`: a model and at least two prompts of different image sizes, each the keyword
arguments that the model's processor would give. A model loaded from a folder can be a row, too.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)

from plphp_cli.prompt import Prompt

VOCABULARY = 300
IMAGE, VIDEO, VISION_START, VISION_END = 299, 298, 297, 296
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "max_position_embeddings": 1024,
}

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A model that the laws are held on, and its prompts.

    `tells_images` is False where it is not known which vision tokens belong to which image.
    """

    name: str
    model: Any
    prompts: tuple[Inputs, ...]
    processor: Any = None
    tells_images: bool = True

    @property
    def loaded(self) -> Any:
        """As the engine takes a model."""
        return SimpleNamespace(model=self.model, processor=self.processor)

    def fresh(self) -> "Family":
        """The same family with a model of its own."""
        return replace(self, model=copy.deepcopy(self.model))


def as_prompt(inputs: Inputs) -> Prompt:
    """A prompt as the engine takes it."""
    return Prompt(inputs, "", (), inputs["input_ids"].shape[1], 0, 0.0)


def randomised(model: Any, seed: int = 0) -> Any:
    """Weights large enough that attention is peaked, layers differ and greedy tokens have a clear margin."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scale = 0.35 if "q_proj" in name or "k_proj" in name else 0.15
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model.eval()


def prompt_ids(counts: list[int], seed: int, wrap: tuple[list[int], list[int]] = ([], [])) -> torch.Tensor:
    """A prompt [1, N]: text, then per image its vision tokens, between markers, and more text."""
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> list[int]:
        return torch.randint(3, 290, (length,), generator=generator).tolist()

    ids = [1, *text(4)]
    for count in counts:
        ids += [*wrap[0], *[IMAGE] * count, *wrap[1], *text(3)]
    return torch.tensor([ids + text(4)])


def llava(seed: int = 0) -> Family:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        ),
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        image_seq_length=16,
    )
    model = randomised(LlavaForConditionalGeneration(config), seed)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    prompts = (
        {"input_ids": prompt_ids([16, 16], seed), "pixel_values": pixels[:2]},
        {"input_ids": prompt_ids([16], seed + 1), "pixel_values": pixels[2:]},
    )
    return Family("llava", model, prompts)


def llava_onevision(seed: int = 0) -> Family:
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[32, 32], [32, 64], [64, 32], [64, 64]],
    )
    model = randomised(LlavaOnevisionForConditionalGeneration(config), seed)
    tiles = torch.randn(3, 3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    prompts = []
    for sizes, pixels in (([[30, 60], [60, 28]], tiles[:2]), ([[64, 31]], tiles[2:])):
        inputs: Inputs = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
        with torch.no_grad():
            features = model.model.get_image_features(**inputs, return_dict=True).pooler_output
        counts = [image.shape[0] for image in features]
        prompts.append({"input_ids": prompt_ids(counts, seed + len(prompts)), **inputs})
    return Family("llava_onevision", model, tuple(prompts))


def _qwen(name: str, model: Any, patch: int, seed: int) -> Family:
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for grids in ([[1, 4, 8], [1, 6, 4]], [[1, 8, 8]]):
        counts = [t * h * w // 4 for t, h, w in grids]
        ids = prompt_ids(counts, seed + len(prompts), ([VISION_START], [VISION_END]))
        prompts.append(
            {
                "input_ids": ids,
                "mm_token_type_ids": (ids == IMAGE).int(),
                "pixel_values": torch.randn(4 * sum(counts), 3 * 2 * patch**2, generator=generator),
                "image_grid_thw": torch.tensor(grids),
            }
        )
    return Family(name, randomised(model, seed), tuple(prompts))


_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}


def qwen2_vl(seed: int = 0) -> Family:
    config = Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
        },
        text_config={**TEXT, **_MROPE},
        **_QWEN_IDS,
    )
    return _qwen("qwen2_vl", Qwen2VLForConditionalGeneration(config), 4, seed)


def qwen2_5_vl(seed: int = 0) -> Family:
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        text_config={**TEXT, **_MROPE},
        **_QWEN_IDS,
    )
    return _qwen("qwen2_5_vl", Qwen2_5_VLForConditionalGeneration(config), 4, seed)


def gemma3(seed: int = 0) -> Family:
    """A hybrid decoder: every other layer has a sliding window, shorter than the prompts."""
    config = Gemma3Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        text_config={
            **TEXT,
            "head_dim": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        image_token_id=IMAGE,
        mm_tokens_per_image=16,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
    )
    model = randomised(Gemma3ForConditionalGeneration(config), seed)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    prompts = []
    for images in (pixels[:2], pixels[2:]):
        ids = prompt_ids([16] * len(images), seed + len(prompts), ([VISION_START], [VISION_END]))
        prompts.append({"input_ids": ids, "pixel_values": images, "token_type_ids": (ids == IMAGE).long()})
    return Family("gemma3", model, tuple(prompts), tells_images=False)


BUILTIN = Path(__file__).parents[1] / "plphp_cli" / "builtin" / "model" / "config.json"


def builtin(seed: int = 0) -> Family:
    """The model that the package carries, with prompts made by its own processor."""
    from PIL import Image

    from plphp_cli import models
    from plphp_cli.images import LoadedImage

    loaded = models.load("builtin", device="cpu")
    colours = ["red", "blue", "green"]
    images = [
        LoadedImage(Image.new("RGB", (96 + 20 * i, 96), colour), f"{colour}.png", (96, 96), (), colour)
        for i, colour in enumerate(colours)
    ]
    questions = [(images[:2], "what changed?"), (images[2:], "describe the image.")]
    prompts = tuple(dict(models.prepare(loaded, chosen, text).inputs) for chosen, text in questions)
    return Family("builtin", loaded.model, prompts, loaded.processor)


FAMILIES: dict[str, Callable[..., Family]] = {
    "llava": llava,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "gemma3": gemma3,
} | ({"builtin": builtin} if BUILTIN.is_file() else {})


@cache
def load(name: str) -> Family:
    """The family's toy, built once per test run: the laws promise to leave it as it was."""
    return FAMILIES[name]()
