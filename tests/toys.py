"""What the toy families are made of: the row itself, and parts that their builders share."""

import copy
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from plphp_cli.prompt import Prompt

VOCABULARY = 300
IMAGE, VIDEO, VISION_START, VISION_END = 299, 298, 297, 296
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "max_position_embeddings": 1024,
}
# A vision tower: 16 patches from an image (or tile) of 32 x 32 pixels.
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
HYBRID = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2} | {
    "num_hidden_layers": 4
}

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A model that the laws are held on, and its prompts.

    `tells_images` is False where it is not known which vision tokens belong to which image; `settings` names
    those that the laws run through, None for all.
    """

    name: str
    model: Any
    prompts: tuple[Inputs, ...]
    processor: Any = None
    tells_images: bool = True
    settings: tuple[str, ...] | None = None

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


def made(kind: str, **config: Any) -> Any:
    """A model of transformers' type `kind`, from its config's arguments, which are left as they are."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForImageTextToText.from_config(CONFIG_MAPPING[kind](**copy.deepcopy(config)))


def randomised(model: Any, seed: int = 0) -> Any:
    """Weights large enough that attention is peaked, layers differ and greedy tokens have a clear margin."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scale = 0.35 if "q_proj" in name or "k_proj" in name else 0.15
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model.eval()


def pixels(count: int, seed: int, *, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    """Random images (or tiles) [count, 3, height, width]."""
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def prompt_ids(
    counts: list[int], seed: int, wrap: tuple[list[int], list[int]] = ([], []), every: int | None = None
) -> torch.Tensor:
    """A prompt [1, N]: text, then per image its vision tokens, between markers, and more text.

    With `every` a marker comes after so many vision tokens of an image: rows, or tiles.
    """
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> list[int]:
        return torch.randint(3, 290, (length,), generator=generator).tolist()

    ids = [1, *text(4)]
    for count in counts:
        shown = [IMAGE] * count
        if every is not None:
            shown = [token for i in range(0, count, every) for token in ([IMAGE] * every + [VISION_START])]
        ids += [*wrap[0], *shown, *wrap[1], *text(3)]
    return torch.tensor([ids + text(4)])
