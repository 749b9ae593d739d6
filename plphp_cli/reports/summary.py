"""What a run brought, in plain sentences: the saving, the speed, the ideal bound, and what is not so good."""

from plphp_cli.reports.diff import first_difference
from plphp_cli.results import MIN_DECODE_STEPS, ArmRecord, RunRecord
from plphp_cli.units import format_bytes, format_count, format_percent, format_ratio, format_seconds

SINGLE_SAMPLE = "This is a single sample of each arm, not a verdict: `plphp profile` gives one."

# Differences in speed within 2 % are not called differences.
_NOISE = 0.02


def verdict(record: RunRecord) -> str:
    """One sentence: bytes held and decode speed against unpruned, beside what reading fewer bytes allows."""
    return f"{_saving(record.pruned)}{_speed(record)}{_bound(record)}."


def remarks(record: RunRecord) -> list[str]:
    """What a reader should know before believing the figures; the unpleasant included."""
    pruned, unpruned = record.pruned, record.unpruned
    found: list[str] = []
    if record.interrupted:
        found.append("Interrupted: the figures are of what had run until then.")
    if unpruned is not None and not record.interrupted:
        place = first_difference(pruned.text, unpruned.text)
        if place is not None:
            found.append(
                f"The cut changed the answer, from word {place} on: judge by the texts if it matters."
            )
    decode, bound = _ratio(record, "decode"), record.bound
    if decode is not None and bound is not None and decode > bound.ideal_decode_ratio + _NOISE:
        found.append(
            "The speed measured beats the bound: noise of a single sample, or attention that is limited by "
            "arithmetic instead of bytes read (usual on a CPU)."
        )
    ttft = _ratio(record, "ttft")
    if ttft is not None and ttft < 1 - _NOISE and unpruned is not None:
        found.append(
            f"The first token came later with pruning ({format_seconds(pruned.ttft_s)} against "
            f"{format_seconds(unpruned.ttft_s)}): scores and cuts add to prefill, which gets no shorter."
        )
    if 0 < pruned.new_tokens < 12 and pruned.stop_reason == "eos":
        found.append(
            "A short answer hides what a cut costs: its first token always comes from the whole prompt."
        )
    if pruned.stop_reason == "length" or (unpruned is not None and unpruned.stop_reason == "length"):
        limit = format_count(record.generation.max_new_tokens)
        found.append(f"Generation stopped at the limit of {limit} new tokens (--max-new-tokens).")
    if record.vision_tokens == 0:
        found.append("The prompt holds no vision tokens, so there was nothing to prune.")
    return found


def _saving(pruned: ArmRecord) -> str:
    held, full = pruned.kv_bytes_held, pruned.kv_bytes_full
    if held is None or not full:
        return "Nothing was cut yet"
    if held == full:
        return f"Pruning cut nothing: all {format_bytes(full)} of the prompt's KV cache were held"
    return (
        f"Pruning held {format_percent(held / full, 0)} of the prompt's KV cache "
        f"({format_bytes(held)} of {format_bytes(full)})"
    )


def _speed(record: RunRecord) -> str:
    if record.pruned.kv_bytes_held is None:
        return ""
    if record.unpruned is None:
        return "; speed was not compared"
    decode = _ratio(record, "decode")
    if decode is None:
        return f"; decoding was too short to time (under {MIN_DECODE_STEPS} steps)"
    shown = format_ratio(decode)
    if decode > 1 + _NOISE:
        return f" and decoded at {shown} the unpruned speed"
    if decode < 1 - _NOISE:
        return f" but decoded more slowly, at {shown} the unpruned speed"
    return f" and decoded no faster ({shown} the unpruned speed, within {_NOISE:.0%})"


def _bound(record: RunRecord) -> str:
    if record.bound is None:
        return ""
    ideal, share = record.bound.ideal_decode_ratio, record.bound.kv_share_unpruned
    text = (
        f"; the ideal bound is {ideal:.3f}x, because the cache is {format_percent(share)} of the bytes "
        "that an unpruned decoding step reads"
    )
    if ideal < 1 + _NOISE:
        text += "; a gain that small does not show in a measurement"
    return text


def _ratio(record: RunRecord, name: str) -> float | None:
    return record.ratios[name].value if name in record.ratios else None
