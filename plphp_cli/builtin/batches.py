"""Training batches: several questions share the prefix (system prompt and images) of one row.

A row is prefix + blocks; each block is one question with its answer and sees the prefix and itself, at the
positions that it would have if it stood alone behind the prefix: one pass over the images serves many.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from tokenizers import Tokenizer

from plphp_cli.builtin.architecture import VISION_TOKENS
from plphp_cli.builtin.attention_training import Packing, VisionDropout
from plphp_cli.builtin.dialogue import (
    ASSISTANT,
    EOS,
    IMAGE,
    PAD,
    SYSTEM_PROMPTS,
    described_prefix,
    prefix_text,
    special_ids,
)
from plphp_cli.builtin.questions import Group, ask, caption, sample_group
from plphp_cli.builtin.scenes import Box, Scene, Split
from plphp_cli.builtin.tower import draw_batch

BLOCK_GROUPS = 4
LONG_SHARE = 0.45


@dataclass
class Batch:
    """B rows of S tokens.

    Attributes:
        ids: [B, S].
        positions: [B, S].
        targets: [B, S]; -100 where there is no loss.
        weights: [B, S]; weight of each target, so that long answers do not drown the short ones.
        blocks: [B, S]; number of the block that a target belongs to, -1 elsewhere. A block's first target
            stands at its last prompt token.
        packing: how each row is laid out.
        image_mask: [S], where the vision tokens are; the same in every row.
        pixels: [B * images, 3, 96, 96]; None where the scenes are told in words.
        kinds: per row the question kind of each block.
        placed: scene and boxes of each image.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    blocks: torch.Tensor
    packing: Packing
    image_mask: torch.Tensor
    pixels: torch.Tensor | None
    kinds: list[list[str]]
    placed: list[tuple[Scene, list[Box]]]


def sample_batch(
    tokenizer: Tokenizer,
    rng: random.Random,
    *,
    rows: int,
    blocks: int,
    images: int,
    most: int = 5,
    told: bool = False,
    split: Split = "train",
    dropout: bool = False,
) -> Batch:
    """Draw a batch of scenes.

    ``told`` replaces every image by its caption (no pixels); ``dropout`` hides vision tokens by chance.
    """
    groups = [sample_group(rng, split, images, most=most) for _ in range(rows)]
    system = rng.choice(SYSTEM_PROMPTS)
    ids_of = special_ids(tokenizer)
    prefixes = _prefixes(tokenizer, groups, system, told)
    prefix = len(prefixes[0])
    asked = [_blocks(tokenizer, rng, group, blocks) for group in groups]
    lengths = [max(len(row[k].question) + len(row[k].answer) - 1 for row in asked) for k in range(blocks)]
    packing = _group(prefix, lengths)
    slots = [tokens for count, tokens in packing.groups for _ in range(count)]
    filled = _fill(prefixes, asked, slots, ids_of[PAD])
    image_mask = filled.ids[0] == ids_of[IMAGE]
    if dropout and not told:
        packing = replace(packing, dropout=_dropout(rng, packing, image_mask, filled.generated))
    drawn = None
    if not told:
        scenes = [scene for group in groups for scene in group.scenes]
        drawn = draw_batch(scenes, [seed for group in groups for seed in group.seeds], rng)
    places = [torch.arange(prefix), *(prefix + torch.arange(tokens) for tokens in slots)]
    return Batch(
        ids=filled.ids,
        positions=torch.cat(places).expand(rows, -1),
        targets=filled.targets,
        weights=filled.weights,
        blocks=filled.blocks,
        packing=packing,
        image_mask=image_mask,
        pixels=None if drawn is None else drawn[0],
        kinds=[[block.kind for block in row] for row in asked],
        placed=[] if drawn is None else drawn[1],
    )


@dataclass(frozen=True)
class _Block:
    """One question with its answer, as token ids; ``conclusion`` is how many of the last ones weigh more."""

    question: list[int]
    answer: list[int]
    kind: str
    conclusion: int


@dataclass
class _Rows:
    """Tensors [B, S] of a batch; see ``Batch``. ``generated``: tokens that the model says itself."""

    ids: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    generated: torch.Tensor
    blocks: torch.Tensor


def _prefixes(tokenizer: Tokenizer, groups: list[Group], system: str, told: bool) -> list[list[int]]:
    """What stands before the questions in each row, all of one length."""
    if told:
        texts = [described_prefix(system, [caption(scene) for scene in group.scenes]) for group in groups]
        prefixes = [tokenizer.encode(text).ids for text in texts]
        width = max(map(len, prefixes))
        filler = tokenizer.encode("\n").ids
        return [ids + filler * (width - len(ids)) for ids in prefixes]
    image = special_ids(tokenizer)[IMAGE]
    ids = tokenizer.encode(prefix_text(system, len(groups[0].scenes))).ids
    return [[t for i in ids for t in ([i] * VISION_TOKENS if i == image else [i])]] * len(groups)


def _blocks(tokenizer: Tokenizer, rng: random.Random, group: Group, count: int) -> list[_Block]:
    """``count`` questions about a group, the shortest first."""
    ids_of = special_ids(tokenizer)
    asked = ask(rng, group, count, long_share=LONG_SHARE)
    encoded = tokenizer.encode_batch([t for qa in asked for t in (qa.question, qa.answer, qa.conclusion)])
    blocks = [
        _Block(
            [*question.ids, ids_of[ASSISTANT]],
            [*answer.ids, ids_of[EOS]],
            qa.kind,
            # The conclusion of a long answer is a few tokens of many, and the hardest; the end belongs to it.
            max(3, len(conclusion.ids) + 1),
        )
        for qa, question, answer, conclusion in zip(
            asked, encoded[::3], encoded[1::3], encoded[2::3], strict=True
        )
    ]
    return sorted(blocks, key=lambda block: len(block.question) + len(block.answer))


def _fill(prefixes: list[list[int]], rows: list[list[_Block]], slots: list[int], pad: int) -> _Rows:
    """Lay the rows out: the prefix, then each block at the start of its slot."""
    prefix, shape = len(prefixes[0]), (len(rows), len(prefixes[0]) + sum(slots))
    ids, targets = np.full(shape, pad, np.int64), np.full(shape, -100, np.int64)
    weights, generated = np.zeros(shape, np.float32), np.zeros(shape, bool)
    block_of = np.full(shape, -1, np.int64)
    for row, blocks in enumerate(rows):
        ids[row, :prefix] = prefixes[row]
        start = prefix
        for number, (block, tokens) in enumerate(zip(blocks, slots, strict=True)):
            whole, count = block.question + block.answer, len(block.answer)
            ids[row, start : start + len(whole) - 1] = whole[:-1]
            first = start + len(block.question) - 1
            targets[row, first : first + count] = block.answer
            block_of[row, first : first + count] = number
            generated[row, first + 1 : first + count] = True
            weights[row, first : first + count] = count**-0.25
            weights[row, first + max(1, count - block.conclusion) : first + count] *= 3
            start += tokens
    return _Rows(*map(torch.from_numpy, (ids, targets, weights, generated, block_of)))


def _group(prefix: int, lengths: list[int]) -> Packing:
    """Round the ascending block lengths up to a few common ones, so that attention runs as a few products."""
    bounds = [round(len(lengths) * k / BLOCK_GROUPS) for k in range(BLOCK_GROUPS + 1)]
    groups = tuple((b - a, lengths[b - 1]) for a, b in pairwise(bounds) if b > a)
    return Packing(prefix, groups)


def _dropout(
    rng: random.Random, packing: Packing, image_mask: torch.Tensor, generated: torch.Tensor
) -> VisionDropout:
    """Three rows in ten see everything.

    In half of the others every layer keeps the same share, up to 60 % of the vision tokens; in the rest each
    layer is either left whole or keeps hardly anything, as a cut with different rates for layers does.
    """
    kept, whole = [], []
    for _ in range(len(generated)):
        chance = rng.random()
        if chance < 0.3:
            share, left = 1.0, 1.0
        elif chance < 0.65:
            share, left = rng.uniform(0, 0.6), 0.0
        else:
            share, left = 0.3 * rng.random() ** 2, rng.uniform(0.25, 0.75)
        kept.append(share)
        whole.append(left)
    sections = [count * tokens for count, tokens in packing.groups]
    parts = generated[:, packing.prefix :].split(sections, dim=1)
    by_group = tuple(
        part.reshape(len(generated), count, tokens)
        for part, (count, tokens) in zip(parts, packing.groups, strict=True)
    )
    vision = image_mask[: packing.prefix]
    return VisionDropout(torch.tensor(kept), torch.tensor(whole), vision, by_group)
