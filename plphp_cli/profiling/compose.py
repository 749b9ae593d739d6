"""From what was measured of each prompt to the record: medians per prompt, then sums over prompts."""

import dataclasses
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from plphp_cli.profiling.answers import quality
from plphp_cli.profiling.bound import Limits, Load, Measured, bound
from plphp_cli.profiling.bound_records import BoundRecord
from plphp_cli.profiling.over_prompts import TIMES, mean_layers, spreads, totals, worst
from plphp_cli.profiling.records import (
    PRUNED,
    STOCK,
    UNPRUNED,
    ArmProfile,
    ArmsRecord,
    CompileRecord,
    DummyRecord,
    PlanRecord,
    ProfileRecord,
    PromptProfile,
    QualityRecord,
    RatioProfile,
    SampleRecord,
)
from plphp_cli.profiling.schedule import CONTROL, slots
from plphp_cli.profiling.state import ModelFigures, ProfileRequest, PromptState
from plphp_cli.profiling.statistics import MIN_PAIRS, Comparison, compare, median, percentiles
from plphp_cli.results import MIN_DECODE_STEPS, ImageRecord

FIGURES = {"decode": "decode_s", "ttft": "ttft_s", "end_to_end": "end_to_end_s"}


def compose(
    request: ProfileRequest,
    states: Sequence[PromptState],
    *,
    model: str,
    figures: ModelFigures | None,
    limits: Limits,
    environment: dict[str, Any],
    warnings: Sequence[str],
    interrupted: bool,
    compiled: CompileRecord | None = None,
) -> ProfileRecord:
    """The record of one profile, complete or interrupted."""
    reached = [state for state in states if state.prompt is not None or state.failed]
    prompts = tuple(_prompt(request, state) for state in reached)
    # A prompt that was not timed to its end would leave as few repeats to the sums as it has itself.
    timed = [state for state in reached if _timed(request, state)] or reached
    arms, ratios = _arms(request, timed), _ratios(request, timed)
    layers = mean_layers([state.layers for state in timed if state.layers])
    return ProfileRecord(
        model=model,
        config=request.used_config,
        plan=PlanRecord(request.repeats, request.warmup, request.max_new_tokens, slots(request.arms)),
        arms=arms,
        ratios=ratios,
        bound=_bound(request, timed, figures, limits, arms, ratios),
        quality=quality([state.answers for state in reached if state.answers is not None]),
        layers=layers,
        prompts=prompts,
        control=_control(timed),
        totals={name: totals(timed, name) for name, _ in arms.items()},
        spread=spreads(prompts),
        worst=worst(prompts),
        environment=environment,
        warnings=(
            *dict.fromkeys(warnings),
            *_remarks(reached),
            *_left_out(reached, timed),
            *_uncompiled_peaks(reached, compiled),
        ),
        faults=_faults(reached),
        interrupted=interrupted,
        batch_size=request.batch_size,
        compiled=compiled,
        dummy=None if request.dummy is None else DummyRecord(**dataclasses.asdict(request.dummy)),
    )


def _prompt(request: ProfileRequest, state: PromptState) -> PromptProfile:
    question, prompt = state.question, state.prompt
    return PromptProfile(
        index=state.index,
        line=question.line,
        prompt=question.prompt,
        system=question.system,
        images=tuple(ImageRecord.from_image(image) for image in question.images),
        prompt_tokens=None if prompt is None else prompt.prompt_tokens,
        vision_tokens=None if prompt is None else prompt.vision_tokens,
        arms=_arms(request, [state]),
        ratios=_ratios(request, [state]),
        quality=QualityRecord() if state.answers is None else quality([state.answers]),
        layers=state.layers,
        control=_control([state]),
    )


def _arms(request: ProfileRequest, states: Sequence[PromptState]) -> ArmsRecord:
    return ArmsRecord(**{arm: _arm(request, states, arm) for arm in request.arms})


def _arm(request: ProfileRequest, states: Sequence[PromptState], arm: str) -> ArmProfile:
    """An arm over prompts: means per prompt of medians and bytes, the largest peak."""
    failed = [state for state in states if arm in state.failed]
    timed = [state for state in states if state.prefills.get(arm)]
    decoded = [state for state in states if state.decodes.get(arm)]
    steps = [s for state in decoded for sample in state.decodes[arm] for s in sample.step_s]
    count = len(decoded[0].decodes[arm][0].step_s) if decoded else 0

    def typical(name: str) -> float | None:
        return _mean_median(timed, lambda state: state.samples(arm, name))

    times = {name: typical(name) for name in TIMES}
    pruning = states if arm == PRUNED else []
    long_enough = count >= MIN_DECODE_STEPS
    decode_s = times["decode_s"]
    return ArmProfile(
        new_tokens=count + 1 if decoded else 1 if timed and request.max_new_tokens == 1 else None,
        failed=_failure(failed, len(states), arm),
        preprocess_s=_mean_median(states, lambda s: s.preprocess_s),
        vision_s=_mean_median(states, lambda s: s.vision_s),
        prefill_s=times["prefill_s"],
        prune_s=_mean_median(pruning, lambda s: s.prune_s),
        prune_share_of_prefill=_mean_median(pruning, lambda s: s.prune_shares),
        ttft_s=times["ttft_s"],
        decode_s=decode_s,
        decode_tokens_per_s=count * request.batch_size / decode_s if decode_s and long_enough else None,
        tpot_s=percentiles(steps) if long_enough else None,
        end_to_end_s=times["end_to_end_s"],
        kv_bytes_held=_mean_bytes(states, arm, "held"),
        kv_bytes_allocated=_mean_bytes(states, arm, "allocated"),
        kv_bytes_held_predicted=_mean_bytes(states, arm, "held_predicted"),
        kv_bytes_allocated_predicted=_mean_bytes(states, arm, "allocated_predicted"),
        peak_bytes=_peak(states, arm, "peak_bytes"),
        peak_prefill_bytes=_peak(states, arm, "prefill_bytes"),
        peak_prefill_decoder_bytes=_peak(states, arm, "prefill_decoder_bytes"),
        peak_decode_bytes=_peak(states, arm, "decode_bytes"),
        memory=next((s.peaks[arm].memory for s in reversed(states) if arm in s.peaks), None),
        samples=_samples(states, arm),
    )


def _failure(failed: Sequence[PromptState], count: int, arm: str) -> str | None:
    if not failed:
        return None
    reason = failed[0].failed[arm]
    return reason if count == 1 else f"{reason} on {len(failed)} of {count} prompts"


def _mean_median(
    states: Sequence[PromptState], samples: Callable[[PromptState], Sequence[float]]
) -> float | None:
    medians = [value for state in states if (value := median(samples(state))) is not None]
    return fmean(medians) if medians else None


def _mean_bytes(states: Sequence[PromptState], arm: str, name: str) -> int | None:
    values = [value for s in states if arm in s.kv and (value := getattr(s.kv[arm], name)) is not None]
    return round(fmean(values)) if values else None


def _peak(states: Sequence[PromptState], arm: str, name: str) -> int | None:
    values = [value for s in states if arm in s.peaks and (value := getattr(s.peaks[arm], name)) is not None]
    return max(values, default=None)


def _sums(states: Sequence[PromptState], slot: str, figure: str) -> list[float]:
    """Per repeat the sum over prompts; as many repeats as every prompt has."""
    return [sum(column) for column in zip(*(state.samples(slot, figure) for state in states), strict=False)]


def _fullest(
    states: Sequence[PromptState], samples: Callable[[PromptState], Sequence[float]]
) -> list[PromptState]:
    """The prompts with as many samples as any: one that ended early must not cost the others theirs."""
    counts = [len(samples(state)) for state in states]
    most = max(counts, default=0)
    return [state for state, count in zip(states, counts, strict=True) if count == most > 0]


def _timed(request: ProfileRequest, state: PromptState) -> bool:
    """Whether every arm that did not fail has all its repeats."""
    needed = [s for s in slots(request.arms) if (UNPRUNED if s == CONTROL else s) not in state.failed]
    counts = [len(state.prefills.get(slot, ())) for slot in needed]
    if not state.one_token:
        counts += [len(state.decodes.get(slot, ())) for slot in needed]
    return bool(counts) and min(counts) >= request.repeats


def _samples(states: Sequence[PromptState], slot: str) -> SampleRecord:
    timed = [state for state in states if state.prefills.get(slot)]
    if not timed:
        return SampleRecord()

    def shared(name: str) -> tuple[float, ...]:
        return tuple(sum(column) for column in zip(*(getattr(s, name) for s in timed), strict=False))

    def summed(name: str) -> list[float]:
        return _sums(_fullest(timed, lambda state: state.samples(slot, name)), slot, name)

    return SampleRecord(
        preprocess_s=shared("preprocess_s"),
        vision_s=shared("vision_s"),
        prune_s=shared("prune_s") if slot == PRUNED else (),
        step_s=tuple(d.step_s for d in timed[0].decodes.get(slot, ())) if len(states) == 1 else (),
        **{name: tuple(summed(name)) for name in TIMES},
    )


def _control(states: Sequence[PromptState]) -> SampleRecord | None:
    return _samples(states, CONTROL) if any(state.prefills.get(CONTROL) for state in states) else None


def _ratios(request: ProfileRequest, states: Sequence[PromptState]) -> dict[str, RatioProfile | None]:
    """Paired ratios of sums over the prompts that both arms answered."""
    found = {name: _ratio(states, UNPRUNED, PRUNED, figure) for name, figure in FIGURES.items()}
    both = [state.kv for state in states if PRUNED in state.kv and UNPRUNED in state.kv]
    found["kv"] = None
    if both:
        value = sum(kv[PRUNED].held for kv in both) / sum(kv[UNPRUNED].held for kv in both)
        names = (f"{PRUNED}.kv_bytes_held", f"{UNPRUNED}.kv_bytes_held")
        found["kv"] = RatioProfile(value, value, value, *names, samples=(value,))
    if STOCK in request.arms:
        loop = {f"loop_{name}": _ratio(states, STOCK, UNPRUNED, figure) for name, figure in FIGURES.items()}
        found |= loop
    return found


def _ratio(
    states: Sequence[PromptState], numerator: str, denominator: str, figure: str
) -> RatioProfile | None:
    def pairs(state: PromptState) -> list[float]:
        return min(state.samples(numerator, figure), state.samples(denominator, figure), key=len)

    usable = _fullest(states, pairs)
    if not usable or (figure == "decode_s" and _steps(usable, denominator) < MIN_DECODE_STEPS):
        return None
    control = (_sums(usable, UNPRUNED, figure), _sums(usable, CONTROL, figure))
    over, under = _sums(usable, numerator, figure), _sums(usable, denominator, figure)
    return ratio_profile(compare(over, under, control), f"{numerator}.{figure}", f"{denominator}.{figure}")


def ratio_profile(found: Comparison | None, numerator: str, denominator: str) -> RatioProfile | None:
    """The record of a comparison of two figures, each named `arm.figure`."""
    if found is None:
        return None
    # An interval of a few pairs is narrow by chance alone.
    enough = len(found.ratios) >= MIN_PAIRS
    return RatioProfile(
        found.median,
        found.low if enough else None,
        found.high if enough else None,
        numerator,
        denominator,
        control_low=found.control_low,
        control_high=found.control_high,
        verdict=found.verdict,
        samples=found.ratios,
    )


def _steps(states: Sequence[PromptState], arm: str) -> int:
    return len(states[0].decodes[arm][0].step_s)


def _bound(
    request: ProfileRequest,
    states: Sequence[PromptState],
    figures: ModelFigures | None,
    limits: Limits,
    arms: ArmsRecord,
    ratios: dict[str, RatioProfile | None],
) -> BoundRecord | None:
    """The bound of the mean prompt; None before a layer table is known."""
    looked = [s for s in states if s.prompt is not None and (s.layers or UNPRUNED in s.kv)]
    if figures is None or not looked:
        return None
    full = [_full_bytes(state) for state in looked]
    tokens = [state.prompt.prompt_tokens for state in looked if state.prompt is not None]
    heads = max((layer.kv_heads or 0 for layer in looked[0].layers), default=figures.kv_heads)
    held = {arm: value for arm, one in arms.items() if (value := one.kv_bytes_held) is not None}
    if PRUNED not in held and all(state.layers for state in looked):
        cut = [sum(layer.kv_bytes_held or 0 for layer in state.layers) for state in looked]
        held[PRUNED] = round(fmean(cut))
    allocated = {arm: value for arm, one in arms.items() if (value := one.kv_bytes_allocated) is not None}
    transient = {
        arm: max(0, one.peak_prefill_bytes - figures.model_bytes - allocated.get(arm, 0))
        for arm, one in arms.items()
        if one.peak_prefill_bytes is not None
    }
    load = Load(
        weight_bytes=figures.weight_bytes,
        weight_operations=2 * figures.weight_bytes / figures.item_bytes,
        model_bytes=figures.model_bytes,
        kv_bytes_held=held,
        kv_bytes_allocated=allocated,
        kv_bytes_full=fmean(full),
        token_bytes=sum(full) / sum(tokens),
        operations_per_kv_byte=2 * figures.query_heads / (heads * figures.item_bytes) if heads else 0.0,
        prompt_tokens=fmean(tokens),
        vision_tokens=fmean(s.prompt.vision_tokens for s in looked if s.prompt is not None),
        images=float(request.dummy.images)
        if request.dummy is not None
        else fmean(len(s.question.images) for s in looked),
        new_tokens=request.max_new_tokens,
        transient_bytes=transient,
        context_tokens=figures.context_tokens,
        batch_size=request.batch_size,
    )
    tpot = {arm: one.tpot_s.p50 if one.tpot_s else None for arm, one in arms.items()}
    pruned = arms.pruned
    prune_s = None if pruned is None or pruned.prune_s is None else pruned.prune_s * request.batch_size
    return bound(load, limits, Measured(tpot, ratios["decode"], prune_s))


def _full_bytes(state: PromptState) -> float:
    """A prompt's cache uncut, also where only the unpruned arm was measured."""
    return sum(layer.kv_bytes_full or 0 for layer in state.layers) or state.kv[UNPRUNED].held


def _remarks(states: Sequence[PromptState]) -> list[str]:
    """What readers should know: arms that did not repeat themselves, or that stock answers otherwise."""
    found = []
    for state in states:
        for slot, samples in state.decodes.items():
            if len({sample.token_ids for sample in samples}) > 1:
                found.append(f"prompt {state.index + 1}: {slot} did not generate the same tokens every time")
        stock, unpruned = state.decodes.get(STOCK), state.decodes.get(UNPRUNED)
        if stock and unpruned and stock[0].token_ids != unpruned[0].token_ids:
            found.append(f"prompt {state.index + 1}: stock generates other tokens than the unpruned arm")
    return found


def _uncompiled_peaks(reached: Sequence[PromptState], compiled: CompileRecord | None) -> list[str]:
    """Fresh processes compile nothing: their peaks of decoding are not those of the steps that were timed."""
    if compiled is None or compiled.refused is not None:
        return []
    if not any(peaks.decode_bytes for state in reached for peaks in state.peaks.values()):
        return []
    return ["peaks of decoding are of uncompiled steps; what compiled ones take beside is not known"]


def _left_out(reached: Sequence[PromptState], timed: Sequence[PromptState]) -> list[str]:
    """Which prompts were not timed to their end, where others were."""
    missing = [str(state.index + 1) for state in reached if all(state is not one for one in timed)]
    if not missing:
        return []
    which = f"prompt {missing[0]} was" if len(missing) == 1 else f"prompts {', '.join(missing)} were"
    return [f"{which} not timed to the end: sums, means and ratios are over the other {len(timed)}"]


def _faults(states: Sequence[PromptState]) -> tuple[str, ...]:
    """The first token comes from the whole prompt: anything but exact agreement is a fault of the tool."""
    return tuple(
        f"prompt {state.index + 1}: the first token of the pruned arm is not that of the unpruned one, "
        "which is a fault of the tool: please report it"
        for state in states
        if state.answers is not None and state.answers.first_token_agrees is False
    )
