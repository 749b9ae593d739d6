"""Each method against PLPHP at the same held bytes, paired by prompt: what a level adds, and chance."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from plphp_cli.config import PLPHPConfig
from plphp_cli.sweep.bootstrap import deviation, mean_interval
from plphp_cli.sweep.coverage import Coverage, coverage
from plphp_cli.sweep.records import METHODS, PLPHP, Ablation, Interval, PromptRecord, Row, Setting
from plphp_cli.units import finite


def ablations(rows: Sequence[Row], prompts: Sequence[PromptRecord]) -> tuple[Ablation, ...]:
    """PLPHP against every other method that was swept, on the settings that both were measured with.

    A prompt's figure is the mean over those settings (and seeds) of the difference on it; the interval is
    over prompts. So settings that happen to cut alike weigh as often as they were swept, and no prompt
    counts for more than another.
    """
    held = coverage(rows, prompts)
    found = (_ablation(held, method) for method in METHODS if method != PLPHP)
    return tuple(one for one in found if one is not None)


def _ablation(held: Coverage, method: str) -> Ablation | None:
    ours = {setting.config: setting for setting in held.settings if setting.method == PLPHP}
    pairs: dict[PLPHPConfig, list[Setting]] = {}
    for setting in held.settings:
        if setting.method == method and setting.config is not None and setting.config in ours:
            pairs.setdefault(setting.config, []).append(setting)
    if not pairs:
        return None
    kl = {config: _differences(held, ours[config], other, "kl_mean", 1) for config, other in pairs.items()}
    right = {c: _differences(held, ours[c], other, "answer_correct", -1) for c, other in pairs.items()}
    bytes_ = {c: _differences(held, ours[c], other, "kv_ratio", 1) for c, other in pairs.items()}
    by_setting = [fmean(column.values()) for column in kl.values() if column]
    seeds = sorted({seed.seed for other in pairs.values() for seed in other if seed.seed is not None})
    return Ablation(
        method=method,
        settings=len(pairs),
        prompts=len(held.prompts),
        kl_excess=_over_prompts(list(kl.values())),
        accuracy_loss=_over_prompts(list(right.values())),
        plphp_better=sum(mean > 0 for mean in by_setting),
        plphp_worse=sum(mean < 0 for mean in by_setting),
        kv_ratio_gap=max(abs(fmean(column.values())) for column in bytes_.values() if column),
        seeds=len(seeds) or None,
        seed_sd=_seed_spread(held, ours, pairs, seeds),
    )


def _differences(
    held: Coverage, ours: Setting, others: Sequence[Setting], figure: str, sign: int
) -> dict[str, float]:
    """By prompt: the other's figure (mean over seeds) less PLPHP's, times `sign`, where both are known."""
    found = {}
    for prompt in held.prompts:
        mine = finite(getattr(held.rows[ours][prompt], figure))
        theirs = [finite(getattr(held.rows[other][prompt], figure)) for other in others]
        known = [value for value in theirs if value is not None]
        if mine is not None and len(known) == len(theirs):
            found[prompt] = sign * (fmean(known) - mine)
    return found


def _over_prompts(columns: Sequence[dict[str, float]]) -> Interval | None:
    """The mean over settings on each prompt that all of them know, and over these prompts."""
    common = set.intersection(*(set(column) for column in columns))
    values = [fmean(column[prompt] for column in columns) for prompt in columns[0] if prompt in common]
    return mean_interval(values) if values else None


def _seed_spread(
    held: Coverage,
    ours: Mapping[PLPHPConfig | None, Setting],
    pairs: Mapping[PLPHPConfig, list[Setting]],
    seeds: Sequence[int],
) -> float | None:
    """Standard deviation over seeds of what each seed costs over PLPHP, mean over settings and prompts."""
    means = []
    for seed in seeds:
        chosen = {config: [s for s in others if s.seed == seed] for config, others in pairs.items()}
        columns = [_differences(held, ours[c], one, "kl_mean", 1) for c, one in chosen.items() if one]
        values = [value for column in columns for value in column.values()]
        if values:
            means.append(fmean(values))
    return deviation(means)
