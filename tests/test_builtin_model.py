"""The shipped model: what the package promises of it."""

import json
import re
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from plphp_cli.builtin import choose
from plphp_cli.builtin.evaluate import PLPHP, UNPRUNED, answer_ids, draw_items, evaluate, pictures
from plphp_cli.dataset import read_examples
from plphp_cli.decoding import Done
from plphp_cli.generate import PrefillDone, stream
from plphp_cli.images import load_image
from plphp_cli.models import default_config, load, prepare
from plphp_cli.models.sources import BUILTIN_FOLDER
from plphp_cli.sampling import Settings

SAMPLES = Path(__file__).parents[1] / "sample_images" / "prompts.jsonl"
EXAMPLES = read_examples(SAMPLES)
MEBI = 1 << 20


@cache
def model():
    return load("builtin")


def run(prompt, policy):
    events = list(stream(model(), prompt, policy, Settings(max_new_tokens=96)))
    return next(e for e in events if isinstance(e, PrefillDone)), next(
        e for e in events if isinstance(e, Done)
    )


def test_stock_transformers_load_it_without_custom_code_and_it_is_small():
    assert (BUILTIN_FOLDER / "model.safetensors").stat().st_size <= 12 * MEBI
    assert not list(BUILTIN_FOLDER.glob("*.py"))
    stock = AutoModelForImageTextToText.from_pretrained(BUILTIN_FOLDER, dtype=torch.float32)
    assert type(stock).__module__.startswith("transformers.")
    processor = AutoProcessor.from_pretrained(BUILTIN_FOLDER)
    assert type(processor).__module__.startswith("transformers.")
    ours = model().model.state_dict()
    assert all(torch.equal(weight, ours[name]) for name, weight in stock.state_dict().items())


def test_its_config_is_calibrated_on_it():
    config = default_config(model())
    assert config.calibrated
    assert "builtin" in (config.calibrated_on or "")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: f"line {e.line}")
def test_samples_are_right_under_pruning_where_unpruned_is_and_hold_half_the_cache(example):
    prompt = prepare(model(), [load_image(path) for path in example.images], example.prompt)
    done_unpruned = run(prompt, None)[1]
    prefilled, done = run(prompt, default_config(model()))
    held = sum(layer.held_bytes for layer in prefilled.layers)
    assert held <= 0.5 * sum(layer.full_bytes for layer in prefilled.layers)
    assert done.token_ids[0] == done_unpruned.token_ids[0]
    if done_unpruned.text == example.answer:
        assert done.text == example.answer


def test_half_of_the_samples_have_long_answers_and_unpruned_answers_nearly_all():
    tokenizer = model().processor.tokenizer
    long = [e for e in EXAMPLES if len(tokenizer(e.answer, add_special_tokens=False).input_ids) >= 11]
    assert len(long) >= len(EXAMPLES) // 2
    right = 0
    for example in EXAMPLES:
        prompt = prepare(model(), [load_image(path) for path in example.images], example.prompt)
        right += run(prompt, None)[1].text == example.answer
    assert right >= 0.9 * len(EXAMPLES)


def test_exact_match_by_teacher_forcing_is_what_greedy_decoding_gives():
    items = draw_items(6, (1, 2), seed=5)
    config = default_config(model())
    for item, result in zip(items, evaluate(model(), items, config), strict=True):
        prompt = prepare(model(), pictures(item.group), item.qa.question)
        for arm, policy in ((UNPRUNED, None), (PLPHP, config)):
            done = run(prompt, policy)[1]
            assert result.outcomes[arm].exact == (list(done.token_ids) == answer_ids(model(), item.qa))


def test_the_setting_is_the_best_of_those_that_hold_half_of_the_cache(monkeypatch):
    monkeypatch.setattr(choose, "PROMPTS", 6)
    monkeypatch.setattr(choose, "SURVEYED", 4)
    candidates = choose.choose(model(), seed=3)
    assert {c.record.config.scope for c in candidates} == {"prompt", "image"}
    assert all(c.kv_ratio <= c.kv_ratio_max <= choose.KV_RATIO_MAX for c in candidates)
    best = max(c.exact for c in candidates)
    assert candidates[0].exact == best
    assert candidates[0].nats == min(c.nats for c in candidates if c.exact == best)


def test_the_share_of_the_cache_that_a_setting_holds_is_foretold_exactly():
    config = default_config(model())
    for item, scope in product(draw_items(4, (1, 2), seed=6), ("prompt", "image")):
        config = config.replace(scope=scope, r=0.19, delta_r=0.05)
        prompt = prepare(model(), pictures(item.group), item.qa.question)
        layers = run(prompt, config)[0].layers
        real = sum(layer.held_bytes for layer in layers) / sum(layer.full_bytes for layer in layers)
        assert choose.kv_ratio(choose.shape(model(), item), config) == pytest.approx(real, rel=1e-9)


def test_the_card_tells_what_the_figures_file_holds():
    card = (BUILTIN_FOLDER / "README.md").read_text(encoding="utf-8")
    figures = json.loads((BUILTIN_FOLDER / "evaluation.json").read_text(encoding="utf-8"))
    row = figures["exact_match"]["all"]
    cells = f"| all | {row['items']} | {row['unpruned']:.3f} | {row['plphp']:.3f} |"
    assert cells in card


def test_what_ships_tells_no_place_on_the_machine_that_made_it():
    for name in ("README.md", "evaluation.json", "plphp_config.json", "config.json"):
        text = (BUILTIN_FOLDER / name).read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w./])/(home|mnt|opt|root|tmp|usr|var|work)/", text), name
