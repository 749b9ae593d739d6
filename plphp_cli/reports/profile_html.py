"""A profile as one self-contained HTML page: no network, no scripts; what was generated stands as text."""

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from plphp_cli.profiling.records import PRUNED, STOCK, UNPRUNED, ProfileRecord, RatioProfile
from plphp_cli.reports.diff import Piece, word_diff
from plphp_cli.reports.plots import bound_bar, head_map, latency
from plphp_cli.reports.profile_text import headline, remarks, repaid, standing
from plphp_cli.reports.text import visible
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

Cells = Sequence[str]
_NO_TEXT = '<span class="soft">(no text)</span>'


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
        *_layers(record),
        *_prompts(record),
        *_environment(record),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>plphp profile: {_text(record.model)}</title><style>\n{_style()}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _style() -> str:
    return (files("plphp_cli.reports") / "profile.css").read_text(encoding="utf-8")


def _head(record: ProfileRecord) -> list[str]:
    first, *rest = headline(record)
    knobs = record.config
    setting = f"r {knobs.r:g}, delta_r {knobs.delta_r:g}, alpha {knobs.alpha:.3g}, beta {knobs.beta:.3g}"
    calibrated = ", calibrated" if knobs.calibrated else ""
    subject = record.prompts[0].prompt if len(record.prompts) == 1 else f"{len(record.prompts)} prompts"
    return [
        f"<h1>plphp profile: {_text(record.model)}</h1>",
        f'<p class="soft">{_text(subject)}<br>{setting}{calibrated}</p>',
        *(f'<p class="fault"><b>Fault:</b> {_text(fault)}</p>' for fault in record.faults),
        f'<p class="lead">{_text(first)}</p>',
        *(f"<p>{_text(sentence)}</p>" for sentence in rest),
        f'<p class="soft">{_text(standing(record))}</p>',
        *(f'<p class="soft">Note: {_text(note)}</p>' for note in remarks(record)),
    ]


def _cards(record: ProfileRecord) -> list[str]:
    ratios, bound, quality = record.ratios, record.bound, record.quality
    decode, ttft, kv = (ratios.get(name) for name in ("decode", "ttft", "kv"))

    def verdict(name: str) -> str:
        ratio = ratios.get(name)
        return "not compared" if ratio is None else ratio.verdict or "too few pairs for a verdict"

    cards = [
        ("KV cache held, pruned / unpruned", format_ratio(kv.median if kv else None), "below 1 is good"),
        ("decode, unpruned / pruned", format_ratio(decode.median if decode else None), verdict("decode")),
        ("TTFT, unpruned / pruned", format_ratio(ttft.median if ttft else None), verdict("ttft")),
        ("ideal decode ratio", format_ratio(bound.ideal_decode_ratio if bound else None), "the bound"),
        ("KL, nats a token", format_number(quality.kl_mean, 4), "unpruned || pruned, mean"),
        ("top-1 agreement", format_percent(quality.top1_agreement), "tokens 2 to T"),
    ]
    shown = (
        f'<div class="card"><span>{_text(title)}</span><b>{_text(value)}</b><span>{_text(note)}</span></div>'
        for title, value, note in cards
    )
    return ['<div class="cards">', *shown, "</div>"]


def _bound(record: ProfileRecord) -> list[str]:
    bound = record.bound
    if bound is None:
        return []
    names = [name for name in (PRUNED, UNPRUNED, STOCK) if bound.kv_bytes_per_step.get(name) is not None]
    rows = [
        ["least time of a step", *(format_seconds(bound.ideal_step_s[name]) for name in names)],
        ["share of it attained", *(format_percent(bound.attained[name]) for name in names)],
        ["such prompts that fit", *(_count(record, name, "prompts") for name in names)],
        ["such images that fit", *(_count(record, name, "images") for name in names)],
    ]
    rate = None if bound.operations_per_s is None else bound.operations_per_s / 1e9
    facts = (
        f"Measured: this device reads {format_bytes(bound.bandwidth_bytes_per_s)}/s and does "
        f"{format_number(rate, 1)} GFLOP/s; it has {format_bytes(bound.device_memory_bytes)} of memory. "
        f"Pruning has repaid its own cost: {repaid(record)}."
    )
    gains = list(bound.table[0].reached_at_tokens) if bound.table else []
    contexts = list(bound.table[0].ideal_decode_ratio) if bound.table else []
    batches = [
        [
            str(row.batch),
            *(format_ratio(value) for value in row.ideal_decode_ratio.values()),
            *("never" if at is None else _tokens(at) for at in row.reached_at_tokens.values()),
        ]
        for row in bound.table
    ]
    heads = ["batch", *(f"{_tokens(int(c))} tokens" for c in contexts), *(f"{g}x from" for g in gains)]
    lead = "Ideal decode ratio by batch size and context, and from which context it passes a gain:"
    return [
        "<h2>The bound: what a decoding step must read</h2>",
        f'<div class="plots"><div>{bound_bar(record) or ""}</div><div>',
        *_table(["", *names], rows),
        f'<p class="soft">{_text(facts)}</p></div></div>',
        *([f"<p>{lead}</p>"] if batches else []),
        *(_table(heads, batches) if batches else []),
    ]


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else format_count(count)


def _count(record: ProfileRecord, name: str, what: str) -> str:
    capacity = record.bound.capacity.get(name) if record.bound is not None else None
    return format_count(getattr(capacity, what) if capacity is not None else None)


def _times(record: ProfileRecord) -> list[str]:
    arms = record.arms.items()
    figures = {
        "image preprocessing": "preprocess_s",
        "prefill": "prefill_s",
        "of it vision encoder": "vision_s",
        "of it pruning itself": "prune_s",
        "TTFT": "ttft_s",
        "end to end": "end_to_end_s",
    }
    rows = [
        [label, *(format_seconds(getattr(arm, name)) for _, arm in arms)] for label, name in figures.items()
    ]
    rows.append(["decode, tokens/s", *(format_rate(arm.decode_tokens_per_s, "").strip() for _, arm in arms)])
    for share in ("p50", "p90", "p99"):
        values = (format_seconds(getattr(arm.tpot_s, share) if arm.tpot_s else None) for _, arm in arms)
        rows.append([f"time per token, {share}", *values])
    plan = record.plan
    how = (
        f"Medians of {plan.repeats} alternated repeats after {plan.warmup} discarded; every timed run makes "
        f"{plan.max_new_tokens} new tokens."
    )
    return [
        "<h2>Times</h2>",
        f'<p class="soft">{how}</p>',
        '<div class="plots"><div>',
        *_table(["", *(name for name, _ in arms)], rows),
        f"</div><div>{latency(record) or ''}</div></div>",
    ]


def _ratios(record: ProfileRecord) -> list[str]:
    rows = [
        [
            _ratio_label(name, ratio),
            format_ratio(ratio.median),
            "exact" if name == "kv" else f"{ratio.low:.3f} to {ratio.high:.3f}",
            NOT_AVAILABLE
            if ratio.control_low is None
            else f"{ratio.control_low:.3f} to {ratio.control_high:.3f}",
            ratio.verdict or "",
        ]
        for name, ratio in record.ratios.items()
        if ratio is not None
    ]
    if not rows:
        return []
    note = (
        "Above 1 favours pruning, but for kv. A difference is called only if the interval excludes 1, the "
        "median is more than 2 % from 1 and lies outside the A/A interval, that of identical arms."
    )
    heads = ["ratio", "median", "95 % interval", "A/A interval", "verdict"]
    return ["<h2>Ratios of paired samples</h2>", *_table(heads, rows), f'<p class="soft">{note}</p>']


def _ratio_label(name: str, ratio: RatioProfile) -> str:
    over, under = (figure.partition(".")[0] for figure in (ratio.numerator, ratio.denominator))
    what = {"ttft": "TTFT", "kv": "KV held"}.get(name.removeprefix("loop_"), name.removeprefix("loop_"))
    return f"{what.replace('_', ' ')}, {over} / {under}"


def _memory(record: ProfileRecord) -> list[str]:
    arms = record.arms.items()
    figures = {
        "KV cache held": "kv_bytes_held",
        "KV cache held, predicted": "kv_bytes_held_predicted",
        "KV cache allocated": "kv_bytes_allocated",
        "KV cache allocated, predicted": "kv_bytes_allocated_predicted",
        "peak of live tensors, prefill": "peak_prefill_bytes",
        "  of it while the decoder ran": "peak_prefill_decoder_bytes",
        "peak of live tensors, decoding": "peak_decode_bytes",
    }
    rows = [
        [label, *(format_bytes(getattr(arm, name)) for _, arm in arms)] for label, name in figures.items()
    ]
    shown = {
        "resident size, peak (shown only)": "rss_peak_bytes",
        "device used, peak, NVML (shown only)": "device_used_peak_bytes",
    }
    for label, name in shown.items():
        rows.append(
            [label, *(format_bytes(getattr(arm.memory, name) if arm.memory else None) for _, arm in arms)]
        )
    return ["<h2>Memory</h2>", *_table(["", *(name for name, _ in arms)], rows)]


def _quality(record: ProfileRecord) -> list[str]:
    quality, texts = record.quality, record.quality.texts
    parts = ["<h2>Quality, judged along the unpruned answer</h2>"]
    if quality.kl_mean is not None:
        divergence = quality.first_divergence
        rows = [
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
        parts += _table(["", ""], rows)
    if texts.pruned is None:
        return parts if quality.kl_mean is not None else []
    first, second = word_diff(texts.pruned, texts.unpruned if texts.unpruned is not None else texts.pruned)
    if len(record.prompts) > 1:
        parts.append('<p class="soft">The texts of the prompt with the largest KL:</p>')
    parts.append(f'<div class="soft">pruned</div><div class="answer">{_marked(first) or _NO_TEXT}</div>')
    if texts.unpruned is not None:
        parts.append(
            f'<div class="soft">unpruned</div><div class="answer">{_marked(second) or _NO_TEXT}</div>'
        )
    if texts.answer is not None:
        parts.append(f'<div class="soft">expected</div><div class="answer">{_text(texts.answer)}</div>')
    return parts


def _layers(record: ProfileRecord) -> list[str]:
    if not record.layers:
        return []
    rows = [
        [
            str(layer.index),
            _bar(layer.gamma),
            layer.group or "-",
            format_number(layer.rate),
            format_number(layer.vision_tokens_kept, 0),
            format_bytes(layer.kv_bytes_held),
            format_bytes(layer.kv_bytes_held_per_head),
            format_bytes(layer.kv_bytes_full),
            format_number(layer.head_overlap),
            ", ".join(format_percent(share, 0) for share in layer.image_shares) or "-",
        ]
        for layer in record.layers
    ]
    heads = [
        "layer",
        "gamma",
        "group",
        "rate",
        "kept",
        "KV held",
        "per head",
        "uncut",
        "overlap",
        "per image",
    ]
    which = "" if len(record.prompts) == 1 else ", prompt 1"
    maps = (
        head_map(record, "gamma", f"attention given to vision tokens (gamma by head{which})"),
        head_map(record, "attention_kept", f"share of that attention on tokens kept{which}"),
    )
    return [
        "<h2>Where the attention goes</h2>",
        '<div class="plots">',
        *(f"<div>{svg}</div>" for svg in maps if svg is not None),
        "</div>",
        *_table(heads, rows, raw=(1,)),
        '<p class="soft">kept: vision tokens per KV head; overlap: mean Jaccard of what two heads of the '
        "layer keep; per image: share of its vision tokens kept.</p>",
    ]


def _prompts(record: ProfileRecord) -> list[str]:
    if len(record.prompts) < 2:
        return []
    rows = [
        [
            str(prompt.index + 1),
            f"{_text(prompt.prompt)}",
            format_ratio(_median(prompt.ratios.get("kv"))),
            format_ratio(_median(prompt.ratios.get("decode"))),
            format_number(prompt.quality.kl_mean, 4),
            format_percent(prompt.quality.top1_agreement),
        ]
        for prompt in record.prompts
    ]
    spread = [
        [name, *(f"{value:.3f}" for value in (s.minimum, s.quartile_1, s.median, s.quartile_3, s.maximum))]
        for name, s in record.spread.items()
    ]
    worst = "; ".join(
        f"by {name}: {', '.join(f'#{index + 1}' for index in found)}" for name, found in record.worst.items()
    )
    return [
        f"<h2>Over {len(record.prompts)} prompts</h2>",
        *_table(["", "minimum", "quartile 1", "median", "quartile 3", "maximum"], spread),
        f"<p>Worst prompts, {_text(worst)}.</p>",
        *_table(["#", "prompt", "KV", "decode", "KL", "agreement"], rows, raw=(1,)),
    ]


def _median(ratio: object) -> float | None:
    return getattr(ratio, "median", None)


def _environment(record: ProfileRecord) -> list[str]:
    text = escape(visible(json.dumps(record.environment, indent=2)))
    command = record.environment.get("command") or ""
    return [
        "<h2>Environment</h2>",
        f"<p><code>{_text(str(command))}</code></p>",
        f"<details><summary>everything that was noted</summary><pre>{text}</pre></details>",
    ]


def _table(heads: Cells, rows: Sequence[Cells], raw: tuple[int, ...] = ()) -> list[str]:
    """A table that scrolls by itself on a narrow page; columns in `raw` are HTML already."""

    def row(cells: Cells) -> str:
        shown = (
            f"<td{' class=text' if place in raw and heads[place] == 'prompt' else ''}>"
            f"{cell if place in raw else _text(cell)}</td>"
            for place, cell in enumerate(cells)
        )
        return f"<tr>{''.join(shown)}</tr>"

    head = "".join(f"<th{' class=text' if cell == 'prompt' else ''}>{_text(cell)}</th>" for cell in heads)
    return [f'<div class="wide"><table><tr>{head}</tr>', *(row(cells) for cells in rows), "</table></div>"]


def _bar(gamma: float | None) -> str:
    if gamma is None:
        return "-"
    return f'{gamma:.3f} <span class="bar"><i style="width:{gamma * 100:.1f}%"></i></span>'


def _marked(pieces: Sequence[Piece]) -> str:
    return "".join(
        _text(piece.text) if piece.same else f"<mark>{_text(piece.text)}</mark>" for piece in pieces
    )


def _text(text: str) -> str:
    return escape(visible(text))
