"""A profile in long form: one measurement a row, for spreadsheets and data frames.

A row with an empty `prompt` is about the whole profile: its environment, and the figures over all prompts.
Of one prompt alone these are that prompt's once more, but for the single decoding steps (`step_s`).
"""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from plphp_cli.profiling.records import ARMS, ProfileRecord
from plphp_cli.serialize import to_dict

COLUMNS = ("prompt", "arm", "figure", "unit", "repeat", "step", "layer", "head", "image", "value")
# Told row by row from the prompts, or at the head of the file.
_OVERALL = ("arms", "ratios", "bound", "quality", "totals", "spread", "worst")
_HEAD = ("schema_version", "command", "model", "interrupted", "warnings", "faults", "batch_size")
_CIRCUMSTANCES = ("plan", "config", "dummy", "compiled", "environment")
# Spread over rows of their own: samples of the A/A control, layers, prompts.
_ROWS = ("control", "layers", "prompts")
_PROMPT = ("line", "prompt", "system", "images", "prompt_tokens", "vision_tokens")

Row = dict[str, Any]


def profile_csv(record: ProfileRecord) -> str:
    """Everything that the record holds and is not null, with a header line; lists of texts are JSON."""
    values = to_dict(record)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for name in (*_HEAD, *_CIRCUMSTANCES):
        writer.writerows(_flat(name, values[name]))
    writer.writerows(row for row in _samples(values) if row["figure"] != "step_s")
    writer.writerows(_figures({name: values[name] for name in _OVERALL}))
    writer.writerows(row for layer in values["layers"] for row in _layer(layer))
    for prompt in values["prompts"]:
        own = {"prompt": prompt["index"] + 1}
        for name in _PROMPT:
            writer.writerows(own | row for row in _flat(name, prompt[name]))
        writer.writerows(own | row for row in _samples(prompt))
        figures = {name: prompt[name] for name in ("arms", "ratios", "quality")}
        writer.writerows(own | row for row in _figures(figures))
        writer.writerows(own | row for layer in prompt["layers"] for row in _layer(layer))
    return text.getvalue()


def _figures(values: Row) -> Iterator[Row]:
    """Arms, ratios and the rest; a part that is named after an arm goes to the column `arm`."""
    for arm, profile in (values.pop("arms") or {}).items():
        if profile is not None:
            parts = {name: part for name, part in profile.items() if name != "samples"}
            yield from ({**row, "arm": arm} for name, part in parts.items() for row in _flat(name, part))
    for name, ratio in values.pop("ratios").items():
        if ratio is not None:
            arms = f"{ratio['numerator']}/{ratio['denominator']}"
            parts = {part: ratio[part] for part in ("median", "low", "high", "control_low", "control_high")}
            parts["verdict"] = ratio["verdict"]
            rows = (row for part, value in parts.items() for row in _flat(f"ratio_{name}_{part}", value))
            yield from ({**row, "arm": arms} for row in rows)
            for repeat, value in enumerate(ratio["samples"], 1):
                yield {"arm": arms, "figure": f"ratio_{name}", "unit": "1", "repeat": repeat, "value": value}
    for name, value in (values.pop("bound", None) or {}).items():
        yield from map(_by_arm, _flat(f"bound_{name}", value))
    for name, value in values.pop("quality").items():
        yield from map(_by_arm, _flat(name, value))
    for name, value in values.items():
        yield from map(_by_arm, _flat(name, value))


def _samples(owner: Row) -> Iterator[Row]:
    """Raw samples of every arm and of the A/A control, of one prompt or summed over all."""
    every = {arm: profile["samples"] for arm, profile in owner["arms"].items() if profile is not None}
    if owner["control"] is not None:
        every["control"] = owner["control"]
    for arm, samples in every.items():
        for name, values in samples.items():
            for repeat, value in enumerate(values, 1):
                place = {"arm": arm, "figure": name, "unit": "s", "repeat": repeat}
                if name != "step_s":
                    yield {**place, "value": value}
                    continue
                # The first token belongs to prefill: steps begin with the second.
                for step, seconds in enumerate(value, 2):
                    yield {**place, "step": step, "value": seconds}


def _layer(layer: Row) -> Iterator[Row]:
    place: Row = {"arm": "pruned", "layer": layer["index"]}
    for name, value in layer.items():
        if name not in ("index", "heads", "image_shares"):
            yield from (place | row for row in _flat(name, value))
    for image, share in enumerate(layer["image_shares"], 1):
        yield {**place, "figure": "image_share", "unit": "1", "image": image, "value": share}
    for number, head in enumerate(layer["heads"]):
        own = {**place, "unit": "1", "head": number}
        for name in ("gamma", "attention_kept"):
            if head[name] is not None:
                yield {**own, "figure": f"head_{name}", "value": head[name]}
        for image, share in enumerate(head["image_shares"], 1):
            yield {**own, "figure": "head_image_share", "image": image, "value": share}


def _flat(name: str, value: Any) -> Iterator[Row]:
    """A value as rows: objects part by part with dotted names, lists as JSON, nothing for null."""
    if isinstance(value, dict):
        for part, inner in value.items():
            yield from _flat(f"{name}.{part}", inner)
    elif isinstance(value, list) and value and all(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value, 1):
            yield from _flat(f"{name}.{number}", inner)
    elif isinstance(value, bool):
        yield {"figure": name, "unit": "bool", "value": str(value).lower()}
    elif value is not None:
        shown = json.dumps(value) if isinstance(value, list) else value
        yield {"figure": name, "unit": _unit(name, value), "value": shown}


def _by_arm(row: Row) -> Row:
    """`perplexity.pruned` as the figure `perplexity` of the arm `pruned`."""
    for arm in ARMS:
        before, dot, after = row["figure"].partition(f".{arm}")
        if dot and (not after or after.startswith(".")):
            return {**row, "figure": before + after, "arm": arm}
    return row


def _unit(name: str, value: Any) -> str:
    """The unit that a figure's name tells; `1` for shares, ratios and counts."""
    last = name.rpartition(".")[2]
    known = (
        (isinstance(value, str | list), "text"),
        (last.endswith("bytes_per_s"), "bytes/s"),
        (last.endswith("tokens_per_s"), "tokens/s"),
        (last.endswith("per_s"), "operations/s"),
        ("bytes" in name, "bytes"),
        (last.startswith("kl_") or name.startswith("spread.kl"), "nats"),
        (last.endswith("_s") or last in ("p50", "p90", "p99"), "s"),
        ("tokens" in last, "tokens"),
        (last == "first_divergence", "token"),
    )
    return next((unit for holds, unit in known if holds), "1")
