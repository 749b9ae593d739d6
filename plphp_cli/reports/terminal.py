"""What `plphp run` prints at the end: the two arms side by side, the layer table, what to make of them."""

from collections.abc import Callable

from rich.text import Text

from plphp_cli.config import PLPHPConfig
from plphp_cli.reports.diff import DIFFERENT_STYLE, marked, word_diff
from plphp_cli.reports.layers import layer_lines
from plphp_cli.reports.summary import SINGLE_SAMPLE, remarks, verdict
from plphp_cli.reports.text import fit, visible, wrapped
from plphp_cli.results import ArmRecord, MemoryRecord, RankRecord, RanksByArm, RatioRecord, RunRecord
from plphp_cli.units import (
    NOT_AVAILABLE,
    format_bytes,
    format_count,
    format_rate,
    format_ratio,
    format_seconds,
)

_LABEL, _VALUE = 25, 14
_BETTER = {"kv": "below 1 is good"}


def run_report(record: RunRecord, width: int, colour: bool) -> list[Text]:
    """The whole report in lines of at most `width` cells.

    Args:
        record: of one `plphp run`, complete or interrupted.
        width: terminal cells.
        colour: whether styles will be seen; without them differences stand in `[[...]]`.
    """
    lines = [*_texts(record, width, colour), Text(), *_figures(record, width)]
    table = layer_lines(record.layers, record.vision_tokens, width)
    if table:
        lines += [Text(), _rule("layers after the cut", width), *table]
    lines.append(Text())
    for sentence in (verdict(record), *remarks(record)):
        lines += wrapped(Text(visible(sentence)), width)
    if record.unpruned is not None:
        lines += wrapped(Text(SINGLE_SAMPLE, style="dim"), width)
    return lines


def config_line(config: PLPHPConfig) -> str:
    """The config in one line, in the paper's symbols."""
    parts = [f"{name} {getattr(config, name):.3g}" for name in ("r", "delta_r", "alpha", "beta")]
    if config.scope != "prompt":
        parts.append(f"scope {config.scope}")
    if config.head_reduce != "mean":
        parts.append(f"head_reduce {config.head_reduce}")
    if config.skip_layers:
        parts.append(f"skip_layers {','.join(map(str, config.skip_layers))}")
    return " ".join(parts)


def _texts(record: RunRecord, width: int, colour: bool) -> list[Text]:
    pruned, unpruned = record.pruned, record.unpruned
    if unpruned is None:
        return [_rule("pruned", width), *wrapped(_answer(pruned), width)]
    if pruned.text == unpruned.text:
        return [_rule("pruned and unpruned: the same text", width), *wrapped(_answer(pruned), width)]
    if record.interrupted:
        # What one arm had no time for is not a difference.
        upper = [_rule("pruned", width), *wrapped(_answer(pruned), width)]
        return [*upper, _rule("unpruned", width), *wrapped(_answer(unpruned), width)]
    first, second = word_diff(pruned.text, unpruned.text)
    how = Text("differences so", DIFFERENT_STYLE) if colour else Text("differences [[so]]")
    return [
        _rule("pruned", width, how),
        *wrapped(marked(first, colour), width),
        _rule("unpruned", width),
        *wrapped(marked(second, colour), width),
    ]


def _answer(arm: ArmRecord) -> Text:
    return Text(visible(arm.text)) if arm.text else Text("(no text)", style="dim")


def _figures(record: RunRecord, width: int) -> list[Text]:
    arms = (record.pruned, record.unpruned)
    memory = (record.memory.pruned, record.memory.unpruned)
    lines = [_row("", ["pruned", "unpruned" if record.unpruned else ""], "ratio", width, "bold")]

    def figure(label: str, show: Callable[[ArmRecord], str], ratio: str | None = None) -> None:
        values = ["" if arm is None else show(arm) for arm in arms]
        lines.append(_row(label, values, _ratio(record.ratios, ratio), width))

    def bytes_of(label: str, name: str) -> None:
        values = [None if one is None else getattr(one, name) for one in memory]
        shown = [format_bytes(value) if arm else "" for value, arm in zip(values, arms, strict=True)]
        lines.append(_row(label, shown, "", width))

    figure("TTFT", lambda arm: format_seconds(arm.ttft_s), "ttft")
    figure("  of it preprocessing", lambda arm: format_seconds(arm.preprocess_s))
    figure("  of it prefill", lambda arm: format_seconds(arm.prefill_s))
    figure("decode", lambda arm: format_rate(arm.decode_tokens_per_s), "decode")
    figure("new tokens", lambda arm: format_count(arm.new_tokens))
    figure("stopped by", lambda arm: arm.stop_reason or NOT_AVAILABLE)
    figure("KV cache held (prompt)", lambda arm: format_bytes(arm.kv_bytes_held), "kv")
    if record.ranks is not None:
        held = [max((rank.kv_bytes_held for rank in arm), default=None) for arm in _by_arm(record.ranks)]
        shown = [format_bytes(value) if arm else "" for value, arm in zip(held, arms, strict=True)]
        lines.append(_row(f"  on each of {len(record.ranks.pruned)} ranks", shown, "", width))
    figure("KV cache allocated", lambda arm: format_bytes(arm.kv_bytes_allocated))
    bytes_of("GPU used, peak (NVML)", "device_used_peak_bytes")
    bytes_of("GPU, this process (NVML)", "device_process_bytes")
    bytes_of("torch allocator, peak", "allocator_peak_bytes")
    bytes_of("process memory, peak RSS", "rss_peak_bytes")
    total = next((one.device_total_bytes for one in memory if isinstance(one, MemoryRecord)), None)
    lines.append(_row("GPU total (NVML)", [format_bytes(total), ""], "", width))
    return lines


def _by_arm(ranks: RanksByArm) -> tuple[tuple[RankRecord, ...], ...]:
    return ranks.pruned, ranks.unpruned


def _ratio(ratios: dict[str, RatioRecord], name: str | None) -> str:
    if name is None or name not in ratios:
        return ""
    ratio = ratios[name]
    arms = f"{ratio.numerator.partition('.')[0]} / {ratio.denominator.partition('.')[0]}"
    return f"{format_ratio(ratio.value)}  {arms}"


def _row(label: str, values: list[str], note: str, width: int, style: str = "") -> Text:
    line = fit(Text(label, style="" if style else "dim"), _LABEL)
    for value in values:
        line.append(value.rjust(_VALUE), style)
    line.append(f"  {note}" if note else "", style)
    line.truncate(width, overflow="ellipsis")
    line.rstrip()
    return line


def _rule(title: str, width: int, note: Text | None = None) -> Text:
    """A heading across the width, with a note at its right end where there is room."""
    line = Text(f"── {title} ", style="bold")
    room = width - line.cell_len - (0 if note is None else note.cell_len + 1)
    line.append("─" * max(room, 0))
    if note is not None and room >= 0:
        line.append(" ")
        line.append_text(note)
    line.truncate(width)
    return line
