"""Laws of the built-in model's recipe: splits, answers, pictures, packing, spelling."""

import random
import re

import numpy as np
import pytest
import torch

from plphp_cli.builtin.attention_training import NAME, Packing, VisionDropout, training_attention
from plphp_cli.builtin.batches import sample_batch
from plphp_cli.builtin.dialogue import SYSTEM_PROMPTS, prefix_text, processor, train_tokenizer
from plphp_cli.builtin.questions import ask, sample_change, sample_group
from plphp_cli.builtin.scenes import CELLS, SIZE, render, sample_scene
from plphp_cli.builtin.tower import CLASSES, dense_targets
from plphp_cli.builtin.train_model import Learner, exact_matches, hidden_states


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(seed=0, prompts=300)


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_every_scene_of_a_split_belongs_to_it_by_its_content_alone(split):
    rng = random.Random(1)
    scenes = [sample_scene(rng, split) for _ in range(150)]
    for images in (1, 2, 3):
        scenes += sample_group(rng, split, images).scenes
    scenes += sample_change(rng, split)
    assert {scene.split for scene in scenes} == {split}


def test_a_change_leaves_every_other_pixel_as_it_was():
    rng = random.Random(2)
    for _ in range(20):
        before, after = sample_change(rng, "train")
        seed = rng.getrandbits(40)
        pictures = [np.asarray(render(scene, seed)[0]).astype(int) for scene in (before, after)]
        changed = {item.cell for item in set(before.items) ^ set(after.items)}
        for cell in set(range(9)) - changed:
            rows = slice(cell // 3 * 64 + 1, cell // 3 * 64 + 63)
            columns = slice(cell % 3 * 64 + 1, cell % 3 * 64 + 63)
            assert (pictures[0][rows, columns] == pictures[1][rows, columns]).all()


def test_dense_targets_name_what_the_patch_at_an_items_centre_shows():
    rng = random.Random(3)
    scenes = [sample_scene(rng, "train") for _ in range(20)]
    placed = [(scene, render(scene, rng.getrandbits(40))[1]) for scene in scenes]
    targets = dense_targets(placed)
    for index, (scene, boxes) in enumerate(placed):
        for item, box in zip(scene.items, boxes, strict=False):
            patch = int(box.y // 8) * 12 + int(box.x // 8)
            assert 0 < targets.classes["kind"][index, patch] < CLASSES["kind"] - 1
            assert targets.classes["size"][index, patch] == 1 + (item.size == "large")
        empty = targets.classes["kind"][index] == 0
        assert (targets.classes["color"][index] == 0).equal(empty)


def _answer_by_plain_reading(scene, question):
    """What a reader of the symbolic scene would answer to the short questions, by brute force."""
    shape = re.search(r"(circle|square|triangle|star|cross)(?!es|s)", question)
    place = next((c for c in sorted(CELLS, key=len, reverse=True) if f"at the {c}" in question), None)
    named = [i for i in scene.items if shape and i.shape == shape.group()] if shape else []
    if place:
        named = [i for i in scene.items if i.place == place]
    return named


def test_short_answers_are_what_a_plain_reading_of_the_scene_gives():
    rng = random.Random(4)
    checked = 0
    for _ in range(150):
        group = sample_group(rng, "train", 1)
        for qa in ask(rng, group, 6, long_share=0):
            named = _answer_by_plain_reading(group.scenes[0], qa.question)
            if qa.kind in ("color", "size") or (qa.kind == "shape" and "at the" in qa.question):
                assert [getattr(i, qa.kind) for i in named] == [qa.answer]
            elif qa.kind == "where":
                assert [i.place for i in named] == [qa.answer]
            elif qa.kind == "count":
                assert qa.answer == str(len(group.scenes[0].items))
            else:
                continue
            checked += 1
    assert checked > 300


@pytest.mark.parametrize(("images", "told"), [(1, False), (3, False), (1, True)])
def test_a_packed_row_equals_its_questions_asked_one_by_one(tokenizer, images, told):
    learner = Learner(tokenizer, seed=0)
    batch = sample_batch(tokenizer, random.Random(5), rows=2, blocks=6, images=images, told=told)
    packed = hidden_states(learner, batch)[-1]
    model = learner.llava.model
    embeds = model.get_input_embeddings()(batch.ids)
    if batch.pixels is not None:
        seen = model.multi_modal_projector(learner.features(batch.pixels)).reshape(2, -1, embeds.shape[-1])
        embeds[:, batch.image_mask] = seen
    model.language_model.set_attn_implementation("sdpa")
    prefix, start = batch.packing.prefix, batch.packing.prefix
    for count, tokens in batch.packing.groups:
        for _ in range(count):
            block = slice(start, start + tokens)
            alone = torch.cat([embeds[:, :prefix], embeds[:, block]], dim=1)
            hidden = model.language_model(inputs_embeds=alone).last_hidden_state[:, prefix:]
            torch.testing.assert_close(packed[:, block], hidden, atol=1e-4, rtol=1e-3)
            start += tokens
    assert start == batch.ids.shape[1]
    model.language_model.set_attn_implementation(NAME)
    assert sum(map(len, exact_matches(learner, batch).values())) == 2 * 6


@pytest.mark.parametrize(("share", "whole"), [(None, 0.0), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_packed_attention_hides_vision_from_generated_tokens_alone(share, whole):
    prefix, groups = 9, ((2, 3), (1, 5))
    vision = torch.zeros(prefix, dtype=torch.bool)
    vision[2:7] = True
    lengths = [tokens for count, tokens in groups for _ in range(count)]
    total = prefix + sum(lengths)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, total, 4, generator=generator) for heads in (4, 2, 2))
    generated = tuple(torch.rand(2, *group, generator=generator) < 0.5 for group in groups)
    shares = None if share is None else (torch.full((2,), share), torch.full((2,), whole))
    dropout = None if shares is None else VisionDropout(*shares, vision, generated)
    packed, _ = training_attention(None, query, key, value, None, 0.5, Packing(prefix, groups, dropout))

    late = torch.cat([torch.zeros(2, prefix, dtype=torch.bool), *(g.flatten(1) for g in generated)], dim=1)
    visible = torch.zeros(2, total, total, dtype=torch.bool)
    visible[:, :prefix, :prefix] = torch.ones(prefix, prefix).tril().bool()
    start = prefix
    for length in lengths:
        own = slice(start, start + length)
        visible[:, own, :prefix] = True
        visible[:, own, own] = torch.ones(length, length).tril().bool()
        start += length
    if share == 0 and not whole:
        visible[:, :, :prefix] &= ~(late[:, :, None] & vision)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, visible[:, None], scale=0.5, enable_gqa=True
    )
    torch.testing.assert_close(packed, expected.transpose(1, 2))


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_dropout_leaves_its_share_of_vision_tokens_in_every_head(share):
    torch.manual_seed(0)
    vision = torch.arange(400) % 4 != 3
    dropout = VisionDropout(torch.full((64,), share), torch.full((64,), 0.5), vision, ())
    hidden = dropout.hidden(2).view(64, 2, 400)
    assert not hidden[:, :, ~vision].any()
    seen = 1 - hidden[:, :, vision].float().mean(-1)
    whole = (seen == 1).all(-1)
    assert 0.25 < whole.float().mean() < 0.75
    assert (seen[~whole] - share).abs().max() < 0.12
    # Either scattered or a run: along a run visibility changes twice at most.
    changes = (hidden[:, :, vision].diff(dim=-1)).sum(-1)[~whole]
    assert (changes <= 2).any()
    assert (changes > 20).any()


def test_training_spells_prompts_as_the_chat_template_does(tokenizer):
    wrapped = processor(tokenizer)
    for images in (0, 1, 3):
        content = [{"type": "image"}] * images + [{"type": "text", "text": "Where is the STAR?"}]
        for system in (None, SYSTEM_PROMPTS[2]):
            messages = [{"role": "user", "content": content}]
            if system:
                messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
            text = wrapped.apply_chat_template(messages, add_generation_prompt=True)
            spelt = prefix_text(system or SYSTEM_PROMPTS[0], images) + "where is the star?<|assistant|>"
            assert tokenizer.encode(text).ids == tokenizer.encode(spelt).ids


def test_the_image_processor_sees_what_training_drew():
    rng = random.Random(6)
    image, _ = render(sample_scene(rng, "train"), 1)
    wrapped = processor(train_tokenizer(seed=0, prompts=20))
    from plphp_cli.builtin.tower import to_pixels

    processed = wrapped.image_processor(image, return_tensors="np")["pixel_values"][0]
    assert processed.shape == (3, SIZE, SIZE)
    np.testing.assert_allclose(processed, to_pixels(image), atol=1e-5)
