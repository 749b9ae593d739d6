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
from plphp_cli.builtin.questions import ask, caption, sample_group
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
    if told:
        prefixes = [
            tokenizer.encode(described_prefix(system, [caption(s) for s in g.scenes])).ids for g in groups
        ]
        width = max(map(len, prefixes))
        filler = tokenizer.encode("\n").ids
        prefixes = [ids + filler * (width - len(ids)) for ids in prefixes]
    else:
        ids = tokenizer.encode(prefix_text(system, images)).ids
        wide = [t for i in ids for t in ([i] * VISION_TOKENS if i == ids_of[IMAGE] else [i])]
        prefixes = [wide] * rows
    prefix = len(prefixes[0])

    rows_of_blocks = []
    for group in groups:
        asked = ask(rng, group, blocks, long_share=LONG_SHARE)
        texts = [text for qa in asked for text in (qa.question, qa.answer, qa.conclusion)]
        encoded = tokenizer.encode_batch(texts)
        pairs = [
            ([*question.ids, ids_of[ASSISTANT]], [*answer.ids, ids_of[EOS]], qa.kind, len(conclusion.ids) + 1)
            for qa, question, answer, conclusion in zip(
                asked, encoded[::3], encoded[1::3], encoded[2::3], strict=True
            )
        ]
        rows_of_blocks.append(sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1])))
    lengths = [max(len(row[k][0]) + len(row[k][1]) - 1 for row in rows_of_blocks) for k in range(blocks)]
    packing = _group(prefix, lengths)
    slots = [tokens for count, tokens in packing.groups for _ in range(count)]

    total = prefix + sum(slots)
    token_ids = np.full((rows, total), ids_of[PAD], np.int64)
    targets = np.full((rows, total), -100, np.int64)
    weights = np.zeros((rows, total), np.float32)
    generated = np.zeros((rows, total), bool)
    block_of = np.full((rows, total), -1, np.int64)
    positions = np.arange(prefix)
    positions = np.concatenate([positions, *(prefix + np.arange(tokens) for tokens in slots)])
    for row, pairs in enumerate(rows_of_blocks):
        token_ids[row, :prefix] = prefixes[row]
        start = prefix
        for number, ((question, answer, _, end), tokens) in enumerate(zip(pairs, slots, strict=True)):
            whole = question + answer
            token_ids[row, start : start + len(whole) - 1] = whole[:-1]
            first = start + len(question) - 1
            targets[row, first : first + len(answer)] = answer
            block_of[row, first : first + len(answer)] = number
            generated[row, first + 1 : first + len(answer)] = True
            weights[row, first : first + len(answer)] = len(answer) ** -0.25
            # The conclusion of a long answer is a few tokens of many, and the hardest.
            weights[row, first + max(1, len(answer) - max(3, end)) : first + len(answer)] *= 3
            start += tokens
    image_mask = torch.from_numpy(token_ids[0] == ids_of[IMAGE])
    if dropout and not told:
        packing = replace(packing, dropout=_dropout(rng, packing, image_mask, torch.from_numpy(generated)))
    drawn = None
    if not told:
        scenes = [scene for group in groups for scene in group.scenes]
        drawn = draw_batch(scenes, [seed for group in groups for seed in group.seeds], rng)
    return Batch(
        ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(positions).expand(rows, -1),
        targets=torch.from_numpy(targets),
        weights=torch.from_numpy(weights),
        blocks=torch.from_numpy(block_of),
        packing=packing,
        image_mask=image_mask,
        pixels=None if drawn is None else drawn[0],
        kinds=[[kind for _, _, kind, _ in pairs] for pairs in rows_of_blocks],
        placed=[] if drawn is None else drawn[1],
    )


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
