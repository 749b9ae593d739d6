"""Toy models: the true architecture of each family, random weights, prompts made without a processor.

One row per family in `FAMILIES`: a model and at least two prompts of different image sizes, each the keyword
arguments that the model's processor would give. A model loaded from a folder can be a row, too.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import rows_grids
import rows_idefics
import rows_llava
import rows_more
import rows_qwen
import rows_towers
import torch
from toys import IMAGE, VIDEO, Family, as_prompt, prompt_ids
from transformers import CONFIG_MAPPING

from plphp_cli.support import prepares_positions

__all__ = [
    "FAMILIES",
    "IMAGE",
    "KIN",
    "KINDS",
    "RELATIVES",
    "VIDEO",
    "Family",
    "as_prompt",
    "load",
    "prompt_ids",
]

FEW = ("cut", "everything goes", "random")
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
    return Family("builtin", loaded.model, prompts, loaded.processor, settings=FEW)


ROWS = [row for module in (rows_llava, rows_qwen, rows_idefics) for row in module.ROWS]
FAMILIES: dict[str, Callable[..., Family]] = {row.__name__: row for row in ROWS}
if BUILTIN.is_file():
    FAMILIES["builtin"] = builtin
# Held to the laws on fewer settings: their parts are those of the families above.
RELATIVES: dict[str, Callable[..., Family]] = {row.__name__: row for row in rows_more.ROWS}
# The others of transformers' mapping, as far as this version has them, and rightly.
KIN: dict[str, Callable[..., Family]] = {
    row.__name__: row
    for row in (*rows_grids.ROWS, *rows_towers.ROWS)
    if row.__name__ in CONFIG_MAPPING and prepares_positions(CONFIG_MAPPING[row.__name__]())
}
# One family of each kind, for what follows from the laws and need not be shown on every family.
KINDS = [
    name
    for name in ("llava", "llava_onevision", "qwen3_vl", "gemma3", "paligemma", "paligemma2", "builtin")
    if name in FAMILIES
]


@cache
def load(name: str) -> Family:
    """The family's toy, built once per test run: the laws promise to leave it as it was."""
    rows = FAMILIES | RELATIVES | KIN
    family = rows[name]() if name in FAMILIES else replace(rows[name](), settings=FEW)
    # At its first run transformers marks a model; what pruning leaves behind is told apart only after that.
    with torch.no_grad():
        family.model(**family.prompts[0])
    return family
