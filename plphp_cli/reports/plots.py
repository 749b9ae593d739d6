"""The plots of the HTML page, as SVG by matplotlib: records in, text out, the same text every time."""

import io
from collections.abc import Sequence
from typing import Any

from plphp_cli.profiling.records import PRUNED, STOCK, UNPRUNED, LayerProfile, ProfileRecord
from plphp_cli.units import format_bytes, format_percent

COLOURS = {PRUNED: "#1b7f5c", UNPRUNED: "#7a6a9b", STOCK: "#b5742a"}
# Narrow on purpose: the page shows two beside each other on a desk and one on a phone, letters legible.
_WIDTH = 5.2
# Stands for the colour of the text around a plot, which is light on a dark page.
_INK = "#1f2937"
_STYLE: Any = {
    "font.size": 10.5,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a93a0",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
# Neither of what it holds says more than the page does, and its names look like addresses to fetch.
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Type", "Format"))


def bound_bar(record: ProfileRecord) -> str | None:
    """Bytes that a decoding step reads per arm: weights and cache; None where there is no bound."""
    bound = record.bound
    if bound is None:
        return None
    names = [name for name in (PRUNED, UNPRUNED, STOCK) if bound.kv_bytes_per_step.get(name) is not None]

    def draw(axes: Any) -> None:
        for place, name in enumerate(names):
            cache = bound.kv_bytes_per_step[name] or 0
            share = format_percent(bound.kv_share_of_step[name])
            axes.barh(place, bound.weight_bytes, color="#c3c9d1", label="weights" if place == 0 else None)
            axes.barh(place, cache, left=bound.weight_bytes, color=COLOURS[name])
            total = bound.weight_bytes + cache
            axes.annotate(
                f"{format_bytes(total)}, cache {share}",
                (total, place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9.5,
            )
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        most = bound.weight_bytes + max(bound.kv_bytes_per_step[name] or 0 for name in names)
        axes.set_xlim(0, most * 1.55)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.set_xlabel("grey: weights; coloured: cache, read (stock: also written)", fontsize=9.5)

    return _svg(draw, 0.7 + 0.5 * len(names))


def latency(record: ProfileRecord) -> str | None:
    """Distribution of the time per token, a curve per arm; None where nothing was decoded."""
    steps = {
        name: sorted(s * 1000 for p in record.prompts for run in _steps(p, name) for s in run)
        for name in (PRUNED, UNPRUNED, STOCK)
    }
    steps = {name: values for name, values in steps.items() if values}
    if not steps:
        return None

    def draw(axes: Any) -> None:
        for name, values in steps.items():
            shares = [(number + 1) / len(values) * 100 for number in range(len(values))]
            axes.step(values, shares, where="post", color=COLOURS[name], label=name, linewidth=1.8)
        low = min(values[0] for values in steps.values())
        # The last percent may be far out; the table has it.
        high = max(values[min(int(len(values) * 0.99), len(values) - 1)] for values in steps.values())
        axes.set_xlim(max(0, low * 0.9), max(high * 1.05, low * 1.01))
        axes.set_ylim(0, 101)
        axes.set_xlabel("time per token, ms (to the 99th percentile)")
        axes.set_ylabel("% of steps at most so long")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, loc="lower right")

    return _svg(draw, 3.2)


def head_map(layers: Sequence[LayerProfile], figure: str, title: str, of: str = "") -> str | None:
    """A figure of every KV head, layer by layer, in [0, 1]; None where heads are not known.

    `of` says whose layers they are, where a page has several maps.
    """
    layers = [layer for layer in layers if layer.heads]
    if not layers:
        return None
    heads = max(len(layer.heads) for layer in layers)
    nan = float("nan")

    def value(layer: LayerProfile, head: int) -> float:
        found = getattr(layer.heads[head], figure) if head < len(layer.heads) else None
        return nan if found is None else found

    values = [[value(layer, head) for head in range(heads)] for layer in layers]

    def draw(axes: Any) -> None:
        image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=1)
        every = max(1, len(layers) // 16)
        axes.set_yticks(range(0, len(layers), every), [layer.index for layer in layers[::every]])
        axes.set_xticks(range(0, heads, max(1, heads // 16)))
        axes.set_xlabel("KV head")
        axes.set_ylabel("layer")
        axes.set_title(title, fontsize=10.5, loc="left")
        for row, column in ((r, c) for r in range(len(layers)) for c in range(heads)):
            number = values[row][column]
            if heads <= 8 and len(layers) <= 32 and number == number:
                ink = "white" if number < 0.6 else "black"
                axes.text(column, row, f"{number:.2f}", ha="center", va="center", color=ink, fontsize=8.5)
        axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.03)

    return _svg(draw, 1.1 + min(0.28 * len(layers), 7.0), f"{figure} {of}")


def _steps(prompt: Any, name: str) -> tuple[tuple[float, ...], ...]:
    arm = prompt.arms[name]
    return () if arm is None else arm.samples.step_s


def _svg(draw: Any, height: float, name: str = "") -> str:
    """One figure drawn on fresh axes, without a display and without pyplot's global state.

    `name` keeps the ids inside figures of one page apart: those of a hidden one may not be referred to.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"plphp {name}"}):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata=_NO_METADATA)
    svg = text.getvalue().replace(_INK, "currentColor")
    # Without the XML prologue it can stand inside a page.
    return svg[svg.index("<svg") :]
