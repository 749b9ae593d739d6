"""The setting that a trained model ships with, chosen on training scenes.

Of the settings that hold at most about half of the cache, on average and at most, the one that answers most
prompts exactly, then the one with the least nats. Tried are: none, one or two exempt layers in the order of
their need, with both scopes and three distances between the rates of attentive and indifferent layers; and
every set of three exempt layers. r follows from the bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from plphp_cli.attention import prune
from plphp_cli.builtin.architecture import VISION_TOKENS
from plphp_cli.builtin.evaluate import Item, answer_ids, draw_items, judge, pictures
from plphp_cli.calibration import CalibrationRecord, Survey, settle, survey
from plphp_cli.config import SCOPES, PLPHPConfig
from plphp_cli.models import LoadedModel, prepare
from plphp_cli.prefilling import prefill
from plphp_cli.pruning import allocate, retained

PROMPTS = 120
SURVEYED = 48
KV_RATIO_MEAN, KV_RATIO_MAX = 0.475, 0.51
EXEMPT = 3
SPREADS = (0.3, 0.6, 0.9)
"""delta_r as a share of r."""


@dataclass(frozen=True)
class Candidate:
    """One setting on the training prompts: cache held (mean and largest share), exact match, nats a token."""

    record: CalibrationRecord
    kv_ratio: float
    kv_ratio_max: float
    exact: float
    nats: float


@dataclass(frozen=True)
class Shape:
    """One prompt as the cut sees it: its tokens, the vision tokens of each image, gamma per layer."""

    tokens: int
    images: tuple[int, ...]
    gamma: tuple[float | None, ...]


def choose(
    loaded: LoadedModel, seed: int, progress: Callable[[str], None] = lambda line: None
) -> list[Candidate]:
    """All candidates, best first.

    Args:
        loaded: the trained model, in float32 on the CPU.
        seed: of the training scenes drawn.
        progress: told what is being done.
    """
    half = PROMPTS // 2
    items = draw_items(half, (1,), seed, "train") + draw_items(half, (2, 2, 3), seed + 1, "train")
    progress(f"gamma and need on {SURVEYED} prompts")
    surveyed = _mixed(items, SURVEYED)
    found = survey(loaded, [prepare(loaded, pictures(i.group), i.qa.question) for i in surveyed])
    progress(f"gamma on {len(items)} prompts")
    shapes = [shape(loaded, item) for item in items]
    settings = list(_settings(found, shapes))
    progress(f"{len(settings)} settings on {len(items)} prompts")
    exact: list[list[bool]] = [[] for _ in settings]
    nats: list[list[float]] = [[] for _ in settings]
    for item in items:
        answer = answer_ids(loaded, item.qa)
        with prune(loaded.model, None, keep_attention=True) as pruner:
            prompt = prepare(loaded, pictures(item.group), item.qa.question)
            whole = prefill(loaded, prompt, pruner, len(answer))
            for number, record in enumerate(settings):
                outcome = judge(loaded, whole.cut(record.config, len(answer)), answer)
                exact[number].append(outcome.exact)
                nats[number].append(outcome.later_nats / max(1, len(answer) - 1))
    candidates = []
    for record, hits, losses in zip(settings, exact, nats, strict=True):
        ratios = [kv_ratio(prompt, record.config) for prompt in shapes]
        held = statistics.fmean(ratios), max(ratios)
        candidates.append(Candidate(record, *held, statistics.fmean(hits), statistics.fmean(losses)))
    return sorted(candidates, key=lambda candidate: (-candidate.exact, candidate.nats))


def kv_ratio(prompt: Shape, config: PLPHPConfig) -> float:
    """The share of its cache that a prompt would hold under ``config``."""
    vision = sum(prompt.images)
    parts = prompt.images if config.scope == "image" else (vision,)
    held = 0
    for layer, gamma in enumerate(prompt.gamma):
        exempt = gamma is None or layer in config.skip_layers
        rate = 1.0 if exempt or gamma is None else allocate(gamma, config)[1]
        held += prompt.tokens - vision + sum(retained(rate, part) for part in parts)
    return held / (prompt.tokens * len(prompt.gamma))


def _settings(found: Survey, shapes: Sequence[Shape]) -> Iterator[CalibrationRecord]:
    """Per number of exempt layers and spread, the setting with the largest r that still fits."""
    need = settle(found, PLPHPConfig()).need
    ranking = sorted((n for n in range(len(need)) if need[n] is not None), key=lambda n: -(need[n] or 0))
    bases = [
        (PLPHPConfig(skip_layers=tuple(ranking[:count]), scope=scope), spread)
        for count, spread, scope in product(range(EXEMPT), SPREADS, SCOPES)
    ]
    bases += [
        (PLPHPConfig(skip_layers=layers), SPREADS[1]) for layers in combinations(sorted(ranking), EXEMPT)
    ]
    seen = set()
    for base, spread in bases:
        fitting = _largest(found, shapes, base, spread)
        if fitting is not None and fitting.config not in seen:
            seen.add(fitting.config)
            yield fitting


def _largest(
    found: Survey, shapes: Sequence[Shape], base: PLPHPConfig, spread: float
) -> CalibrationRecord | None:
    """The setting with the largest r that holds no more than it may."""
    fitting = None
    for step in range(1, 100):
        r = step / 100
        record = settle(found, base.replace(r=r, delta_r=round(r * spread, 4)))
        ratios = [kv_ratio(prompt, record.config) for prompt in shapes]
        if max(ratios) > KV_RATIO_MAX or statistics.fmean(ratios) > KV_RATIO_MEAN:
            break
        fitting = record
    return fitting


def shape(loaded: LoadedModel, item: Item) -> Shape:
    """The shape of an item's prompt."""
    with prune(loaded.model, None, keep_attention=True) as pruner:
        prompt = prepare(loaded, pictures(item.group), item.qa.question)
        whole = prefill(loaded, prompt, pruner)
        states = whole.cut(PLPHPConfig()).state.layers
    images = (VISION_TOKENS,) * len(item.group.scenes)
    return Shape(prompt.prompt_tokens, images, tuple(layer.gamma for layer in states))


def _mixed(items: Sequence[Item], count: int) -> list[Item]:
    """``count`` of the items, evenly spread, so that one and several images are both among them."""
    return [items[number * len(items) // count] for number in range(count)]


def table(candidates: Sequence[Candidate], most: int = 20) -> str:
    """The best candidates as Markdown."""
    lines = [
        "| layers never cut | r | delta_r | scope | cache held, mean (max) | exact match | nats per token |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in candidates[:most]:
        config = found.record.config
        exempt = ", ".join(map(str, config.skip_layers)) or "none"
        held = f"{found.kv_ratio:.1%} ({found.kv_ratio_max:.1%})"
        knobs = f"{exempt} | {config.r:.2f} | {config.delta_r:.3f} | {config.scope}"
        lines.append(f"| {knobs} | {held} | {found.exact:.3f} | {found.nats:.4f} |")
    return "\n".join(lines)
