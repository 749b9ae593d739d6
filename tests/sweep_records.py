"""Hand-made and realistic records of sweeps, for the tests of what is made from them."""

import hashlib
import itertools
import math
import random
from dataclasses import replace

from plphp_cli.config import PLPHPConfig
from plphp_cli.sweep.ablations import ablations
from plphp_cli.sweep.coverage import coverage
from plphp_cli.sweep.points import points
from plphp_cli.sweep.recommendation import recommend
from plphp_cli.sweep.records import (
    HEAD_ONLY,
    LAYER_ONLY,
    METHODS,
    PLPHP,
    RANDOM,
    UNIFORM,
    Constraint,
    Cost,
    PromptRecord,
    Row,
    Skipped,
    SweepRecord,
)

KIB = 1024
MAX_KL = Constraint("kl", 0.05)
HOSTILE = '</script><script>alert(1)</script><img src="http://x/y.png">&\x1b[2J\u2028'
# What a method costs beside PLPHP.
FACTORS = {PLPHP: 1.0, LAYER_ONLY: 1.5, HEAD_ONLY: 1.02, UNIFORM: 1.6, RANDOM: 4.0}


def prompt(number: int, correct: bool | None = None) -> PromptRecord:
    answer = None if correct is None else "red"
    return PromptRecord(
        f"p{number}", number + 1, f"question {number}", None, answer, (), 136, 100, "red", correct
    )


def row(
    number: int,
    config: PLPHPConfig | None = None,
    *,
    method: str = PLPHP,
    seed: int | None = None,
    ratio: float = 0.5,
    kl: float | None = 0.01,
    agreement: float | None = 1.0,
    correct: bool | None = None,
    rate: float | None = None,
) -> Row:
    """One setting on prompt `number`, whose full cache has 1000 bytes."""
    return Row(
        method=method,
        config=config or (None if method == "unpruned" else PLPHPConfig()),
        seed=seed,
        prompt_id=f"p{number}",
        prompt_index=number,
        rate=None,
        kv_bytes_held=round(1000 * ratio),
        kv_bytes_full=1000,
        kv_ratio=ratio,
        kl_mean=kl,
        kl_max=None if kl is None else 3 * kl,
        top1_agreement=None if kl is None else agreement,
        first_divergence=None,
        answer_tokens=1 if kl is None else 9,
        answer=None,
        answer_correct=correct,
        decode_tokens_per_s=rate,
        cut_id=None,
        model="toy",
        tool_version="0",
    )


def rows_of(config, ratio, kl, prompts=10, **others):
    """One setting over prompts; a KL per prompt, or one for all."""
    kls = kl if isinstance(kl, list) else [kl] * prompts
    return [row(number, config, ratio=ratio, kl=one, **others) for number, one in enumerate(kls)]


def named(found, config, method="plphp"):
    return next(p for p in found if p.setting.config == config and p.setting.method == method)


def grid(r=(0.4,), delta_r=(0.3,), alpha=(0.25,), beta=(0.1,), **others) -> list[PLPHPConfig]:
    every = itertools.product(r, delta_r, alpha, beta)
    return [PLPHPConfig(*knobs, **others) for knobs in every if knobs[2] >= knobs[3]]


ALPHAS = grid(alpha=(0.1, 0.2, 0.3, 0.4, 0.5))


def realistic_rows(configs, prompts, methods=(PLPHP,), seeds=5, layers=10) -> list[Row]:
    """Rows as a small model might give them: rates by the rule, KL growing as less is kept."""
    rows = []
    for number, one in enumerate(prompts):
        draw = random.Random(number)
        gammas = [min(1.0, draw.gammavariate(2.0, 0.12)) for _ in range(layers)]
        hardness = math.exp(draw.gauss(0, 0.8))
        luck = draw.random()
        for config, method in itertools.product(configs, methods):
            for seed in range(seeds) if method == RANDOM else (None,):
                rates = [_rate(gamma, config) for gamma in gammas]
                mean = sum(rates) / layers
                seen = sum(gamma * rate for gamma, rate in zip(gammas, rates, strict=True)) / sum(gammas)
                factor = FACTORS[method] * (1 if seed is None else 1 + 0.2 * draw.gauss(0, 1))
                kl = max(0.0, 0.35 * hardness * factor * (1 - seen) ** 2.5)
                held, full = (36 + round(100 * mean)) * layers * KIB, 136 * layers * KIB
                agreement = max(0.0, 1 - round(12 * min(1, kl)) / 12)
                right = one.unpruned_correct
                if right is not None and kl > 0.1 + luck:
                    right = not right
                cut = hashlib.sha256(str(rates).encode()).hexdigest()[:16]
                rows.append(
                    Row(
                        method, config, seed, one.prompt_id, number, mean, held, full, held / full,
                        kl, 4 * kl, agreement, None if agreement == 1 else 4, 13,
                        None if right is None else "red", right, None, cut, "builtin", "0.1.0",
                    )
                )  # fmt: skip
    return rows


def _rate(gamma: float, config: PLPHPConfig) -> float:
    step = config.delta_r if gamma >= config.alpha else -config.delta_r if gamma < config.beta else 0.0
    return min(1.0, max(0.0, config.r + step))


def realistic(
    configs=None, prompts=20, methods=(PLPHP,), answers=True, constraint=MAX_KL, speed=True, **changes
) -> SweepRecord:
    """The record of a whole sweep: 60 settings over 20 prompts unless told otherwise."""
    configs = configs or grid((0.2, 0.3, 0.4, 0.5, 0.6), (0.0, 0.1, 0.2), (0.25, 0.35), (0.05, 0.1))
    asked = [prompt(number, (number % 5 != 0) if answers else None) for number in range(prompts)]
    rows = realistic_rows(configs, asked, methods)
    found = points(rows, asked, constraint)
    if speed:
        fast = {point.setting for point in found if point.on_front}
        rows = [replace(one, decode_tokens_per_s=_speed(one)) if one.setting in fast else one for one in rows]
        rows += [
            replace(row(number, method="unpruned", kl=None), decode_tokens_per_s=100 + number)
            for number in range(prompts)
        ]
        found = points(rows, asked, constraint)
    command = "plphp profile --config out/recommended.json --data prompts.jsonl --compare-baseline"
    record = SweepRecord(
        model="builtin",
        constraint=constraint,
        grid={"r": sorted({c.r for c in configs}), "method": list(methods)},
        prompts=tuple(asked),
        points=found,
        recommendation=recommend(found, constraint, "out/recommended.json", command),
        ablations=ablations(rows, asked),
        skipped=(Skipped({"alpha": 0.05, "beta": 0.1}, "alpha = 0.05 is below beta = 0.1"),) * 3,
        cost=Cost(194.2, 61.0, len(rows), 0, len(asked), 840, 360, 45),
        rows_done=len(rows),
        rows_expected=len(rows),
        environment={"tool": {"name": "plphp-cli"}, "command": "plphp sweep --r 0.2 0.3", "torch": "2.13"},
        warnings=coverage(rows, asked).warnings(),
    )
    return replace(record, **changes)


def _speed(one: Row) -> float:
    return (100 + one.prompt_index) * (1 + 0.3 * (1 - one.kv_ratio))


def sweep_of_all() -> SweepRecord:
    """60 settings, every method, 20 prompts with answers."""
    return realistic(methods=METHODS)


def sweep_of_alpha() -> SweepRecord:
    """One knob, few prompts, no answers."""
    return realistic(ALPHAS, prompts=6, answers=False)


def empty():
    return SweepRecord("toy", MAX_KL, {}, (), (), recommend((), MAX_KL))


def shapes(whole, line):
    one = realistic(grid(), prompts=1, answers=False, speed=False)
    wide = grid((0.2, 0.4), (0.1, 0.3), scope="image", head_reduce="max", skip_layers=tuple(range(30)))
    return [
        whole,
        line,
        one,
        empty(),
        realistic(constraint=Constraint("agreement", 0.999), prompts=3),
        realistic(constraint=Constraint("accuracy_drop", 0.02), prompts=10),
        realistic([*wide, *grid((0.2, 0.4), (0.1, 0.3))], prompts=4),
        without_kl(),
        replace(line, interrupted=True, recommendation=None, warnings=("a warning " * 30,)),
    ]


def without_kl():
    asked = [prompt(number) for number in range(3)]
    rows = [row(number, config, kl=None) for number in range(3) for config in ALPHAS]
    found = points(rows, asked, MAX_KL)
    return SweepRecord("toy", MAX_KL, {}, tuple(asked), found, recommend(found, MAX_KL))
