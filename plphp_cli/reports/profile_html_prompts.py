"""What the HTML page tells of layers and prompts: where the attention goes, totals, each prompt's own."""

from collections.abc import Callable, Sequence

from plphp_cli.profiling.records import PRUNED, LayerProfile, ProfileRecord, PromptProfile, TextsRecord, ratio
from plphp_cli.reports.diff import word_diff
from plphp_cli.reports.html import Cell, Row, marked, table, text
from plphp_cli.reports.plots import head_map
from plphp_cli.reports.profile_text import FIGURES, groups, plural, worst_first, worst_prompts
from plphp_cli.units import (
    format_bytes,
    format_count,
    format_number,
    format_percent,
    format_ratio,
    format_seconds,
)

# Prompts, from the worst on, whose heads are drawn: plots of very many would make a page that no one opens.
DRAWN = 12
TIMES = ("prefill_s", "ttft_s", "decode_s", "end_to_end_s")
_NO_TEXT = '<span class="soft">(no text)</span>'


def layers_section(record: ProfileRecord) -> list[str]:
    """The layer table and the maps of heads; over several prompts their means."""
    if not record.layers:
        return []
    if record.dummy is not None:
        return [
            "<h2>What is kept, by the given rates</h2>",
            *_table(record.layers, scored=False),
            '<p class="soft">kept: vision tokens per KV head</p>',
        ]
    count = len(record.prompts)
    means = (
        ""
        if count == 1
        else " Maps and table are means over prompts, each over those that have the figure: gamma over "
        "those with vision tokens, image i over those with such an image."
    )
    return [
        "<h2>Where the attention goes</h2>",
        *_maps(record.layers, "all"),
        *_table(record.layers),
        '<p class="soft">kept: vision tokens per KV head; overlap: mean Jaccard of what two heads of the '
        f"layer keep; kept per image: share of its vision tokens, image by image.{means}</p>",
    ]


def prompts_section(record: ProfileRecord) -> list[str]:
    """Totals, spread, the worst prompts, and every prompt by itself, the worst first."""
    count = len(record.prompts)
    if count < 2:
        return []
    heads = ("", "minimum", "25 %", "median", "75 %", "maximum")
    spread: list[Row] = [
        [name, *(f"{value:.3f}" for value in (s.minimum, s.quartile_1, s.median, s.quartile_3, s.maximum))]
        for name, s in ((FIGURES.get(name, name), five) for name, five in record.spread.items())
    ]
    worst = (
        f"<li>{name}: {', '.join(f'#{prompt.index + 1} ({text(figure)})' for prompt, figure in found)}</li>"
        for name, found in worst_prompts(record)
    )
    drawn = "" if count <= DRAWN else f" Heads are drawn for the first {DRAWN}; the JSON has those of all."
    return [
        f"<h2>Over {count} prompts</h2>",
        "<h3>Totals</h3>",
        *_totals(record),
        *(["<h3>Spread over prompts</h3>", *table(heads, spread, stack=True)] if spread else []),
        "<h3>Worst prompts</h3>",
        f"<ul>{''.join(worst)}</ul>",
        "<h3>Prompt by prompt</h3>",
        f'<p class="soft">By falling KL. Open one for its answers, layers and images.{drawn}</p>',
        *(part for place, one in enumerate(worst_first(record)) for part in _prompt(one, place < DRAWN)),
    ]


def answers(texts: TextsRecord) -> list[str]:
    """The texts of the arms with their differences marked, and what was expected."""
    parts = []
    shown = {"pruned": texts.pruned, "unpruned": texts.unpruned}
    if texts.pruned is not None and texts.unpruned is not None:
        first, second = word_diff(texts.pruned, texts.unpruned)
        html = {"pruned": marked(first), "unpruned": marked(second)}
    else:
        html = {name: text(value) for name, value in shown.items() if value is not None}
    if texts.answer is not None:
        html["expected"] = text(texts.answer)
    for name, value in html.items():
        parts.append(f'<div class="soft">{name}</div><div class="answer">{value or _NO_TEXT}</div>')
    return parts


def _totals(record: ProfileRecord) -> list[str]:
    rows: list[Row] = [
        [
            name,
            format_count(int(total["prompts"] or 0)),
            *(format_seconds(total[figure]) for figure in TIMES),
            format_bytes(total["kv_bytes_held"]),
            format_bytes(total["kv_bytes_allocated"]),
        ]
        for name, total in record.totals.items()
    ]
    heads = ("", "prompts", "prefill", "TTFT", "decode", "end to end", "KV held", "KV allocated")
    return table(heads, rows, stack=True)


def _prompt(prompt: PromptProfile, drawn: bool) -> list[str]:
    quality = prompt.quality
    figures = (
        ("KL", format_number(quality.kl_mean, 4)),
        ("agreement", format_percent(quality.top1_agreement)),
        ("KV", format_ratio(ratio(prompt.ratios, "kv"))),
        ("decode", format_ratio(ratio(prompt.ratios, "decode"))),
    )
    told = "".join(f"<span>{name} {text(value)}</span>" for name, value in figures)
    return [
        f'<details class="prompt"><summary><b>#{prompt.index + 1}</b> {text(prompt.prompt)}<br>'
        f'<span class="soft">{told}</span></summary>',
        f'<p class="soft">{text(_facts(prompt))}</p>',
        *answers(quality.texts),
        *(_maps(prompt.layers, f"prompt {prompt.index + 1}") if drawn else []),
        *(_table(prompt.layers) if prompt.layers else []),
        "</details>",
    ]


def _facts(prompt: PromptProfile) -> str:
    """What was asked with: images by the shares of them that are kept, tokens, expected times."""
    names = [image.path.replace("\\", "/").rpartition("/")[2] for image in prompt.images]
    shares = image_means(prompt.layers)
    if len(shares) == len(names):
        names = [
            f"{name} ({format_percent(share, 0)} kept)" for name, share in zip(names, shares, strict=True)
        ]
    pruned = prompt.arms[PRUNED]
    parts = [
        "no image" if not names else f"images: {', '.join(names)}",
        f"{plural(prompt.prompt_tokens or 0, 'token')}, {format_count(prompt.vision_tokens)} of them vision",
    ]
    if pruned is not None:
        parts.append(
            f"pruned: TTFT {format_seconds(pruned.ttft_s)}, end to end "
            f"{format_seconds(pruned.end_to_end_s)}, KV held {format_bytes(pruned.kv_bytes_held)}"
        )
    return "; ".join(parts) + "."


def image_means(layers: Sequence[LayerProfile]) -> list[float]:
    """Of each image, the share of its vision tokens kept, mean over the layers that tell."""
    shares = [layer.image_shares for layer in layers if layer.image_shares]
    return [sum(column) / len(column) for column in zip(*shares, strict=True)]


def _maps(layers: Sequence[LayerProfile], of: str) -> list[str]:
    maps = (
        head_map(layers, "gamma", "attention given to vision tokens: gamma by head", of),
        head_map(layers, "attention_kept", "share of that attention on tokens kept", of),
    )
    drawn = [f"<div>{svg}</div>" for svg in maps if svg is not None]
    return ['<div class="plots">', *drawn, "</div>"] if drawn else []


def _table(layers: Sequence[LayerProfile], scored: bool = True) -> list[str]:
    """The layer table; where rates were given (not `scored`) without what scores would tell."""
    told: dict[str, Callable[[LayerProfile], Cell | str]] = {
        "gamma": lambda layer: Cell(_gamma(layer.gamma), _bar(layer.gamma), "two"),
        "group": lambda layer: Cell(groups(layer), css="shares" if len(layer.groups) > 1 else ""),
    }
    given: dict[str, Callable[[LayerProfile], Cell | str]] = {
        "rate": lambda layer: format_number(layer.rate),
        "kept": lambda layer: format_number(layer.vision_tokens_kept, 0),
        "KV held": lambda layer: format_bytes(layer.kv_bytes_held),
        "per head": lambda layer: format_bytes(layer.kv_bytes_held_per_head),
        "uncut": lambda layer: format_bytes(layer.kv_bytes_full),
    }
    after: dict[str, Callable[[LayerProfile], Cell | str]] = {
        "overlap": lambda layer: format_number(layer.head_overlap),
        "kept per image": lambda layer: Cell(
            ", ".join(format_percent(share, 0) for share in layer.image_shares) or "-", css="shares"
        ),
    }
    columns = {**told, **given, **after} if scored else given
    rows: list[Row] = [
        [Cell(str(layer.index), css="layer"), *(show(layer) for show in columns.values())] for layer in layers
    ]
    return table(["layer", *columns], rows, stack=True)


def _gamma(gamma: float | None) -> str:
    return "-" if gamma is None else f"{gamma:.3f} "


def _bar(gamma: float | None) -> str:
    return "" if gamma is None else f'<span class="bar"><i style="width:{gamma * 100:.1f}%"></i></span>'
