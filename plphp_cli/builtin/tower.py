"""Stage 0: the vision tower learns to say, patch by patch, what it looks at."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from plphp_cli.builtin.architecture import PATCH, WIDTH
from plphp_cli.builtin.scenes import ALPHABET, COLORS, SHAPES, SIZE, SIZES, Box, Item, Scene, Sign, render

SIDE = SIZE // PATCH
CLASSES = {
    "kind": 2 + len(SHAPES),
    "color": 1 + len(COLORS),
    "size": 1 + len(SIZES),
    "glyph": 1 + len(ALPHABET),
}
"""Targets per patch; class 0 is "none". Kinds: none, the shapes, sign."""
COLOR_NAMES = list(COLORS)


@dataclass
class Targets:
    """Dense targets of B images: class ids and centre offsets per patch.

    Shapes: ``classes[name]`` [B, 144]; ``offsets`` [B, 144, 2], in units of a cell; only where ``kind`` > 0.
    """

    classes: dict[str, torch.Tensor]
    offsets: torch.Tensor


def dense_targets(scenes: list[tuple[Scene, list[Box]]]) -> Targets:
    """Label each patch with the object whose box holds its centre."""
    shape = (len(scenes), SIDE, SIDE)
    classes = {name: np.zeros(shape, np.int64) for name in CLASSES}
    offsets = np.zeros((*shape, 2), np.float32)
    centres = (np.arange(SIDE) + 0.5) * PATCH
    for index, (scene, boxes) in enumerate(scenes):
        things: list[Item | Sign] = [*scene.items, *([scene.sign] if scene.sign else [])]
        for thing, box in zip(things, boxes, strict=True):
            rows = np.flatnonzero(np.abs(centres - box.y) <= box.half_height + 1)
            columns = np.flatnonzero(np.abs(centres - box.x) <= box.half_width + 1)
            where: Any = (index, *np.ix_(rows, columns))
            classes["color"][where] = 1 + COLOR_NAMES.index(thing.color)
            offsets[where] = np.stack(np.meshgrid(box.x - centres[columns], box.y - centres[rows]), -1) / 32
            if isinstance(thing, Sign):
                glyphs = np.searchsorted(box.glyph_ends, centres[columns]).clip(max=len(thing.text) - 1)
                classes["kind"][where] = CLASSES["kind"] - 1
                classes["glyph"][where] = [1 + ALPHABET.index(thing.text[g]) for g in glyphs]
            else:
                classes["kind"][where] = 1 + SHAPES.index(thing.shape)
                classes["size"][where] = 1 + SIZES.index(thing.size)
    return Targets(
        {name: torch.from_numpy(v.reshape(len(scenes), -1)) for name, v in classes.items()},
        torch.from_numpy(offsets.reshape(len(scenes), -1, 2)),
    )


class DenseHead(nn.Module):
    """Reads the targets off the tower's last hidden state; used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, sum(CLASSES.values()) + 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, 144, width] to [B, 144, classes and two offsets]."""
        return self.out(self.norm(features))

    def loss(self, features: torch.Tensor, targets: Targets) -> tuple[torch.Tensor, dict[str, float]]:
        """Sum of cross-entropies and offset error, and the accuracy of each target where there is one."""
        scores = self(features).float()
        *parts, offsets = scores.split([*CLASSES.values(), 2], dim=-1)
        filled = targets.classes["kind"] > 0
        total = (offsets - targets.offsets)[filled].square().mean() * 4
        accuracy = {}
        for name, part in zip(CLASSES, parts, strict=True):
            wanted = targets.classes[name]
            # Empty patches are most of a picture and soon trivial: they share a tenth of the weight.
            losses = F.cross_entropy(part.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
            total = total + losses[filled].mean() + 0.1 * losses[~filled].mean()
            present = wanted > 0
            accuracy[name] = float((part.argmax(-1) == wanted)[present].float().mean())
        return total, accuracy


def positions_2d(width: int = WIDTH) -> torch.Tensor:
    """Sine-cosine table [144, width]: half for the row, half for the column."""
    frequencies = 1.0 / 100 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(SIDE)[:, None] * frequencies
    table = torch.cat([angles.sin(), angles.cos()], -1)
    rows = table[:, None].expand(SIDE, SIDE, -1)
    columns = table[None, :].expand(SIDE, SIDE, -1)
    return torch.cat([rows, columns], -1).reshape(SIDE * SIDE, width)


def to_pixels(image: Image.Image) -> np.ndarray:
    """What the shipped image processor makes of a picture: [3, 96, 96] in [-1, 1]."""
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return (np.asarray(image, np.float32) / 127.5 - 1.0).transpose(2, 0, 1)


def draw_batch(
    scenes: list[Scene], seeds: list[int], rng: random.Random
) -> tuple[torch.Tensor, list[tuple[Scene, list[Box]]]]:
    """Render scenes at a random resolution: pixels [B, 3, 96, 96] and the boxes that dense targets need."""
    pixels, placed = [], []
    for scene, seed in zip(scenes, seeds, strict=True):
        side = round(SIZE * rng.choice((1.5, 2, 2, 3)))
        image, boxes = render(scene, seed, width=side, height=side)
        pixels.append(to_pixels(image))
        placed.append((scene, boxes))
    return torch.from_numpy(np.stack(pixels)), placed
