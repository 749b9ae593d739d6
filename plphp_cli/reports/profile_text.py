"""What a profile says in plain sentences: the same on the terminal and in the HTML page."""

from plphp_cli.profiling.records import (
    FASTER,
    FEW_PROMPTS,
    NO_DIFFERENCE,
    PRUNED,
    UNPRUNED,
    BoundRecord,
    ProfileRecord,
    RatioProfile,
)
from plphp_cli.results import MIN_DECODE_STEPS
from plphp_cli.units import format_bytes, format_count, format_number, format_percent, format_ratio

SHORT_ANSWER = 12


def headline(record: ProfileRecord) -> list[str]:
    """What pruning brought here: memory, speed, quality, and what was possible at all."""
    if record.arms.pruned is None or not record.prompts:
        return ["Nothing was measured yet."]
    sentences = [_memory(record), _speed(record)]
    if record.bound is not None:
        sentences.append(record.bound.speed_up_expected)
        if record.bound.failed_assumption is not None:
            sentences.append(_beaten(record.bound))
    sentences.append(_quality(record))
    return [sentence for sentence in sentences if sentence]


def standing(record: ProfileRecord) -> str:
    """How much the profile may be relied upon, by its number of prompts."""
    count = len(record.prompts)
    if count == 1:
        return "One prompt is an anecdote: indication only. Give prompts with --data for a verdict."
    if count < FEW_PROMPTS:
        return f"{count} prompts are few (under {FEW_PROMPTS}): indication only."
    return f"Over {format_count(count)} prompts."


def remarks(record: ProfileRecord) -> list[str]:
    """What a reader should know before believing the figures."""
    found = list(record.warnings)
    if record.interrupted:
        found.append("Interrupted: the figures are of what had been measured until then.")
    for name, arm in record.arms.items():
        if arm.failed is not None:
            found.append(f"The {name} arm failed: {arm.failed}; what is known of the others is reported.")
    if any(prompt.vision_tokens == 0 for prompt in record.prompts):
        found.append("A prompt without vision tokens has nothing to prune.")
    if record.plan.max_new_tokens == 1:
        found.append("One new token comes from prefill alone: there is no decoding to time or to judge.")
    elif record.plan.max_new_tokens <= MIN_DECODE_STEPS:
        found.append(f"Decoding was too short to time: {MIN_DECODE_STEPS} steps at least are needed.")
    tokens = record.quality.answer_tokens
    if tokens is not None and 1 < tokens < SHORT_ANSWER * len(record.prompts):
        found.append("Short answers hide what a cut costs: judge on answers of 12 tokens and more.")
    return found


def difference(ratio: RatioProfile | None, compared: bool) -> str:
    """A ratio with its interval and what may be said of it."""
    if ratio is None:
        return "not comparable" if compared else ""
    shown = f"{format_ratio(ratio.median)} [{format_number(ratio.low)}, {format_number(ratio.high)}]"
    return shown if ratio.verdict is None else f"{shown} {ratio.verdict}"


def control(ratio: RatioProfile | None) -> str:
    """The A/A interval of a ratio: `0.99x to 1.01x`."""
    if ratio is None or ratio.control_low is None:
        return ""
    return f"{format_ratio(ratio.control_low)} to {format_ratio(ratio.control_high)}"


def repaid(record: ProfileRecord) -> str:
    """The output length at which pruning has paid for itself, or that it never does."""
    bound = record.bound
    if bound is None or record.ratios.get("decode") is None:
        return "not known"
    if bound.repaid_after_tokens is None:
        return "never here: no time per token is measurably saved"
    return f"from {format_count(bound.repaid_after_tokens)} new tokens on"


def _beaten(bound: BoundRecord) -> str:
    what = "A measured step takes less time than the bound allows."
    if bound.beaten_by is not None:
        what = f"The decode ratio measured, {format_ratio(bound.beaten_by)}, beats the bound."
    return f"{what} The assumption that failed: {bound.failed_assumption}."


def _memory(record: ProfileRecord) -> str:
    kv, pruned = record.ratios.get("kv"), record.arms.pruned
    full = sum(layer.kv_bytes_full or 0 for layer in record.layers)
    held = pruned.kv_bytes_held if pruned is not None else None
    if held is None or not full:
        return "The cache was not measured."
    share = kv.median if kv is not None else held / full
    if share == 1:
        return f"Pruning cut nothing: all {format_bytes(full)} of a prompt's KV cache are held."
    return (
        f"Pruning holds {format_percent(share, 0)} of a prompt's KV cache ({format_bytes(held)} of "
        f"{format_bytes(full)})."
    )


def _speed(record: ProfileRecord) -> str:
    if record.arms.unpruned is None:
        return "Speed was not compared (--compare-baseline does)."
    decode = record.ratios.get("decode")
    if decode is None:
        return "Decode speed could not be compared."
    interval = (
        f"{format_ratio(decode.median)}, interval {format_ratio(decode.low)} to {format_ratio(decode.high)}"
    )
    if decode.verdict is None:
        return f"Decoding at {interval} the unpruned speed: too few pairs for a verdict."
    if decode.verdict == NO_DIFFERENCE:
        return f"Decoding shows no measurable difference ({interval}; A/A {control(decode)})."
    faster = "faster" if decode.verdict == FASTER else "SLOWER"
    return f"Decoding is {faster}: {interval} ({PRUNED} against {UNPRUNED}; A/A {control(decode)})."


def _quality(record: ProfileRecord) -> str:
    quality = record.quality
    if record.arms.unpruned is None:
        return ""
    if quality.kl_mean is None:
        return "The cost in quality could not be judged: the answer has no second token."
    return (
        f"Cost in quality along the unpruned answer: KL {quality.kl_mean:.4f} nats a token (p95 "
        f"{format_number(quality.kl_p95, 4)}, max {format_number(quality.kl_max, 4)}), top-1 agreement "
        f"{format_percent(quality.top1_agreement)}."
    )
