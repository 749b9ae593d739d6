"""A profile as one self-contained HTML page: no network, no scripts; what was generated stands as text."""

import json
from importlib.resources import files

from plphp_cli.profiling.records import PRUNED, STOCK, UNPRUNED, ProfileRecord, RatioProfile
from plphp_cli.reports.html import Cell, Row, table, text
from plphp_cli.reports.plots import bound_bar, latency
from plphp_cli.reports.profile_html_prompts import answers, layers_section, prompts_section
from plphp_cli.reports.profile_text import (
    capacity,
    headline,
    interval,
    plural,
    remarks,
    repaid,
    setting_line,
    standing,
    verdict,
)
from plphp_cli.units import (
    NOT_AVAILABLE,
    format_bytes,
    format_count,
    format_number,
    format_percent,
    format_rate,
    format_ratio,
    format_seconds,
)


def profile_html(record: ProfileRecord) -> str:
    """The whole page."""
    parts = [
        *_head(record),
        *_cards(record),
        *_bound(record),
        *_times(record),
        *_ratios(record),
        *_memory(record),
        *_quality(record),
        *layers_section(record),
        *prompts_section(record),
        *_environment(record),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>plphp profile: {text(record.model)}</title><style>\n{_style()}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _style() -> str:
    return (files("plphp_cli.reports") / "profile.css").read_text(encoding="utf-8")


def _head(record: ProfileRecord) -> list[str]:
    first, *rest = headline(record)
    setting = setting_line(record)
    subject = record.prompts[0].prompt if len(record.prompts) == 1 else f"{len(record.prompts)} prompts"
    return [
        f"<h1>plphp profile: {text(record.model)}</h1>",
        f'<p class="soft">{text(subject)}<br>{text(setting)}</p>',
        *(f'<p class="fault"><b>Fault:</b> {text(fault)}</p>' for fault in record.faults),
        f'<p class="lead">{text(first)}</p>',
        *(f"<p>{text(sentence)}</p>" for sentence in rest),
        f'<p class="soft">{text(standing(record))}</p>',
        *(f'<p class="soft">Note: {text(note)}</p>' for note in remarks(record)),
    ]


def _cards(record: ProfileRecord) -> list[str]:
    ratios, bound, quality = record.ratios, record.bound, record.quality
    decode, ttft, kv = (ratios.get(name) for name in ("decode", "ttft", "kv"))

    def said(name: str) -> str:
        ratio = ratios.get(name)
        return "not compared" if ratio is None else verdict(name, ratio)

    cards = [
        ("KV cache held, pruned / unpruned", format_ratio(kv.median if kv else None), "below 1 is good"),
        ("decode, unpruned / pruned", format_ratio(decode.median if decode else None), said("decode")),
        ("ideal decode ratio", format_ratio(bound.ideal_decode_ratio if bound else None), "the bound"),
    ]
    # Neither is known of dummy weights and their synthetic prompt.
    real = [
        ("TTFT, unpruned / pruned", format_ratio(ttft.median if ttft else None), said("ttft")),
        ("KL, nats a token", format_number(quality.kl_mean, 4), "unpruned || pruned, mean over tokens"),
        ("top-1 agreement", format_percent(quality.top1_agreement), "tokens 2 to T"),
    ]
    shown = (
        f'<div class="card"><span>{text(title)}</span><b>{text(value)}</b><span>{text(note)}</span></div>'
        for title, value, note in (*cards, *(real if record.dummy is None else ()))
    )
    return ['<div class="cards">', *shown, "</div>"]


def _bound(record: ProfileRecord) -> list[str]:
    bound = record.bound
    if bound is None:
        return []
    names = [name for name in (PRUNED, UNPRUNED, STOCK) if bound.kv_bytes_per_step.get(name) is not None]
    rows: list[Row] = [
        ["weights read by a step", *(format_bytes(bound.weight_bytes) for _ in names)],
        ["cache read by a step", *(format_bytes(bound.kv_bytes_per_step[name]) for name in names)],
        ["operations of a step", *(_operations(bound.operations_per_step[name]) for name in names)],
        ["least time of a step", *(format_seconds(bound.ideal_step_s[name]) for name in names)],
        ["share of it attained", *(format_percent(bound.attained[name]) for name in names)],
        ["such prompts that fit", *(_count(record, name, "prompts") for name in names)],
        ["such images in one prompt", *(_count(record, name, "images") for name in names)],
    ]
    rate = None if bound.operations_per_s is None else bound.operations_per_s / 1e9
    facts = (
        f"Measured: this device reads {format_bytes(bound.bandwidth_bytes_per_s)}/s and does "
        f"{format_number(rate, 1)} GFLOP/s; it has {format_bytes(bound.device_memory_bytes)} of memory. "
        f"{capacity(record)} Pruning has repaid its own cost: {repaid(record)}."
    )
    return [
        "<h2>The bound: what a decoding step must read</h2>",
        f'<div class="plots"><div>{bound_bar(record) or ""}</div><div>',
        *table(["", *names], rows),
        f'<p class="soft">{text(facts)}</p></div></div>',
        *_batches(record),
    ]


def _batches(record: ProfileRecord) -> list[str]:
    """Batch sizes beside each other: few columns, and what the table is for in its first rows."""
    batches = record.bound.table if record.bound is not None else ()
    if not batches:
        return []
    rows: list[Row] = [
        [f"{gain}x from", *(_tokens(row.reached_at_tokens[gain]) for row in batches)]
        for gain in batches[0].reached_at_tokens
    ]
    rows += [
        [f"at {_tokens(int(context))}", *(format_ratio(row.ideal_decode_ratio[context]) for row in batches)]
        for context in batches[0].ideal_decode_ratio
    ]
    return [
        "<p>From which context, in tokens, the ideal ratio passes a gain, and the ratio by context:</p>",
        *table(["batch size", *(str(row.batch) for row in batches)], rows),
    ]


def _tokens(count: int | None) -> str:
    if count is None:
        return "never"
    return f"{count // 1024}k" if count % 1024 == 0 else format_count(count)


def _operations(count: int | None) -> str:
    return NOT_AVAILABLE if count is None else f"{count / 1e6:.1f} M"


def _count(record: ProfileRecord, name: str, what: str) -> str:
    capacity = record.bound.capacity.get(name) if record.bound is not None else None
    return format_count(getattr(capacity, what) if capacity is not None else None)


def _times(record: ProfileRecord) -> list[str]:
    arms = record.arms.items()
    figures = {
        "image preprocessing": "preprocess_s",
        "prefill": "prefill_s",
        "  vision encoder": "vision_s",
        "  pruning itself": "prune_s",
        "TTFT": "ttft_s",
        "end to end": "end_to_end_s",
    }
    rows: list[Row] = [
        [_label(label), *(format_seconds(getattr(arm, name)) for _, arm in arms)]
        for label, name in figures.items()
    ]
    rows.append(["decode, tokens/s", *(format_rate(arm.decode_tokens_per_s, "").strip() for _, arm in arms)])
    for share in ("p50", "p90", "p99"):
        values = (format_seconds(getattr(arm.tpot_s, share) if arm.tpot_s else None) for _, arm in arms)
        rows.append([_label(f"  time per token, {share}"), *values])
    plan = record.plan
    how = (
        f"Medians of {plural(plan.repeats, 'alternated repeat')} after {plan.warmup} discarded; every timed "
        f"run makes {plural(plan.max_new_tokens, 'new token')}. Vision encoder and pruning itself are parts "
        "of prefill, each timed in a pass of its own."
    )
    return [
        "<h2>Times</h2>",
        f'<p class="soft">{how}</p>',
        '<div class="plots"><div>',
        *table(["", *(name for name, _ in arms)], rows),
        f"</div><div>{latency(record) or ''}</div></div>",
    ]


def _ratios(record: ProfileRecord) -> list[str]:
    rows: list[Row] = [
        [
            _ratio_label(name, ratio),
            Cell(verdict(name, ratio), css="two"),
            format_ratio(ratio.median),
            "exact" if name == "kv" else interval(ratio.low, ratio.high),
            interval(ratio.control_low, ratio.control_high),
        ]
        for name, ratio in record.ratios.items()
        if ratio is not None
    ]
    if not rows:
        return []
    note = (
        "Above 1 favours pruning, but for kv. A difference is called only if the interval excludes 1, a sign "
        "test agrees, the median is more than 2 % from 1 and lies outside the A/A interval, that of "
        "identical arms."
    )
    heads = ["ratio", "verdict", "median", "95 % interval", "A/A interval"]
    return [
        "<h2>Ratios of paired samples</h2>",
        *table(heads, rows, stack=True),
        f'<p class="soft">{note}</p>',
    ]


def _ratio_label(name: str, ratio: RatioProfile) -> str:
    over, under = (figure.partition(".")[0] for figure in (ratio.numerator, ratio.denominator))
    what = {"ttft": "TTFT", "kv": "KV held"}.get(name.removeprefix("loop_"), name.removeprefix("loop_"))
    return f"{what.replace('_', ' ')}, {over} / {under}"


def _label(label: str) -> Cell:
    """The name of a row; one that begins with blanks is a part of the row before."""
    return Cell(label.strip(), css="sub" if label.startswith(" ") else "")


def _memory(record: ProfileRecord) -> list[str]:
    arms = record.arms.items()
    figures = {
        "KV cache held": "kv_bytes_held",
        "KV cache held, predicted": "kv_bytes_held_predicted",
        "KV cache allocated": "kv_bytes_allocated",
        "KV cache allocated, predicted": "kv_bytes_allocated_predicted",
        "peak of live tensors, prefill": "peak_prefill_bytes",
        "  while the decoder ran": "peak_prefill_decoder_bytes",
        "peak of live tensors, decoding": "peak_decode_bytes",
    }
    rows: list[Row] = [
        [_label(label), *(format_bytes(getattr(arm, name)) for _, arm in arms)]
        for label, name in figures.items()
    ]
    shown = {
        "resident size, peak (shown only)": "rss_peak_bytes",
        "device used, peak, NVML (shown only)": "device_used_peak_bytes",
    }
    for label, name in shown.items():
        rows.append(
            [label, *(format_bytes(getattr(arm.memory, name) if arm.memory else None) for _, arm in arms)]
        )
    return ["<h2>Memory</h2>", *table(["", *(name for name, _ in arms)], rows)]


def _quality(record: ProfileRecord) -> list[str]:
    quality, texts = record.quality, record.quality.texts
    parts = ["<h2>Quality, judged along the unpruned answer</h2>"]
    if quality.kl_mean is not None:
        divergence = quality.first_divergence
        rows: list[Row] = [
            ["KL mean, by tokens / by prompts",
             f"{format_number(quality.kl_mean, 5)} / {format_number(quality.kl_mean_over_prompts, 5)} nats"],
            ["KL p95 / max", f"{format_number(quality.kl_p95, 4)} / {format_number(quality.kl_max, 4)} nats"],
            ["top-1 agreement", format_percent(quality.top1_agreement)],
            ["first divergence", "none" if divergence is None else f"token {divergence}"],
        ]  # fmt: skip
        for label, values in (
            ("perplexity of the unpruned answer", quality.perplexity),
            ("expected answer met exactly", quality.exact_match),
            ("tokens 2.. of the expected answer right", quality.answer_token_accuracy),
        ):
            if values.get(PRUNED) is not None:
                show = format_percent if "answer " in label and "perplexity" not in label else format_number
                rows.append([label, f"{show(values[PRUNED])} pruned, {show(values.get(UNPRUNED))} unpruned"])
        parts += table(["", ""], rows)
    if texts.pruned is None and texts.unpruned is None:
        return parts if len(parts) > 1 else []
    if len(record.prompts) > 1:
        parts.append('<p class="soft">The texts of the prompt with the largest KL:</p>')
    return [*parts, *answers(texts)]


def _environment(record: ProfileRecord) -> list[str]:
    noted = text(json.dumps(record.environment, indent=2))
    command = record.environment.get("command") or ""
    return [
        "<h2>Environment</h2>",
        f"<p><code>{text(str(command))}</code></p>",
        f"<details><summary>everything that was noted</summary><pre>{noted}</pre></details>",
    ]
