"""Scenes of coloured shapes and short signs: what they hold, how they look, which are held out.

A scene is symbolic (which shape stands in which cell of a 3 x 3 grid, what the sign says); rendering adds
what the eye sees (exact centre, radius, tilt, shade). Questions are asked about the scene alone.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

SIZE = 96
"""Side of the square that the model sees, in pixels; layouts are given in these coordinates."""
CELL = SIZE // 3

CELLS = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
ROWS = ("top", "center", "bottom")
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "large")
COLORS = {
    "red": (218, 32, 32),
    "orange": (245, 135, 20),
    "yellow": (232, 205, 15),
    "green": (30, 150, 50),
    "blue": (35, 75, 215),
    "purple": (135, 45, 175),
    "pink": (245, 130, 190),
    "black": (25, 25, 25),
}
WORDS = (
    "cat", "dog", "sun", "moon", "tree", "fish", "bird", "house", "boat", "car", "bus", "road", "lake",
    "hill", "snow", "rain", "wind", "fire", "gold", "open", "stop", "exit", "sale", "help", "love", "time",
    "book", "door", "key", "lamp", "milk", "tea", "cake", "bread", "salt", "pear", "plum", "lemon", "ship",
    "queen",
)  # fmt: skip
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"

Split = Literal["train", "held-out"]
HELD_OUT_SHARE = 16
"""One scene in this many is held out."""


@dataclass(frozen=True, order=True)
class Item:
    """One coloured shape. ``cell`` counts the grid in reading order, 0 to 8."""

    cell: int
    shape: str
    color: str
    size: str

    @property
    def place(self) -> str:
        """Name of the cell."""
        return CELLS[self.cell]

    @property
    def row(self) -> int:
        """Grid row, 0 at the top."""
        return self.cell // 3

    @property
    def column(self) -> int:
        """Grid column, 0 at the left."""
        return self.cell % 3


@dataclass(frozen=True)
class Sign:
    """A short word or number that fills one row of the grid."""

    row: int
    text: str
    color: str

    @property
    def place(self) -> str:
        """Name of the row."""
        return ROWS[self.row]

    @property
    def kind(self) -> str:
        """What the sign holds, in the words of the questions."""
        return "number" if self.text.isdigit() else "word"


@dataclass(frozen=True)
class Scene:
    """Items in reading order and at most one sign."""

    items: tuple[Item, ...]
    sign: Sign | None = None

    @property
    def held_out(self) -> bool:
        """Whether the scene is held out: decided by its content, so that the splits cannot meet."""
        digest = hashlib.blake2b(repr(self).encode(), digest_size=4).digest()
        return int.from_bytes(digest) % HELD_OUT_SHARE == 0

    @property
    def split(self) -> Split:
        """The split that the scene belongs to."""
        return "held-out" if self.held_out else "train"


@dataclass(frozen=True)
class Box:
    """Where something was drawn, in model pixels; ``glyph_ends`` are the right edges of a sign's glyphs."""

    x: float
    y: float
    half_width: float
    half_height: float
    glyph_ends: tuple[float, ...] = ()


def sample_scene(
    rng: random.Random, split: Split, *, most: int = 5, least: int = 1, sign_share: float = 0.5
) -> Scene:
    """Draw a scene of ``least`` to ``most`` items that belongs to ``split``."""
    while True:
        sign = None
        free = list(range(9))
        if rng.random() < sign_share:
            row = rng.randrange(3)
            sign = Sign(row, sample_text(rng), rng.choice(list(COLORS)))
            free = [cell for cell in free if cell // 3 != row]
        # The larger of two draws: scenes of one item answer most questions trivially.
        count = max(rng.randint(least, most), rng.randint(least, most))
        cells = sorted(rng.sample(free, count))
        scene = Scene(tuple(sample_item(rng, cell) for cell in cells), sign)
        if scene.split == split:
            return scene


def sample_item(rng: random.Random, cell: int) -> Item:
    """Draw any item for a cell."""
    return Item(cell, rng.choice(SHAPES), rng.choice(list(COLORS)), rng.choice(SIZES))


def sample_text(rng: random.Random) -> str:
    """Draw a word (two times in three) or a number of two or three digits."""
    return rng.choice(WORDS) if rng.random() < 2 / 3 else str(rng.randint(10, 999))


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # Pillow carries this font itself, so that every machine renders the same pixels.
    return ImageFont.load_default(size)


def _polygon(shape: str, tilt: float) -> list[tuple[float, float]]:
    """Corners of a shape in the unit circle's coordinates."""
    if shape == "square":
        angles, radii = [math.pi / 4 + k * math.pi / 2 for k in range(4)], [1.2] * 4
    elif shape == "triangle":
        angles, radii = [-math.pi / 2 + k * 2 * math.pi / 3 for k in range(3)], [1.2] * 3
    elif shape == "star":
        angles, radii = [-math.pi / 2 + k * math.pi / 5 for k in range(10)], [1.2, 0.5] * 5
    else:
        arm = 0.36
        near, far = math.atan2(arm, 1.1), math.hypot(arm, 1.1)
        angles, radii = [], []
        for k in range(4):
            turn = k * math.pi / 2
            angles += [turn - near, turn + near, turn + math.pi / 4]
            radii += [far, far, arm * math.sqrt(2)]
    return [(r * math.cos(a + tilt), r * math.sin(a + tilt)) for a, r in zip(angles, radii, strict=True)]


def _shade(rng: random.Random, color: str) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, c + rng.randint(-12, 12))) for c in COLORS[color])
    return red, green, blue


def render(
    scene: Scene, seed: int, *, width: int = 2 * SIZE, height: int = 2 * SIZE
) -> tuple[Image.Image, list[Box]]:
    """Draw a scene.

    Args:
        scene: what to draw.
        seed: decides background, shades, tilts and exact places. Items that two scenes share stand in the
            same place under the same seed, so that a before/after pair differs only in what changed.
        width: width of the picture in pixels.
        height: height of the picture in pixels.

    Returns:
        The picture, and one box per item, then one for the sign, in model pixels (a 96 x 96 square).
    """
    rng = random.Random(seed)
    background = rng.randint(205, 255)
    red, green, blue = (min(255, background + rng.randint(-8, 8)) for _ in range(3))
    aspect = math.exp(rng.uniform(-0.15, 0.15))
    image = Image.new("RGB", (width, height), (red, green, blue))
    draw = ImageDraw.Draw(image)
    sx, sy = width / SIZE, height / SIZE
    boxes = []
    for item in scene.items:
        own = random.Random(hash((seed, item.cell, SHAPES.index(item.shape), SIZES.index(item.size))))
        radius = own.uniform(6.5, 8.0) if item.size == "small" else own.uniform(11.0, 12.5)
        slack = CELL / 2 - radius * 1.2
        x = CELL * (item.column + 0.5) + own.uniform(-slack, slack)
        y = CELL * (item.row + 0.5) + own.uniform(-slack, slack)
        half_width, half_height = radius * aspect**0.5, radius / aspect**0.5
        fill = _shade(own, item.color)
        if item.shape == "circle":
            corners = (x - half_width, y - half_height, x + half_width, y + half_height)
            draw.ellipse((corners[0] * sx, corners[1] * sy, corners[2] * sx, corners[3] * sy), fill=fill)
        else:
            points = _polygon(item.shape, own.uniform(-0.2, 0.2))
            draw.polygon(
                [((x + px * half_width) * sx, (y + py * half_height) * sy) for px, py in points], fill=fill
            )
        boxes.append(Box(x, y, half_width, half_height))
    if scene.sign is not None:
        boxes.append(_draw_sign(draw, scene.sign, random.Random(hash((seed, scene.sign.row))), sx, sy))
    return image, boxes


def _draw_sign(draw: ImageDraw.ImageDraw, sign: Sign, rng: random.Random, sx: float, sy: float) -> Box:
    font = _font(round(rng.uniform(21, 25) * sy))
    left, top, right, bottom = draw.textbbox((0, 0), sign.text.upper(), font=font)
    half_width, half_height = (right - left) / 2 / sx, (bottom - top) / 2 / sy
    slack = max(0.0, SIZE / 2 - half_width - 3)
    x = SIZE / 2 + rng.uniform(-slack, slack)
    y = CELL * (sign.row + 0.5) + rng.uniform(-3, 3)
    corner = ((x - half_width) * sx - left, (y - half_height) * sy - top)
    draw.text(corner, sign.text.upper(), font=font, fill=_shade(rng, sign.color))
    ends = (font.getlength(sign.text[: k + 1].upper()) / sx for k in range(len(sign.text)))
    return Box(x, y, half_width, half_height, tuple(x - half_width + end for end in ends))
