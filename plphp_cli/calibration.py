"""Thresholds that suit a model's own scale of gamma, and which of its layers must not be cut. [ours]

PLPHP's alpha and beta compare gamma with fixed numbers, but models differ in how much of their attention
rests on vision tokens. `calibrate` puts the thresholds at quantiles of the gamma that the model shows on
given prompts, and measures each layer's need: what the answer loses when that layer alone loses its vision
cache.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import UsageError
from plphp_cli.prompt import Prompt

if TYPE_CHECKING:
    from plphp_cli.models import LoadedModel

TERCILES = (1 / 3, 2 / 3)
# A need below this many nats is nothing to protect, however far it stands out from smaller ones.
MIN_NEED = 0.01
FEW_PROMPTS = 10


@dataclass(frozen=True)
class CalibrationRecord:
    """What calibration found, per layer in the decoder's order; None for layers that are never pruned.

    Attributes:
        model: name of the model.
        prompts: how many prompts gave gamma; `prompts_with_need` of them had answers of two tokens or more.
        gamma: mean vision attention score over the prompts.
        need: mean over prompts of KL(unpruned || without this layer's vision cache), in nats per token.
        rank_correlation: Spearman's, between `gamma` and `need` over layers; None if it is not defined.
        config: the calibrated setting.
    """

    model: str
    prompts: int
    prompts_with_need: int
    gamma: tuple[float | None, ...]
    need: tuple[float | None, ...]
    rank_correlation: float | None
    config: PLPHPConfig

    @property
    def finding(self) -> str:
        """The correlation in one sentence."""
        rho = self.rank_correlation
        if rho is None:
            return "whether the layers that look most are the ones that need it cannot be told here"
        if rho >= 0.5:
            verdict = "are"
        elif rho <= -0.5:
            verdict = "are not (rather the reverse)"
        else:
            verdict = "are not clearly"
        few = f" (indication only: {self.prompts} prompts)" if self.prompts < FEW_PROMPTS else ""
        return (
            f"on this model the layers that look most {verdict} the ones that need it: "
            f"rank correlation of gamma and need {rho:+.2f}{few}"
        )


@dataclass(frozen=True)
class Survey:
    """What a model shows on prompts, before any setting: per prompt and layer, gamma and need.

    `needs` has no row for a prompt whose answer is a single token: nothing is decoded from the cut cache.
    """

    model: str
    gammas: tuple[tuple[float | None, ...], ...]
    needs: tuple[tuple[float | None, ...], ...]


def calibrate(
    loaded: "LoadedModel",
    prompts: Sequence[Prompt],
    base: PLPHPConfig,
    *,
    quantiles: tuple[float, float] = TERCILES,
    max_new_tokens: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> CalibrationRecord:
    """Calibrate a setting on prompts.

    Args:
        loaded: the model.
        prompts: prompts with images, on the model's device.
        base: gives every knob that is not calibrated (r, delta_r, scope, head_reduce); its `skip_layers` are
            exempt beside those that stand out.
        quantiles: of the gamma of all layers and prompts, for beta and alpha.
        max_new_tokens: length up to which the unpruned answers are generated and judged.
        progress: called with the number of prompts done.

    Raises:
        UsageError: there is no prompt, one holds no vision tokens, or the quantiles are not ascending in
            [0, 1].
        UnsupportedError: the model cannot be pruned, with the reason.
    """
    check_quantiles(quantiles)
    return settle(survey(loaded, prompts, max_new_tokens, progress), base, quantiles)


def survey(
    loaded: "LoadedModel",
    prompts: Sequence[Prompt],
    max_new_tokens: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> Survey:
    """Measure gamma and need on prompts. Arguments and errors are those of `calibrate`."""
    # Reading a record (reports do) must not import torch.
    from plphp_cli.decoding import Done
    from plphp_cli.generate import stream
    from plphp_cli.pruning import FixedRates
    from plphp_cli.quality import layer_need
    from plphp_cli.sampling import Settings

    gammas: list[tuple[float | None, ...]] = []
    needs: list[tuple[float | None, ...]] = []
    for number, prompt in enumerate(prompts, 1):
        if prompt.vision_tokens == 0:
            raise UsageError(
                f"prompt {number} has no image, so there is no gamma to measure",
                hint="give every calibration prompt an image",
            )
        # All rates 1: layers are scored and nothing is cut, so the answer is the unpruned one.
        answer: tuple[int, ...] = ()
        for event in stream(loaded, prompt, FixedRates({}), Settings(max_new_tokens=max_new_tokens)):
            if isinstance(event, Done):
                answer = event.token_ids
            elif hasattr(event, "layers"):
                gammas.append(tuple(layer.gamma for layer in event.layers))
        if len(answer) > 1:
            needs.append(tuple(layer_need(loaded, prompt, answer)))
        progress(number)
    if not gammas:
        raise UsageError("no prompts to calibrate on")
    return Survey(loaded.name, tuple(gammas), tuple(needs))


def settle(found: Survey, base: PLPHPConfig, quantiles: tuple[float, float] = TERCILES) -> CalibrationRecord:
    """The setting that a survey leads to. Arguments and errors are those of `calibrate`."""
    low, high = check_quantiles(quantiles)
    gammas = found.gammas
    gamma = _means(gammas)
    need = _means(found.needs) if found.needs else (None,) * len(gamma)
    skipped = tuple(sorted({*base.skip_layers, *outstanding(need)}))
    pool = [g for row in gammas for layer, g in enumerate(row) if g is not None and layer not in skipped]
    config = base.replace(
        alpha=quantile(pool, high),
        beta=quantile(pool, low),
        skip_layers=skipped,
        calibrated=True,
        calibrated_on=f"{found.model}, {len(gammas)} prompt{'s' if len(gammas) > 1 else ''}",
    )
    return CalibrationRecord(
        found.model, len(gammas), len(found.needs), gamma, need, rank_correlation(gamma, need), config
    )


def check_quantiles(quantiles: tuple[float, float]) -> tuple[float, float]:
    """The two, if they are ascending in [0, 1]. Raises `UsageError`."""
    low, high = quantiles
    if not 0 <= low <= high <= 1:
        raise UsageError(f"quantiles = {low:g} {high:g}; expected two ascending numbers in [0, 1]")
    return low, high


def outstanding(need: Sequence[float | None]) -> tuple[int, ...]:
    """Layers whose need stands far out from the others'.

    By the modified z-score (above 3.5, Iglewicz and Hoaglin 1993), which several such layers do not mask; and
    above 0.01 nats and twice the median, so that layers that hardly differ are all cut.
    """
    known = [value for value in need if value is not None]
    if len(known) < 4:
        return ()
    median = statistics.median(known)
    spread = statistics.median(abs(value - median) for value in known)
    fence = max(median + 3.5 * spread / 0.6745, 2 * median, MIN_NEED)
    return tuple(layer for layer, value in enumerate(need) if value is not None and value > fence)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, linear between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def rank_correlation(one: Sequence[float | None], two: Sequence[float | None]) -> float | None:
    """Spearman's rank correlation over the pairs known on both sides; None under three or without spread."""
    pairs = [(a, b) for a, b in zip(one, two, strict=True) if a is not None and b is not None]
    if len(pairs) < 3:
        return None
    try:
        return statistics.correlation(*map(_ranks, zip(*pairs, strict=True)))
    except statistics.StatisticsError:
        return None


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share their mean rank."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]


def _means(rows: Sequence[Sequence[float | None]]) -> tuple[float | None, ...]:
    columns = ([value for value in column if value is not None] for column in zip(*rows, strict=True))
    return tuple(statistics.fmean(column) if column else None for column in columns)
