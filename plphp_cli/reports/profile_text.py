"""What a profile says in plain sentences: the same on the terminal and in the HTML page."""

from collections.abc import Callable, Sequence

from plphp_cli.profiling.bound_records import BoundRecord
from plphp_cli.profiling.records import (
    FASTER,
    FEW_PROMPTS,
    NO_DIFFERENCE,
    PRUNED,
    STOCK,
    UNPRUNED,
    CompileRecord,
    DummyRecord,
    LayerProfile,
    ProfileRecord,
    PromptProfile,
    RatioProfile,
)
from plphp_cli.profiling.records import ratio as ratio_of
from plphp_cli.reports.terminal import config_line
from plphp_cli.reports.text import one_line
from plphp_cli.results import MIN_DECODE_STEPS
from plphp_cli.units import (
    NOT_AVAILABLE,
    format_bytes,
    format_count,
    format_number,
    format_percent,
    format_ratio,
    format_seconds,
)

UNKNOWN = "-"
DUMMY = "dummy weights: speed and memory only"
# Figures whose names in the record are not what a reader calls them.
FIGURES = {
    "ttft": "TTFT",
    "end_to_end": "end to end",
    "kv": "KV held",
    "kl_mean": "KL mean",
    "top1_agreement": "top-1 agreement",
}
SHORT_ANSWER = 12


def headline(record: ProfileRecord) -> list[str]:
    """What pruning brought here: memory, speed, quality, and what was possible at all."""
    if record.arms.pruned is None or not record.prompts:
        return ["Nothing was measured yet."]
    sentences = [] if record.dummy is None else [_dummy(record)]
    sentences += [_memory(record), _speed(record)]
    if record.bound is not None:
        sentences.append(record.bound.speed_up_expected)
        if record.bound.failed_assumption is not None:
            sentences.append(_beaten(record.bound))
    if record.dummy is None:
        sentences.append(_quality(record))
    return [sentence for sentence in sentences if sentence]


def _dummy(record: ProfileRecord) -> str:
    assert record.dummy is not None
    return (
        f"Dummy weights: speed and memory only. {record.model} at its true size with random weights, a "
        f"synthetic prompt, {_rates_of(record.dummy)}; quality is N/A."
    )


def given_rates(layer_rates: Sequence[float], rates_from: str | None) -> str:
    """The layer rates that were given in place of the knobs of pruning, or the profile they are from."""
    if rates_from is not None:
        return f"layer rates (mean {sum(layer_rates) / len(layer_rates):.2f}) of {one_line(rates_from)}"
    rates = ", ".join(f"{rate:g}" for rate in layer_rates[:6])
    if len(layer_rates) == 1:
        return f"layer rate {rates} in every layer"
    return f"layer rates {rates}{', ...' if len(layer_rates) > 6 else ''} repeated over the layers"


def _rates_of(dummy: DummyRecord) -> str:
    return given_rates(dummy.layer_rates, dummy.rates_from)


def setting_line(record: ProfileRecord) -> str:
    """What decided how much was cut: the knobs of pruning, or the rates given in their place."""
    if record.dummy is not None:
        return _rates_of(record.dummy)
    if record.config is None:
        return "the setting is not known"
    return config_line(record.config) + (", calibrated" if record.config.calibrated else "")


def way_of_decoding(record: ProfileRecord) -> list[str]:
    """What a reader must know of how steps were run: batch and compilation."""
    found = []
    if record.batch_size > 1:
        found.append(
            f"Decoding is of {record.batch_size} copies of the prompt in one batch: tokens/s, a step's time, "
            "what it reads and the peak of decoding are of all together; prefill, TTFT, KV cache held and "
            "allocated are of one. One prefill and a whole batch's decoding make no time end to end: N/A."
        )
    if record.dummy is not None:
        found.append(
            "A synthetic prompt is not preprocessed and needs no vision encoder, so TTFT and end to end are "
            "N/A; scores of random weights say nothing, so rates are given and gamma is N/A."
        )
    if record.compiled is not None:
        told = compiled_steps(record.compiled)
        stock = "" if record.arms.stock is None else " Stock's steps are not compiled."
        found.append(f"{told[:1].upper()}{told[1:]}.{stock}")
    return found


def compiled_steps(made: CompileRecord) -> str:
    """What came of compiling, in words without a full stop."""
    if made.refused is not None and not made.joins:
        return f"steps ran uncompiled: {made.refused}"
    again = made.joins - made.batches
    parts = [
        f"compiled steps: {plural(made.captures, 'capture')} for {plural(made.batches, 'batch', 'batches')}"
        + (f", put together anew {plural(again, 'time')} as answers ended" if again else ""),
        f"hit rate {format_percent(made.hit_rate)}",
        f"{format_seconds(made.compile_s)} of compiling",
    ]
    if made.evictions:
        parts.append(f"{plural(made.evictions, 'capture')} let go for newer ones")
    if made.refused is not None:
        parts.append(f"then steps ran uncompiled: {made.refused}")
    return ", ".join(parts)


def standing(record: ProfileRecord) -> str:
    """How much the profile may be relied upon, by its number of prompts."""
    count = len(record.prompts)
    if record.dummy is not None:
        return "One synthetic prompt: what it shows holds for any of that size."
    if count == 1:
        return "One prompt is an anecdote: indication only. Give prompts with --data for a verdict."
    if count < FEW_PROMPTS:
        return f"{count} prompts are few (under {FEW_PROMPTS}): indication only."
    return f"Over {format_count(count)} prompts."


def remarks(record: ProfileRecord) -> list[str]:
    """What a reader should know before believing the figures."""
    # What a dummy's headline says is not repeated.
    found = [*way_of_decoding(record), *(w for w in record.warnings if record.dummy is None or w != DUMMY)]
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


def verdict(name: str, ratio: RatioProfile) -> str:
    """What may be said of a ratio."""
    if name == "kv":
        return "exact"
    return ratio.verdict or "too few pairs"


def interval(low: float | None, high: float | None) -> str:
    """`0.990 to 1.010`; N/A where there is none."""
    return NOT_AVAILABLE if low is None or high is None else f"{low:.3f} to {high:.3f}"


def groups(layer: LayerProfile) -> str:
    """The group of a layer; over prompts that disagree how many have which."""
    if layer.group is not None:
        return layer.group
    return ", ".join(f"{count} {name}" for name, count in layer.groups.items()) or UNKNOWN


def worst_first(record: ProfileRecord) -> list[PromptProfile]:
    """The prompts by falling KL; those without one last, in their order."""

    def rank(prompt: PromptProfile) -> tuple[bool, float]:
        found = prompt.quality.kl_mean
        return found is None, -(found or 0.0)

    return sorted(record.prompts, key=rank)


def worst_prompts(record: ProfileRecord) -> list[tuple[str, list[tuple[PromptProfile, str]]]]:
    """By which figure, and the worst prompts with theirs."""
    by_index = {prompt.index: prompt for prompt in record.prompts}
    shows: dict[str, tuple[str, Callable[[PromptProfile], str]]] = {
        "kl": ("largest KL", lambda p: f"{format_number(p.quality.kl_mean, 4)} nats"),
        "decode": ("smallest decode ratio", lambda p: format_ratio(ratio_of(p.ratios, "decode"))),
    }
    return [
        (shows[name][0], [(by_index[index], shows[name][1](by_index[index])) for index in found])
        for name, found in record.worst.items()
        if found
    ]


def capacity(record: ProfileRecord) -> str:
    """What pruning adds to what fits in memory, in a sentence; empty where it is not known."""
    bound = record.bound
    found = {} if bound is None else bound.capacity
    pruned, unpruned = found.get(PRUNED), found.get(UNPRUNED)
    if pruned is None or unpruned is None or pruned.prompts is None or unpruned.prompts is None:
        return ""
    more = pruned.prompts - unpruned.prompts
    sentence = f"Pruned, {format_count(more)} more such prompts fit in memory than unpruned"
    if not more:
        sentence = "Pruned, as many such prompts fit in memory as unpruned"
    ended = sorted({c.images_limit for c in (pruned, unpruned) if c.images_limit})
    return sentence + (f"; what ends the images of one prompt: {', '.join(ended)}." if ended else ".")


def plural(count: int, what: str, many: str | None = None) -> str:
    """`1 repeat`, `9 repeats`; `many` where the plural is another word."""
    return f"{format_count(count)} {what if count == 1 else many or what + 's'}"


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
    kv, pruned, unpruned = record.ratios.get("kv"), record.arms.pruned, record.arms.unpruned
    full = sum(layer.kv_bytes_full or 0 for layer in record.layers)
    held = pruned.kv_bytes_held if pruned is not None else None
    if held is None and unpruned is not None and unpruned.kv_bytes_held is not None:
        return (
            f"What pruning holds was not measured; unpruned, a prompt's KV cache holds "
            f"{format_bytes(unpruned.kv_bytes_held)}."
        )
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
    if decode.low is None or decode.high is None:
        count = len(decode.samples)
        few = "1 pair of samples is" if count == 1 else f"{plural(count, 'pair')} of samples are"
        return f"Decoding at {format_ratio(decode.median)} the unpruned speed: {few} too few for a verdict."
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
        return f"The cost in quality could not be judged: {_why_not_judged(record)}."
    return (
        f"Cost in quality along the unpruned answer: KL {divergence(record)}, top-1 agreement "
        f"{format_percent(quality.top1_agreement)}."
    )


def divergence(record: ProfileRecord) -> str:
    """The KL's mean, or over several prompts both means by name, its p95 and its largest."""
    quality = record.quality
    tails = f"p95 {format_number(quality.kl_p95, 4)}, max {format_number(quality.kl_max, 4)}"
    mean = f"{format_number(quality.kl_mean, 4)} nats a token"
    if len(record.prompts) > 1:
        mean += f" as the mean of tokens, {format_number(quality.kl_mean_over_prompts, 4)} as that of prompts"
    return f"{mean} ({tails})"


def _why_not_judged(record: ProfileRecord) -> str:
    failed = [name for name, arm in record.arms.items() if arm.failed is not None and name != STOCK]
    if failed:
        return f"the {' and the '.join(failed)} arm failed"
    tokens = record.quality.answer_tokens
    if tokens is None:
        return "the answer was not compared"
    if tokens > len(record.prompts):
        return "the model's logits are not finite"
    return "the answer has no second token"
