"""The bound: what a decoding step must read and compute, and so what pruning could gain at most. Arithmetic.

Per part of a step (the weights; the cache) the least time is max(bytes / bandwidth, operations / rate).
Without a measured bandwidth and rate the parts are weighed by their bytes alone. No torch here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from plphp_cli.profiling.bound_records import BatchRow, BoundRecord, CapacityRecord
from plphp_cli.profiling.records import (
    FASTER,
    PRUNED,
    STOCK,
    UNPRUNED,
    RatioProfile,
)
from plphp_cli.profiling.statistics import THRESHOLD
from plphp_cli.units import format_bytes, format_percent

BATCHES = (1, 4, 16, 64)
CONTEXTS = (1024, 4096, 16384, 65536, 262144)
GAINS = (1.1, 1.5, 2.0)
_LONGEST_CONTEXT = 1 << 24


@dataclass(frozen=True)
class Limits:
    """What the machine can do at most; see `machine.Machine`."""

    bandwidth_bytes_per_s: float | None = None
    operations_per_s: float | None = None
    cache_bytes: int | None = None
    memory_bytes: int | None = None
    cpu: bool = False


@dataclass(frozen=True)
class Load:
    """What the model and its prompt ask of the machine; a prompt stands for the mean of several.

    Attributes:
        weight_bytes: read by each step; `weight_operations` done with them per sequence.
        model_bytes: of all weights, the vision encoder's included, which must be in memory.
        kv_bytes_held: per arm, the prompt's cache after the cut.
        kv_bytes_allocated: per arm, with the room for new tokens.
        kv_bytes_full: the prompt's cache uncut.
        token_bytes: cache of one token, all layers.
        operations_per_kv_byte: of attention, 4 H d operations over the bytes of a token.
        prompt_tokens: N; `vision_tokens` and `images` of it.
        new_tokens: T.
        transient_bytes: per arm, peak of prefill beyond the weights and the cache it leaves.
        context_tokens: the longest prompt that the model takes; None when not known.
        batch_size: prompts that a step serves.
    """

    weight_bytes: int
    weight_operations: float
    model_bytes: int
    kv_bytes_held: Mapping[str, int]
    kv_bytes_allocated: Mapping[str, int]
    kv_bytes_full: float
    token_bytes: float
    operations_per_kv_byte: float
    prompt_tokens: float
    vision_tokens: float
    images: float
    new_tokens: int
    transient_bytes: Mapping[str, int] = field(default_factory=dict)
    context_tokens: int | None = None
    batch_size: int = 1


@dataclass(frozen=True)
class Measured:
    """What was measured that the bound is held against: times per token and the paired decode ratio."""

    tpot_s: Mapping[str, float | None]
    decode: RatioProfile | None
    prune_s: float | None


def bound(load: Load, limits: Limits, measured: Measured) -> BoundRecord:
    """The whole bound of one profile."""
    cache = {arm: cache_bytes(load, arm) for arm in (PRUNED, UNPRUNED, STOCK)}
    steps = {
        arm: step_time(
            load, limits, size / load.batch_size, load.batch_size, _attended(size / load.batch_size, arm)
        )
        for arm, size in cache.items()
        if size is not None
    }
    sizes = {arm: load.weight_bytes + size for arm, size in cache.items() if size is not None}
    by_bytes, ideal = _over(sizes), _over(steps) if limits.bandwidth_bytes_per_s else _over(sizes)
    known_steps = steps if limits.bandwidth_bytes_per_s else {}
    attained = {
        arm: step / tpot if (tpot := measured.tpot_s.get(arm)) else None for arm, step in known_steps.items()
    }
    expected = _expected(known_steps, measured.tpot_s)
    beaten = _beaten(measured.decode, ideal)
    failed = beaten is not None or any((share or 0) > 1 for share in attained.values())
    arms = (PRUNED, UNPRUNED, STOCK)
    return BoundRecord(
        weight_bytes=load.weight_bytes,
        kv_bytes_per_step={arm: None if cache[arm] is None else round(cache[arm] or 0) for arm in arms},
        operations_per_step={arm: _operations(load, cache[arm], arm) for arm in arms},
        kv_share_of_step={arm: (cache[arm] or 0) / sizes[arm] if sizes.get(arm) else None for arm in arms},
        ideal_decode_ratio=ideal,
        ideal_decode_ratio_by_bytes=by_bytes,
        bandwidth_bytes_per_s=limits.bandwidth_bytes_per_s,
        operations_per_s=limits.operations_per_s,
        ideal_step_s={arm: known_steps.get(arm) for arm in arms},
        attained={arm: attained.get(arm) for arm in arms},
        expected_decode_ratio=expected,
        beaten_by=beaten,
        failed_assumption=_failed_assumption(load, limits, attained, sizes) if failed else None,
        speed_up_expected=expectation(ideal, expected, load, cache),
        repaid_after_tokens=repaid_after(measured),
        device_memory_bytes=limits.memory_bytes,
        capacity={arm: capacity(load, limits.memory_bytes, arm) for arm in load.kv_bytes_allocated},
        table=batch_table(load, limits),
    )


def cache_bytes(load: Load, arm: str) -> float | None:
    """Bytes of cache that one step of the whole batch moves, mean over the answer; None if it did not run."""
    held = load.kv_bytes_held.get(arm)
    if held is None and arm == UNPRUNED:
        held = round(load.kv_bytes_full)
    if held is None:
        return None
    once = (held + load.token_bytes * load.new_tokens / 2) * load.batch_size
    # Stock concatenates: the old cache is read, written anew, and read by attention.
    return 3 * once if arm == STOCK else once


def step_time(
    load: Load, limits: Limits, cache: float, batch: int = 1, attended: float | None = None
) -> float:
    """Least seconds of a step of `batch` sequences with `cache` bytes each; bytes if nothing was measured.

    `attended` are the bytes that attention computes with, where more than those are moved.
    """
    bandwidth, rate = limits.bandwidth_bytes_per_s or 1.0, limits.operations_per_s
    weights, attention = load.weight_bytes / bandwidth, batch * cache / bandwidth
    if rate and limits.bandwidth_bytes_per_s:
        weights = max(weights, batch * load.weight_operations / rate)
        computed = cache if attended is None else attended
        attention = max(attention, batch * computed * load.operations_per_kv_byte / rate)
    return weights + attention


def batch_table(load: Load, limits: Limits) -> tuple[BatchRow, ...]:
    """Ideal ratios by batch and context, for prompts cut as this one was."""
    held = load.kv_bytes_held.get(PRUNED)
    if held is None or not load.kv_bytes_full or not load.token_bytes:
        return ()
    share = held / load.kv_bytes_full

    def ideal(batch: int, context: int) -> float:
        full = context * load.token_bytes
        return step_time(load, limits, full, batch) / step_time(load, limits, full * share, batch)

    def reached(batch: int, gain: float) -> int | None:
        if ideal(batch, _LONGEST_CONTEXT) < gain:
            return None
        low, high = 0, _LONGEST_CONTEXT
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if ideal(batch, middle) >= gain else (middle, high)
        return high

    return tuple(
        BatchRow(
            batch,
            {str(context): ideal(batch, context) for context in CONTEXTS},
            {f"{gain:g}": reached(batch, gain) for gain in GAINS},
        )
        for batch in BATCHES
    )


def capacity(load: Load, memory: int | None, arm: str) -> CapacityRecord:
    """How many such prompts, or images in one prompt, fit beside the weights and one prefill at a time.

    A prompt is prefilled whole, so what its prefill needs for a while grows with its tokens.
    """
    each = load.kv_bytes_allocated.get(arm)
    if memory is None or not each:
        return CapacityRecord(None, None)
    if arm == STOCK:
        each = round(each + load.new_tokens * load.token_bytes)
    room, transient = memory - load.model_bytes, load.transient_bytes.get(arm, 0)
    prompts = max(0, int((room - transient) // each))
    if not load.images:
        return CapacityRecord(prompts, None)
    passing = transient / load.prompt_tokens
    text = load.prompt_tokens - load.vision_tokens
    text_bytes = (text + load.new_tokens) * load.token_bytes
    tokens = load.vision_tokens / load.images
    image_bytes = (each - text_bytes) / load.images + tokens * passing
    if image_bytes <= 0:
        return CapacityRecord(prompts, None)
    images, limit = max(0, int((room - text_bytes - text * passing) // image_bytes)), "memory"
    if load.context_tokens is not None and tokens:
        longest = max(0, int((load.context_tokens - text - load.new_tokens) // tokens))
        images, limit = (longest, "context window") if longest < images else (images, limit)
    return CapacityRecord(prompts, images, limit)


def repaid_after(measured: Measured) -> int | None:
    """Length of the answer, in tokens, from which the time saved per token has repaid the pruning itself."""
    pruned, unpruned = measured.tpot_s.get(PRUNED), measured.tpot_s.get(UNPRUNED)
    faster = measured.decode is not None and measured.decode.verdict == FASTER
    if not faster or measured.prune_s is None or not pruned or not unpruned or unpruned <= pruned:
        return None
    # The first token comes from prefill: it saves nothing.
    return 1 + math.ceil(measured.prune_s / (unpruned - pruned))


def expectation(
    ideal: float | None, expected: float | None, load: Load, cache: Mapping[str, float | None]
) -> str:
    """Whether a speed-up is to be expected here, in plain words."""
    whole = cache.get(UNPRUNED) or 0.0
    share = format_percent(whole / (load.weight_bytes + whole) if whole else None)
    reads = (
        f"the cache is {share} of the {format_bytes(load.weight_bytes + whole)} that an unpruned step reads"
    )
    if load.new_tokens < 2:
        return "No speed-up is to be expected: with one new token nothing is decoded."
    if ideal is None:
        return "Whether a speed-up is to be expected cannot be told: what pruning leaves was not measured."
    if ideal < 1 + THRESHOLD:
        return f"No speed-up is to be expected: {reads}, so even an ideal loop would gain {ideal:.3f}x."
    if expected is None:
        return (
            f"A speed-up of {ideal:.2f}x at most is to be expected: {reads}. What a real step leaves of that "
            "is not known: none was timed."
        )
    if expected < 1 + THRESHOLD:
        return (
            f"Hardly any speed-up is to be expected: {reads}, for an ideal gain of {ideal:.2f}x, but most of "
            f"a measured step goes to other things than reading, which leaves {expected:.3f}x."
        )
    return (
        f"A speed-up is to be expected: {reads}, for an ideal gain of {ideal:.2f}x, {expected:.2f}x if all "
        "that it saves is saved from the measured step."
    )


def _over(values: Mapping[str, float]) -> float | None:
    pruned, unpruned = values.get(PRUNED), values.get(UNPRUNED)
    return unpruned / pruned if pruned and unpruned else None


def _operations(load: Load, cache: float | None, arm: str) -> int | None:
    if cache is None:
        return None
    return round(
        load.weight_operations * load.batch_size + _attended(cache, arm) * load.operations_per_kv_byte
    )


def _attended(cache: float, arm: str) -> float:
    """Of the bytes that a step moves those that attention computes with: stock moves its cache thrice."""
    return cache / 3 if arm == STOCK else cache


def _expected(steps: Mapping[str, float], tpot_s: Mapping[str, float | None]) -> float | None:
    """A measured step with over without what the ideal saves; None where no step was timed.

    From the unpruned arm's step, or from the pruned arm's where that ran alone.
    """
    whole, pruned = tpot_s.get(UNPRUNED), tpot_s.get(PRUNED)
    if PRUNED not in steps or UNPRUNED not in steps:
        return None
    saved = steps[UNPRUNED] - steps[PRUNED]
    if not whole:
        return (pruned + saved) / pruned if pruned else None
    return whole / (whole - saved) if saved < whole else None


def _beaten(decode: RatioProfile | None, ideal: float | None) -> float | None:
    """The measured ratio if its whole interval lies beyond the bound."""
    if decode is None or ideal is None or decode.low is None or decode.verdict != FASTER:
        return None
    return decode.median if decode.low > ideal * (1 + THRESHOLD) else None


def _failed_assumption(
    load: Load, limits: Limits, attained: Mapping[str, float | None], sizes: Mapping[str, float]
) -> str:
    step = sizes.get(UNPRUNED)
    if limits.cache_bytes and step and step <= limits.cache_bytes:
        return (
            f"a step reads from memory: its {format_bytes(step)} fit in the last-level cache of "
            f"{format_bytes(limits.cache_bytes)}"
        )
    if any(share is not None and share > 1 for share in attained.values()):
        return "the bandwidth measured is the most that can be read: a step reads faster, partly from caches"
    if limits.cpu:
        return (
            "attention reads at full bandwidth: on a CPU it is bound by arithmetic, which pruning saves too"
        )
    return (
        "attention reads at full bandwidth: its kernel is slower than that, so cutting the cache saves more"
    )
