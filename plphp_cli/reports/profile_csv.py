"""A profile in long form: one measurement a row, for spreadsheets and data frames."""

import csv
import io
from collections.abc import Iterator, Mapping

from plphp_cli.profiling.records import ProfileRecord, PromptProfile, SampleRecord

COLUMNS = ("prompt", "arm", "figure", "unit", "repeat", "step", "layer", "head", "image", "value")
_TIMES = ("preprocess_s", "vision_s", "prefill_s", "prune_s", "ttft_s", "decode_s", "end_to_end_s")
_ARM = (
    "kv_bytes_held",
    "kv_bytes_allocated",
    "kv_bytes_held_predicted",
    "kv_bytes_allocated_predicted",
    "peak_bytes",
    "peak_prefill_bytes",
    "peak_prefill_decoder_bytes",
    "peak_decode_bytes",
)
_QUALITY = ("kl_mean", "kl_p95", "kl_max", "top1_agreement", "first_divergence")
_LAYER = ("gamma", "rate", "vision_tokens_kept", "kv_bytes_held", "kv_bytes_full", "head_overlap")

Row = dict[str, object]


def profile_csv(record: ProfileRecord) -> str:
    """The samples, bytes, ratios, qualities and layers of every prompt, and the bound, with a header line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for prompt in record.prompts:
        for row in _rows(prompt):
            writer.writerow({"prompt": prompt.index + 1, **row})
    writer.writerows(_bound(record))
    return text.getvalue()


def _rows(prompt: PromptProfile) -> Iterator[Row]:
    for arm, profile in prompt.arms.items():
        yield from _samples(arm, profile.samples)
        for name in _ARM:
            if (value := getattr(profile, name)) is not None:
                yield {"arm": arm, "figure": name, "unit": "bytes", "value": value}
    if prompt.control is not None:
        yield from _samples("control", prompt.control)
    for name, ratio in prompt.ratios.items():
        for part in ("median", "low", "high", "control_low", "control_high"):
            if ratio is not None and (value := getattr(ratio, part)) is not None:
                arms = f"{ratio.numerator}/{ratio.denominator}"
                yield {"arm": arms, "figure": f"ratio_{name}_{part}", "unit": "1", "value": value}
    for name in _QUALITY:
        if (value := getattr(prompt.quality, name)) is not None:
            unit = "nats" if name.startswith("kl") else "token" if name == "first_divergence" else "1"
            yield {"arm": "pruned", "figure": name, "unit": unit, "value": value}
    for arm, value in prompt.quality.perplexity.items():
        if value is not None:
            yield {"arm": arm, "figure": "perplexity", "unit": "1", "value": value}
    yield from _layers(prompt)


def _samples(arm: str, samples: SampleRecord) -> Iterator[Row]:
    for name in _TIMES:
        for repeat, value in enumerate(getattr(samples, name), 1):
            yield {"arm": arm, "figure": name, "unit": "s", "repeat": repeat, "value": value}
    for repeat, steps in enumerate(samples.step_s, 1):
        for step, value in enumerate(steps, 2):
            yield {
                "arm": arm,
                "figure": "step_s",
                "unit": "s",
                "repeat": repeat,
                "step": step,
                "value": value,
            }


def _layers(prompt: PromptProfile) -> Iterator[Row]:
    for layer in prompt.layers:
        for name in _LAYER:
            if (value := getattr(layer, name)) is not None:
                unit = "bytes" if "bytes" in name else "tokens" if "tokens" in name else "1"
                yield {"arm": "pruned", "figure": name, "unit": unit, "layer": layer.index, "value": value}
        for number, head in enumerate(layer.heads):
            place: Row = {"arm": "pruned", "unit": "1", "layer": layer.index, "head": number}
            for name in ("gamma", "attention_kept"):
                if (value := getattr(head, name)) is not None:
                    yield {**place, "figure": f"head_{name}", "value": value}
            for image, share in enumerate(head.image_shares, 1):
                yield {**place, "figure": "head_image_share", "image": image, "value": share}


def _bound(record: ProfileRecord) -> Iterator[Row]:
    bound = record.bound
    if bound is None:
        return
    whole = {
        "bound_weight_bytes": ("bytes", bound.weight_bytes),
        "bound_ideal_decode_ratio": ("1", bound.ideal_decode_ratio),
        "bound_bandwidth_bytes_per_s": ("bytes/s", bound.bandwidth_bytes_per_s),
        "bound_operations_per_s": ("operations/s", bound.operations_per_s),
    }
    for name, (unit, value) in whole.items():
        if value is not None:
            yield {"figure": name, "unit": unit, "value": value}
    by_arm: dict[str, tuple[str, Mapping[str, float | None]]] = {
        "bound_kv_bytes_per_step": ("bytes", bound.kv_bytes_per_step),
        "bound_ideal_step_s": ("s", bound.ideal_step_s),
        "bound_attained": ("1", bound.attained),
    }
    for name, (unit, values) in by_arm.items():
        for arm, value in values.items():
            if value is not None:
                yield {"arm": arm, "figure": name, "unit": unit, "value": value}
