"""Held-out accuracy of a built-in model, its controls, and what cuts of equal size cost it.

    python -m plphp_cli.builtin.evaluate [--model FOLDER] [--items 400] [--seed 1] [--json FILE]

An answer is right when greedy decoding gives exactly the expected text and then ends; that is so exactly when
every teacher-forced argmax along the expected answer agrees with it, which is how it is measured. A cut arm
keeps the same number of bytes per prompt as PLPHP does on that prompt.
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from plphp_cli.attention import prune
from plphp_cli.builtin.questions import DROPPED, LONG_ANSWER_TOKENS, QA, Group, ask, sample_group
from plphp_cli.builtin.scenes import SIZE, Split, render
from plphp_cli.config import PLPHPConfig
from plphp_cli.images import LoadedImage
from plphp_cli.models import LoadedModel, default_config, load, prepare
from plphp_cli.prefilling import Prefilled, prefill
from plphp_cli.pruning import HeadOnlyPolicy, LayerOnlyPolicy, Policy, RandomPolicy, UniformPolicy
from plphp_cli.quality import along

RANDOM_SEEDS = 5
UNPRUNED, PLPHP, LAYER_ONLY, HEAD_ONLY, UNIFORM = "unpruned", "plphp", "layer-only", "head-only", "uniform"
RANDOM = tuple(f"random {seed}" for seed in range(RANDOM_SEEDS))
BLANK, WRONG = "blank image", "wrong image"
ARMS = (UNPRUNED, PLPHP, LAYER_ONLY, HEAD_ONLY, UNIFORM, *RANDOM)


@dataclass(frozen=True)
class Item:
    """One held-out question with its images."""

    group: Group
    qa: QA


@dataclass(frozen=True)
class Outcome:
    """What one arm made of one item: exact match, right tokens and nats over tokens 2..T of the answer."""

    exact: bool
    later_right: int
    later_nats: float


@dataclass
class Result:
    """One item with the outcome of every arm and control."""

    kind: str
    images: int
    answer_tokens: int
    gamma: tuple[float | None, ...] = ()
    kv_ratios: dict[str, float] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)


def draw_items(count: int, images: Sequence[int], seed: int, split: Split = "held-out") -> list[Item]:
    """``count`` questions, each about images of its own; three in five of a kind with long answers."""
    rng = random.Random(seed)
    items = []
    for number in range(count):
        group = sample_group(rng, split, images[number % len(images)])
        (qa,) = ask(rng, group, 1, long_share=0.7)
        while qa.kind in DROPPED:
            (qa,) = ask(rng, group, 1, long_share=0.7)
        items.append(Item(group, qa))
    return items


def pictures(group: Group) -> list[LoadedImage]:
    """The images of a group as the command line would load them."""
    drawn = (render(scene, seed)[0] for scene, seed in zip(group.scenes, group.seeds, strict=True))
    return [LoadedImage(image, f"image {n}", image.size, (), "") for n, image in enumerate(drawn, 1)]


def blanks(count: int) -> list[LoadedImage]:
    """Images that show nothing."""
    blank = Image.new("RGB", (2 * SIZE, 2 * SIZE), (230, 230, 230))
    return [LoadedImage(blank, f"image {n}", blank.size, (), "") for n in range(1, count + 1)]


def evaluate(loaded: LoadedModel, items: list[Item], config: PLPHPConfig) -> Iterator[Result]:
    """Every arm and both controls on every item, one result at a time."""
    for number, item in enumerate(items):
        answer = answer_ids(loaded, item.qa)
        result = Result(item.qa.kind, len(item.group.scenes), len(answer))
        with prune(loaded.model, None, keep_attention=True) as pruner:

            def prefilled(images: list[LoadedImage], question: str = item.qa.question) -> Prefilled:
                return prefill(loaded, prepare(loaded, images, question), pruner, len(answer))  # noqa: B023

            whole = prefilled(pictures(item.group))
            for name, policy in arms(whole, config):
                cut = whole.cut(policy, len(answer))
                if name == PLPHP:
                    result.gamma = tuple(layer.gamma for layer in cut.state.layers)
                held, full = (
                    sum(getattr(layer, which) for layer in cut.state.layers)
                    for which in ("held_bytes", "full_bytes")
                )
                result.kv_ratios[name] = held / full
                result.outcomes[name] = judge(loaded, cut, answer)
            result.outcomes[BLANK] = judge(loaded, prefilled(blanks(result.images)), answer)
            others = (other for other in items[number + 1 :] + items[:number] if other.qa != item.qa)
            wrong = next((o for o in others if len(o.group.scenes) == result.images), None)
            if wrong is not None:
                result.outcomes[WRONG] = judge(loaded, prefilled(pictures(wrong.group)), answer)
        yield result


def arms(whole: Prefilled, config: PLPHPConfig) -> Iterator[tuple[str, PLPHPConfig | Policy | None]]:
    """All arms on one prompt, the ablations at PLPHP's own mean rate on that prompt."""
    yield UNPRUNED, None
    yield PLPHP, config
    states = whole.cut(config).state.layers
    rates = [layer.rate for layer in states if layer.rate is not None]
    rate = statistics.fmean(rates) if rates else 1.0
    yield LAYER_ONLY, LayerOnlyPolicy(config)
    yield HEAD_ONLY, HeadOnlyPolicy(rate)
    yield UNIFORM, UniformPolicy(rate)
    for seed, name in enumerate(RANDOM):
        yield name, RandomPolicy(rate, seed)


def answer_ids(loaded: LoadedModel, qa: QA) -> list[int]:
    """The expected answer's tokens, end of sequence included."""
    tokenizer: Any = loaded.processor.tokenizer
    return [*tokenizer(qa.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def judge(loaded: LoadedModel, prefilled: Prefilled, answer: Sequence[int]) -> Outcome:
    """Hold the expected answer against what the model expects along it."""
    logits = along(loaded, prefilled, answer)
    right = [best == wanted for best, wanted in zip(logits.argmax(-1).tolist(), answer, strict=True)]
    logs = logits.log_softmax(-1)
    nats = -sum(float(logs[place, wanted]) for place, wanted in enumerate(answer) if place)
    return Outcome(all(right), sum(right[1:]), nats)


Subset = Callable[[Result], bool]
SUBSETS: dict[str, Subset] = {
    "all": lambda result: True,
    "single image": lambda result: result.images == 1,
    "several images": lambda result: result.images > 1,
    "captions": lambda result: result.kind == "caption",
    "long answers": lambda result: result.answer_tokens >= LONG_ANSWER_TOKENS,
}


def exact_match(results: Sequence[Result], arm: str) -> float | None:
    """Share of items that an arm answers exactly; None of no items."""
    known = [result.outcomes[arm].exact for result in results if arm in result.outcomes]
    return statistics.fmean(known) if known else None


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """Everything that the tables show, as plain numbers."""
    report: dict[str, Any] = {
        "items": len(results),
        "long_answer_share": statistics.fmean(SUBSETS["long answers"](r) for r in results),
        "kv_ratio_mean": statistics.fmean(r.kv_ratios[PLPHP] for r in results),
        "kv_ratio_max": max(r.kv_ratios[PLPHP] for r in results),
        "kv_ratio_by_arm": {arm: statistics.fmean(r.kv_ratios[arm] for r in results) for arm in ARMS},
        "gamma_mean": [statistics.fmean(g) for g in zip(*(r.gamma for r in results), strict=True)],
        "exact_match": {},
        "later_tokens": {},
        "by_kind": {},
    }
    for name, holds in SUBSETS.items():
        chosen = [r for r in results if holds(r)]
        row = {arm: exact_match(chosen, arm) for arm in (*ARMS, BLANK, WRONG)}
        row["random mean"], row["random sd"] = _spread([row[arm] for arm in RANDOM])
        report["exact_match"][name] = {"items": len(chosen), **row}
    later = sum(r.answer_tokens - 1 for r in results)
    for arm in ARMS:
        outcomes = [r.outcomes[arm] for r in results]
        report["later_tokens"][arm] = {
            "accuracy": sum(o.later_right for o in outcomes) / later,
            "nats_per_token": sum(o.later_nats for o in outcomes) / later,
        }
    for several in (False, True):
        for kind in sorted({r.kind for r in results}):
            chosen = [r for r in results if r.kind == kind and (r.images > 1) == several]
            if chosen:
                row = {arm: exact_match(chosen, arm) for arm in (UNPRUNED, PLPHP, UNIFORM, BLANK)}
                row["random mean"], _ = _spread([exact_match(chosen, arm) for arm in RANDOM])
                name = f"{kind}, several images" if several else kind
                report["by_kind"][name] = {"items": len(chosen), **row}
    return report


def _spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    known = [value for value in values if value is not None]
    return (statistics.fmean(known), statistics.stdev(known)) if len(known) > 1 else (None, None)


def tables(report: dict[str, Any]) -> str:
    """The summary as Markdown."""
    most = max(ratio for arm, ratio in report["kv_ratio_by_arm"].items() if arm not in (UNPRUNED, PLPHP))
    lines = [
        f"{report['items']} held-out items, {report['long_answer_share']:.0%} with answers of "
        f"{LONG_ANSWER_TOKENS} tokens or more. KV bytes held under PLPHP: {report['kv_ratio_mean']:.1%} of "
        f"unpruned on average, {report['kv_ratio_max']:.1%} at most; under the other cuts on "
        f"average up to {most:.1%}, since each layer rounds up.",
        "",
        "| exact match | items | unpruned | PLPHP | layer-only | head-only | uniform | random (sd of seeds) "
        "| blank image | wrong image |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in report["exact_match"].items():
        cells = [_share(row[arm]) for arm in (UNPRUNED, PLPHP, LAYER_ONLY, HEAD_ONLY, UNIFORM)]
        cells.append(f"{_share(row['random mean'])} ({_share(row['random sd'])})")
        cells += [_share(row[BLANK]), _share(row[WRONG])]
        lines.append(f"| {name} | {row['items']} | {' | '.join(cells)} |")
    lines += ["", "| tokens 2..T of the expected answer | accuracy | nats per token |", "|---|---|---|"]
    for arm, row in report["later_tokens"].items():
        lines.append(f"| {arm} | {row['accuracy']:.4f} | {row['nats_per_token']:.4f} |")
    lines += [
        "",
        "| kind | items | unpruned | PLPHP | uniform | random | blank image |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, row in report["by_kind"].items():
        cells = [_share(row[arm]) for arm in (UNPRUNED, PLPHP, UNIFORM, "random mean", BLANK)]
        lines.append(f"| {kind} | {row['items']} | {' | '.join(cells)} |")
    gammas = ", ".join(f"{gamma:.2f}" for gamma in report["gamma_mean"])
    lines += ["", f"Mean gamma per layer: {gammas}."]
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "N/A" if value is None else f"{value:.3f}"


def main() -> None:
    """Evaluate from the command line."""
    parser = argparse.ArgumentParser(prog="python -m plphp_cli.builtin.evaluate", description=__doc__)
    parser.add_argument("--model", default="builtin", help="builtin, or the folder of another training")
    parser.add_argument("--items", type=int, default=400, help="with one image, and as many with several")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--config", type=Path, help="setting to judge; the model's own by default")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    loaded = load(arguments.model, dtype="float32")
    config = PLPHPConfig.from_file(arguments.config) if arguments.config else default_config(loaded)
    items = draw_items(arguments.items, (1,), arguments.seed)
    items += draw_items(arguments.items, (2, 2, 3), arguments.seed + 1)
    results = []
    for result in evaluate(loaded, items, config):
        results.append(result)
        if len(results) % 50 == 0:
            print(f"{len(results)} of {len(items)}", file=sys.stderr)
    report = summary(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(tables(report))


if __name__ == "__main__":
    main()
