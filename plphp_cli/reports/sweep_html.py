"""A sweep as one self-contained HTML page: no network; readable without its script, which adds choice."""

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from plphp_cli.reports.sweep_heatmap import heatmap
from plphp_cli.reports.sweep_plots import accuracy_scatter, kl_scatter, knob_plot, legend_marks
from plphp_cli.reports.sweep_text import (
    chosen,
    conclusions,
    cost_lines,
    interval_only,
    keeps,
    knobs_of,
    merit,
    method_kl,
    remarks,
    scope_line,
    skipped_lines,
    speed,
    standing,
    title,
    with_interval,
)
from plphp_cli.reports.text import visible
from plphp_cli.sweep.labels import NUMERIC, format_nats, label, value
from plphp_cli.sweep.recommendation import limit_text
from plphp_cli.sweep.records import BASELINE, PLPHP, Interval, Point, SweepRecord
from plphp_cli.units import (
    NOT_AVAILABLE,
    format_bytes,
    format_number,
    format_percent,
    format_rate,
    format_ratio,
)

# Nothing is fetched from anywhere, and a browser is told to see to it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def sweep_html(record: SweepRecord) -> str:
    """The whole page."""
    parts = [
        *_head(record),
        *_cards(record),
        *_notes(record),
        *_scatters(record),
        *heatmap(record),
        *_ablations(record),
        *_points(record),
        *_prompts(record),
        *_ends(record),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>plphp sweep: {_text(record.model)}</title><style>\n{_file('sweep.css')}</style></head>"
        "<body>\n" + "\n".join(parts) + '\n<div id="tip" role="status" hidden></div>'
        f'\n<script type="application/json" id="data">{_embedded(_data(record))}</script>'
        f"\n<script>\n{_file('sweep.js')}</script>\n</body></html>\n"
    )


def describe(point: Point, record: SweepRecord) -> list[str]:
    """A point in short lines: its setting, then what was measured."""
    if point.setting.method == BASELINE:
        lines = ["unpruned: nothing cut"]
    else:
        lines = [label(point.setting, knobs_of(record))]
    lines.append(f"KV held {format_percent(point.kv_ratio.mean)} ({format_bytes(point.kv_bytes_held)})")
    if point.kl_mean is not None and point.setting.method != BASELINE:
        ends = interval_only(point.kl_mean, 4)
        lines.append(f"KL {format_nats(point.kl_mean.mean)} nats {ends}".rstrip())
    if point.top1_agreement is not None and point.setting.method != BASELINE:
        lines.append(f"top-1 agreement {format_percent(point.top1_agreement.mean)}")
    if point.accuracy is not None:
        lines.append(f"accuracy {with_interval(point.accuracy, 1, 100)} %")
    if point.decode_ratio is not None:
        lines.append(speed(point))
    if point.seeds is not None:
        spread = "" if point.seed_sd is None else f", standard deviation of KL {format_nats(point.seed_sd)}"
        lines.append(f"mean of {point.seeds} seeds{spread}")
    if point.setting.method != BASELINE:
        lines.append(f"keeps {limit_text(record.constraint)}: {keeps(point, record.constraint)}")
    return lines


def _data(record: SweepRecord) -> dict[str, Any]:
    """What the script needs: texts to show, figures to colour by, knobs to choose from."""
    knobs = knobs_of(record)
    rows = [
        {
            "method": point.setting.method,
            "knobs": {} if config is None else {knob: value(config, knob) for knob in knobs},
            "lines": describe(point, record),
            "kl_mean": _mean(point.kl_mean),
            "kv_ratio": point.kv_ratio.mean,
            "top1_agreement": _mean(point.top1_agreement),
            "accuracy": _mean(point.accuracy),
            "decode_ratio": _mean(point.decode_ratio),
            "keeps": keeps(point, record.constraint),
        }
        for point in record.points
        for config in (point.setting.config,)
    ]
    best = record.recommendation.point if record.recommendation is not None else None
    return {"points": rows, "best": best}


def _mean(interval: Interval | None) -> float | None:
    return None if interval is None else interval.mean


def _embedded(data: Any) -> str:
    """JSON that no text in it can end or open a tag of the page."""
    text = json.dumps(data, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _file(name: str) -> str:
    return (files("plphp_cli.reports") / name).read_text(encoding="utf-8")


def _head(record: SweepRecord) -> list[str]:
    found = record.recommendation
    parts = [
        f"<h1>plphp sweep: {_text(record.model)}</h1>",
        f'<p class="soft">{_text(scope_line(record))}</p>',
        f'<section class="lead{"" if chosen(record) is not None else " none"}">',
        f"<p class=title>{_text(title(record))}</p>",
    ]
    if found is not None:
        parts.append(f"<p>{_text(found.reason)} {_text(merit(record))}</p>")
        for name, what in (("config file", found.config_file), ("next", found.next_command)):
            if what is not None:
                parts.append(f"<p class=command><span>{name}</span> <code>{_text(what)}</code></p>")
    return [*parts, f'<p class="soft">{_text(standing(record))}</p>', "</section>"]


def _cards(record: SweepRecord) -> list[str]:
    point = chosen(record)
    if point is None:
        return []
    ratio = point.decode_ratio
    cards = [
        (
            "KV cache held",
            format_percent(point.kv_ratio.mean),
            f"{format_bytes(point.kv_bytes_held)} a prompt",
        ),
        (
            "mean KL",
            NOT_AVAILABLE if point.kl_mean is None else format_nats(point.kl_mean.mean),
            f"nats {interval_only(point.kl_mean, 4)}",
        ),
        ("top-1 agreement", format_percent(_mean(point.top1_agreement)), "tokens 2 to T"),
        (
            "accuracy",
            format_percent(_mean(point.accuracy)),
            "no expected answers"
            if point.accuracy_drop is None
            else f"{with_interval(point.accuracy_drop, 1, 100)} points lost",
        ),
        (
            "decode speed",
            format_ratio(ratio.mean if ratio else None),
            point.decode_verdict or ("against unpruned" if ratio else "not measured"),
        ),
    ]
    shown = (
        f'<div class="card"><span>{_text(name)}</span><b>{_text(figure)}</b><span>{_text(note)}</span></div>'
        for name, figure, note in cards
    )
    return ['<div class="cards">', *shown, "</div>"]


def _notes(record: SweepRecord) -> list[str]:
    notes = remarks(record)
    if not notes:
        return []
    return ["<ul class=notes>", *(f"<li>{_text(note)}</li>" for note in notes), "</ul>"]


def _scatters(record: SweepRecord) -> list[str]:
    def text(point: Point) -> str:
        return visible("\n".join(describe(point, record)))

    plots = (kl_scatter(record, text), accuracy_scatter(record, text), knob_plot(record, text))
    drawn = [svg for svg in plots if svg is not None]
    if not drawn:
        return []
    marks, methods = legend_marks(), {point.setting.method for point in record.points}
    names = {"best": "recommended", "front": "on the front", PLPHP: "other settings"}
    keys = [key for key in ("best", "front", PLPHP) if key != "best" or chosen(record) is not None]
    keys += [method for method in marks if method in methods and method != PLPHP]
    legend = "".join(
        f'<span data-key="{key}">{marks[key]}{_text(names.get(key, key))}</span>' for key in keys
    )
    return [
        "<h2>What quality a byte buys</h2>",
        '<p class="soft">To the left less is held; lower is better (of accuracy: higher). The line is the '
        "front: no other setting holds less at no worse quality. Tinted: beyond the limit.</p>",
        f'<p class="legend">{legend}</p>',
        '<div class="plots">',
        *(f"<div>{svg}</div>" for svg in drawn),
        "</div>",
    ]


def _ablations(record: SweepRecord) -> list[str]:
    if not record.ablations:
        return []
    rows = [[PLPHP, _nats(method_kl(record, PLPHP)), "", "", "", ""]]
    rows += [
        [
            one.method,
            _nats(method_kl(record, one.method)),
            with_interval(one.kl_excess, 4),
            "" if one.accuracy_loss is None else with_interval(one.accuracy_loss, 1, 100),
            f"{one.plphp_better} of {one.settings}",
            "" if one.seeds is None else f"{one.seeds}, sd {format_number(one.seed_sd, 4)}",
        ]
        for one in record.ablations
    ]
    heads = ["method", "mean KL", "over plphp", "accuracy lost, points", "plphp better in", "seeds"]
    return [
        "<h2>What each level adds, at the same bytes held</h2>",
        "<ul>",
        *(f"<li>{_text(sentence)}</li>" for sentence in conclusions(record)),
        "</ul>",
        *_plain_table(heads, rows),
    ]


def _nats(kl: float | None) -> str:
    return NOT_AVAILABLE if kl is None else format_nats(kl)


def _points(record: SweepRecord) -> list[str]:
    knobs = knobs_of(record) or NUMERIC
    heads = [
        "method", *knobs, "KV held", "KV bytes", "KL mean", "KL, 95 %", "KL max", "agreement", "accuracy",
        "accuracy drop", "tokens/s", "decode", "front", "keeps limit",
    ]  # fmt: skip
    best = chosen(record)
    every = [_cells(point, record, knobs) for point in record.points]
    # What was not measured at all is no column.
    shown = [place for place in range(len(heads)) if any(cells[place][0] for cells in every)]
    rows = []
    for place, point in enumerate(record.points):
        cells = "".join(_cell(*every[place][column]) for column in shown)
        kind = "best" if point is best else "whole" if point.setting.method == BASELINE else ""
        front = " data-front" if point.on_front or point.on_accuracy_front else ""
        rows.append(f'<tr class="{kind}" data-i="{place}"{front}>{cells}</tr>')
    return [
        "<h2>All settings</h2>",
        '<p class="controls" id="filters"></p>',
        '<div class="wide tall"><table id="points"><thead><tr>',
        *(f"<th>{_text(heads[column])}</th>" for column in shown),
        "</tr></thead><tbody>",
        *rows,
        "</tbody></table></div>",
    ]


def _cell(shown: str, key: str | None) -> str:
    return f"<td>{_text(shown)}</td>" if key is None else f'<td data-v="{_text(key)}">{_text(shown)}</td>'


def _cells(point: Point, record: SweepRecord, knobs: Sequence[str]) -> list[tuple[str, str | None]]:
    """What each cell shows, and what it is sorted by where that is another thing."""

    def number(interval: Interval | None, shown: str) -> tuple[str, str | None]:
        return ("", "") if interval is None else (shown, repr(interval.mean))

    def plain(figure: float | None, shown: str) -> tuple[str, str | None]:
        return ("", "") if figure is None else (shown, repr(figure))

    config, kl, drop = point.setting.config, point.kl_mean, point.accuracy_drop
    whole = point.setting.method == BASELINE
    fronts = [name for name, on in (("KL", point.on_front), ("accuracy", point.on_accuracy_front)) if on]
    return [
        (point.setting.method, None),
        *(("", "") if config is None else (value(config, knob), None) for knob in knobs),
        number(point.kv_ratio, format_percent(point.kv_ratio.mean)),
        plain(point.kv_bytes_held, format_bytes(point.kv_bytes_held)),
        number(kl, _nats(_mean(kl))),
        number(None if whole else kl, interval_only(kl, 4)),
        plain(point.kl_max, format_number(point.kl_max, 3)),
        number(point.top1_agreement, format_percent(_mean(point.top1_agreement))),
        number(point.accuracy, format_percent(_mean(point.accuracy))),
        number(None if whole else drop, with_interval(drop, 1, 100)),
        plain(point.decode_tokens_per_s, format_rate(point.decode_tokens_per_s, "").strip()),
        number(point.decode_ratio, format_ratio(_mean(point.decode_ratio))),
        (", ".join(fronts), None),
        ("" if whole else keeps(point, record.constraint), None),
    ]


def _prompts(record: SweepRecord) -> list[str]:
    rows = [
        [
            str(number),
            prompt.prompt,
            str(len(prompt.images)),
            prompt.unpruned_answer or "",
            prompt.answer or "",
            {True: "yes", False: "no", None: ""}[prompt.unpruned_correct],
        ]
        for number, prompt in enumerate(record.prompts, 1)
    ]
    heads = ["#", "prompt", "images", "unpruned answer", "expected", "met"]
    return [
        f"<h2>The prompts</h2><details><summary>{len(rows)} prompts and what the unpruned model answers"
        "</summary>",
        *_plain_table(heads, rows, texts=(1, 3, 4)),
        "</details>",
    ]


def _ends(record: SweepRecord) -> list[str]:
    lines = [*cost_lines(record), *skipped_lines(record, most=20)]
    command = str(record.environment.get("command") or "")
    block = escape(visible(json.dumps(record.environment, indent=2)))
    return [
        "<h2>What it took, and where</h2>",
        *(f"<p>{_text(line)}</p>" for line in lines),
        f"<p><code>{_text(command)}</code></p>",
        "<details><summary>everything that was noted of the environment</summary>"
        f"<pre>{block}</pre></details>",
    ]


def _plain_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], texts: tuple[int, ...] = ()
) -> list[str]:
    """A table that scrolls by itself on a narrow page; columns in `texts` hold sentences."""

    def line(cells: Sequence[str], tag: str) -> str:
        shown = (
            f"<{tag}{' class=text' if place in texts else ''}>{_text(cell)}</{tag}>"
            for place, cell in enumerate(cells)
        )
        return f"<tr>{''.join(shown)}</tr>"

    body = [line(row, "td") for row in rows]
    return [
        f'<div class="wide"><table><thead>{line(heads, "th")}</thead><tbody>',
        *body,
        "</tbody></table></div>",
    ]


def _text(text: str) -> str:
    return escape(visible(text))
