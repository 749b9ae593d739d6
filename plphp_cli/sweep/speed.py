"""Decoding speed of chosen settings, measured as `profile` does: in turns, with an A/A control, in pairs.

One prefill serves all settings of a prompt: each timed decode starts from a cut of its own, made before the
clock starts, so that one whole cache and one cut are all that is held.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from plphp_cli.attention import prune
from plphp_cli.config import PLPHPConfig
from plphp_cli.models import prepare
from plphp_cli.prefilling import prefill
from plphp_cli.profiling.compose import ratio_profile
from plphp_cli.profiling.records import RatioProfile
from plphp_cli.profiling.schedule import alternated
from plphp_cli.profiling.state import Question
from plphp_cli.profiling.statistics import compare, median
from plphp_cli.profiling.timing import Timer, time_decode
from plphp_cli.pruning import PLPHPPolicy
from plphp_cli.results import MIN_DECODE_STEPS
from plphp_cli.sweep.matching import Budget, policy_of
from plphp_cli.sweep.plan import plan
from plphp_cli.sweep.records import BASELINE, RANDOM, Point, Row, Setting
from plphp_cli.sweep.request import ALL, NONE, SweepRequest

if TYPE_CHECKING:
    from plphp_cli.models import LoadedModel

_BASELINE = Setting(BASELINE, None)
# The baseline once more: what it differs by from itself is what cannot be called a difference.
_CONTROL: Setting | None = None


def to_time(request: SweepRequest, points: Sequence[Point]) -> tuple[Setting, ...]:
    """The settings whose speed is wanted, the baseline first; of chance the first seed alone."""
    if request.measure_speed == NONE or request.max_new_tokens <= MIN_DECODE_STEPS:
        return ()
    if request.measure_speed == ALL:
        chosen = [s for s in request.grid.settings if s.method != RANDOM or not s.seed]
    else:
        chosen = [point.setting for point in points if point.on_front or point.on_accuracy_front]
    return tuple(dict.fromkeys([_BASELINE, *chosen]))


def samples(
    loaded: "LoadedModel",
    question: Question,
    index: int,
    settings: Sequence[Setting],
    request: SweepRequest,
    timer: Timer,
) -> Generator[tuple[Setting | None, float | None], None, None]:
    """Seconds of each timed decode of a prompt, in the order in which they are taken; None for a warm-up.

    The setting None is the A/A control. Every other prompt goes through the settings in reverse, so that a
    steady drift of the machine weighs on all alike.
    """
    count = request.max_new_tokens
    prompt = prepare(loaded, question.images, question.prompt, question.system)
    with prune(loaded.model, None, keep_attention=True) as pruner:
        whole = prefill(loaded, prompt, pruner, 0)
        vision_tokens = whole.state.vision.positions.numel()

        def budget(config: PLPHPConfig) -> Budget:
            return plan(whole.state, PLPHPPolicy(config)).budget(vision_tokens)

        slots: list[Setting | None] = [*settings, _CONTROL]
        for repeat, place in alternated(range(len(slots)), request.warmup + request.timed_repeats):
            setting = slots[place if index % 2 == 0 else -1 - place]
            if setting is None or setting.method == BASELINE:
                cut = whole.fork(count)
            else:
                cut = whole.cut(policy_of(setting, budget), count)
            seconds = time_decode(loaded, [cut], count, timer).decode_s
            del cut
            yield setting, seconds if repeat >= request.warmup else None


def timed_row(row: Row, seconds: Sequence[float], control: Sequence[float], max_new_tokens: int) -> Row:
    """A row with its speed: tokens per second from the second token on, median over repeats."""
    middle = median(seconds)
    rate = (max_new_tokens - 1) / middle if middle else None
    return replace(
        row, decode_tokens_per_s=rate, decode_samples_s=tuple(seconds), control_samples_s=tuple(control)
    )


def speeds(rows: Sequence[Row]) -> dict[Setting, RatioProfile]:
    """Per timed setting the decode ratio to the baseline, paired by prompt and repeat.

    Unlike a profile of several prompts, which pairs sums over prompts, every prompt is a pair of its own: a
    sweep repeats less and has more prompts.
    """
    unpruned = {row.prompt_id: row for row in rows if row.method == BASELINE and row.decode_samples_s}
    by_setting: dict[Setting, list[Row]] = {}
    for row in rows:
        if row.method != BASELINE and row.decode_samples_s and row.prompt_id in unpruned:
            # Seeds of chance are one point, timed by its first.
            setting = replace(row.setting, seed=None)
            by_setting.setdefault(setting, []).append(row)
    found = {setting: _ratio(timed, unpruned) for setting, timed in by_setting.items()}
    return {setting: ratio for setting, ratio in found.items() if ratio is not None}


def _ratio(timed: Sequence[Row], unpruned: Mapping[str, Row]) -> RatioProfile | None:
    over, under, twin = [], [], []
    for row in timed:
        other = unpruned[row.prompt_id]
        pairs = zip(other.decode_samples_s, row.decode_samples_s, other.control_samples_s, strict=False)
        for first, second, third in pairs:
            over.append(first)
            under.append(second)
            twin.append(third)
    return ratio_profile(
        compare(over, under, (over, twin)), "unpruned.decode_s", f"{timed[0].method}.decode_s"
    )
