"""The points of a sweep, one a row, with units in the names: `summary.csv`."""

import csv
import io

from plphp_cli.sweep.labels import KNOBS, value
from plphp_cli.sweep.records import Interval, Point, SweepRecord

# Column, and the attribute of a point that is an interval.
_INTERVALS = {
    "kv_ratio": "kv_ratio",
    "kl_mean_nats": "kl_mean",
    "top1_agreement": "top1_agreement",
    "accuracy": "accuracy",
    "accuracy_drop": "accuracy_drop",
    "decode_ratio": "decode_ratio",
}
_PLAIN = {
    "kv_bytes_held_mean": "kv_bytes_held",
    "kl_max_nats": "kl_max",
    "decode_tokens_per_s": "decode_tokens_per_s",
    "decode_verdict": "decode_verdict",
    "on_front": "on_front",
    "on_accuracy_front": "on_accuracy_front",
    "feasible": "feasible",
    "seeds": "seeds",
    "kl_seed_sd_nats": "seed_sd",
    "accuracy_seed_sd": "accuracy_sd",
}
COLUMNS = (
    "method",
    *KNOBS,
    "prompts",
    *(f"{name}{end}" for name in _INTERVALS for end in ("", "_low", "_high")),
    *_PLAIN,
    "recommended",
)


def sweep_csv(record: SweepRecord) -> str:
    """A header line and a row per point, in the order of the record; what is not known is empty.

    `_low` and `_high` are the ends of the 95 % intervals. The knobs of an ablation are those of the setting
    whose bytes it matches. Truth values are `true` and `false`; layers to skip are separated by spaces.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    best = record.recommendation.point if record.recommendation is not None else None
    for place, point in enumerate(record.points):
        row = _row(point) | {"recommended": place == best}
        writer.writerow({name: _cell(found) for name, found in row.items()})
    return text.getvalue()


def _row(point: Point) -> dict[str, object]:
    row: dict[str, object] = {"method": point.setting.method, "prompts": point.prompts}
    config = point.setting.config
    if config is not None:
        row |= {knob: getattr(config, knob) for knob in KNOBS}
        row["skip_layers"] = value(config, "skip_layers").replace(",", " ") if config.skip_layers else None
    for name, attribute in _INTERVALS.items():
        found: Interval | None = getattr(point, attribute)
        if found is not None:
            row |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
    return row | {name: getattr(point, attribute) for name, attribute in _PLAIN.items()}


def _cell(found: object) -> object:
    if found is None:
        return ""
    return str(found).lower() if isinstance(found, bool) else found
