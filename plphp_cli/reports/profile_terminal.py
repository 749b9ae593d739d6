"""What `plphp profile` prints: headline, arms side by side, bound, quality, where attention goes."""

from collections.abc import Callable, Sequence

from rich.text import Text

from plphp_cli.profiling.records import (
    PRUNED,
    SLOWER,
    STOCK,
    UNPRUNED,
    ArmProfile,
    LayerProfile,
    ProfileRecord,
    RatioProfile,
)
from plphp_cli.reports.diff import DIFFERENT_STYLE, marked, word_diff
from plphp_cli.reports.layers import layer_lines
from plphp_cli.reports.profile_text import (
    FIGURES,
    capacity,
    divergence,
    headline,
    interval,
    plural,
    remarks,
    repaid,
    standing,
    verdict,
    worst_prompts,
)
from plphp_cli.reports.text import fit, visible, wrapped
from plphp_cli.results import LayerRecord
from plphp_cli.units import (
    NOT_AVAILABLE,
    finite,
    format_bytes,
    format_count,
    format_number,
    format_percent,
    format_rate,
    format_ratio,
    format_seconds,
)

_LABEL, _VALUE = 24, 12
# A row of ratios: label, median, two intervals and the longest verdict.
_RATIO_LABEL, _RATIO_ROW = 17, 79
_RATIO_LABELS = {
    **FIGURES,
    "loop_decode": "loop: decode",
    "loop_ttft": "loop: TTFT",
    "loop_end_to_end": "loop: end to end",
}


def profile_report(record: ProfileRecord, width: int, colour: bool) -> list[Text]:
    """The whole report in lines of at most `width` cells.

    Args:
        record: of one `plphp profile`, complete or interrupted.
        width: terminal cells.
        colour: whether styles will be seen; without them differences stand in `[[...]]`.
    """
    lines: list[Text] = []
    for fault in record.faults:
        lines += wrapped(Text(f"FAULT: {fault}", style="bold red"), width)
    for sentence in headline(record):
        lines += wrapped(Text(sentence, style="bold" if sentence == headline(record)[0] else ""), width)
    lines += wrapped(Text(standing(record), style="dim"), width)
    lines += _times(record, width)
    lines += _differences(record, width)
    lines += _memory(record, width)
    lines += _bound(record, width)
    lines += _quality(record, width, colour)
    lines += _prompts(record, width)
    lines += _layers(record, width)
    notes = remarks(record)
    if notes:
        lines += [
            Text(),
            *(line for note in notes for line in wrapped(Text(f"note: {visible(note)}"), width)),
        ]
    return lines


def _times(record: ProfileRecord, width: int) -> list[Text]:
    arms = record.arms.items()
    lines = _rule(f"times, median of {plural(record.plan.repeats, 'repeat')}", width)
    lines.append(_row("", [name for name, _ in arms], width, "bold"))

    def figure(label: str, show: Callable[[ArmProfile], str]) -> None:
        lines.append(_row(label, [show(arm) for _, arm in arms], width))

    figure("image preprocessing", lambda arm: format_seconds(arm.preprocess_s))
    figure("prefill", lambda arm: format_seconds(arm.prefill_s))
    figure("  vision encoder", lambda arm: format_seconds(arm.vision_s))
    # Only the pruned arm has any.
    figure("  pruning itself", lambda arm: "" if arm.prune_s is None else format_seconds(arm.prune_s))
    figure("TTFT", lambda arm: format_seconds(arm.ttft_s))
    figure("decode, tokens/s", lambda arm: format_rate(arm.decode_tokens_per_s, "").strip())
    figure("  TPOT p50", lambda arm: format_seconds(arm.tpot_s.p50 if arm.tpot_s else None))
    figure("  TPOT p90", lambda arm: format_seconds(arm.tpot_s.p90 if arm.tpot_s else None))
    figure("  TPOT p99", lambda arm: format_seconds(arm.tpot_s.p99 if arm.tpot_s else None))
    # As many as were asked for: an interrupted profile may have decoded none.
    tokens = plural(record.plan.max_new_tokens, "token")
    figure(f"end to end, {tokens}", lambda arm: format_seconds(arm.end_to_end_s))
    share = record.arms.pruned.prune_share_of_prefill if record.arms.pruned is not None else None
    if share is not None:
        text = f"pruning itself took {format_percent(share)} of a prefill of its own pass"
        lines += wrapped(Text(text, style="dim"), width)
    return lines


def _differences(record: ProfileRecord, width: int) -> list[Text]:
    """Paired ratios, each with what may be said of it, its interval and that of identical arms."""
    if not any(found is not None for found in record.ratios.values()):
        return []
    loop = "; loop: stock / unpruned" if any(name.startswith("loop_") for name in record.ratios) else ""
    lines = _rule(f"ratios, unpruned / pruned{loop}; above 1 favours pruning", width)
    if width >= _RATIO_ROW:
        lines.append(_ratio_row(("", "median", "95 % interval", "A/A interval", "verdict"), "bold"))
    for name, found in record.ratios.items():
        label = _RATIO_LABELS.get(name, name)
        if found is None:
            cells = (label, NOT_AVAILABLE, "", "", "")
        else:
            own = "" if name == "kv" else interval(found.low, found.high)
            same = "" if name == "kv" else interval(found.control_low, found.control_high)
            cells = (label, format_ratio(found.median), own, same, _said(name, found))
        if width >= _RATIO_ROW:
            lines.append(_ratio_row(cells))
            continue
        # Too narrow for a row: what may be said comes first, the intervals below.
        lines += _pair(label, ", ".join(filter(None, (cells[1], cells[4]))), width)
        if cells[2]:
            lines += _pair("", f"interval {cells[2]}, A/A {cells[3]}", width)
    return lines


def _said(name: str, found: RatioProfile) -> str:
    said = verdict(name, found)
    # A loss should catch the eye among gains.
    return said.upper() if said == SLOWER else said


def _ratio_row(cells: Sequence[str], style: str = "") -> Text:
    label, median, own, same, said = cells
    line = fit(Text(label, style=style or "dim"), _RATIO_LABEL)
    line.append(f"{median:>6} {own:>14} {same:>14}  {said}", style)
    line.rstrip()
    return line


def _memory(record: ProfileRecord, width: int) -> list[Text]:
    lines = _rule("memory", width)
    arms = record.arms.items()

    def figure(label: str, show: Callable[[ArmProfile], int | None]) -> None:
        lines.append(_row(label, [format_bytes(show(arm)) for _, arm in arms], width))

    # Of a batch what is of one prompt says so, beside what is of all.
    batch = record.batch_size > 1
    figure("KV held, 1 prompt" if batch else "KV cache held", lambda arm: arm.kv_bytes_held)
    figure("KV alloc., 1 prompt" if batch else "KV cache allocated", lambda arm: arm.kv_bytes_allocated)
    figure(f"peak live, {'1 ' if batch else ''}prefill", lambda arm: arm.peak_prefill_bytes)
    figure("  decoder part", lambda arm: arm.peak_prefill_decoder_bytes)
    steps = f"decode of {record.batch_size}" if batch else "decode"
    figure(f"peak live, {steps}", lambda arm: arm.peak_decode_bytes)
    figure("resident (RSS), peak", lambda arm: arm.memory.rss_peak_bytes if arm.memory else None)
    figure("GPU used, peak (NVML)", lambda arm: arm.memory.device_used_peak_bytes if arm.memory else None)
    text = (
        "KV bytes of the tool's arms are as predicted, layer by layer and per head; stock's are read from "
        "its cache. Peaks are of live tensors, weights included, a fresh process per arm; RSS and NVML are "
        "of that process and its device, shown for comparison."
    )
    return [*lines, *wrapped(Text(text, style="dim"), width)]


def _bound(record: ProfileRecord, width: int) -> list[Text]:
    bound = record.bound
    if bound is None:
        return []
    lines = _rule("the bound: what a decoding step must read", width)
    names = [name for name in (PRUNED, UNPRUNED, STOCK) if bound.kv_bytes_per_step.get(name) is not None]
    lines.append(_row("", names, width, "bold"))

    def figure(label: str, values: Sequence[str]) -> None:
        lines.append(_row(label, list(values), width))

    figure("weights", [format_bytes(bound.weight_bytes)] * len(names))
    cache = "cache" if record.batch_size == 1 else f"cache of {record.batch_size}"
    figure(cache, [format_bytes(bound.kv_bytes_per_step[name]) for name in names])
    figure("cache, share of step", [format_percent(bound.kv_share_of_step[name]) for name in names])
    figure("least time of a step", [format_seconds(bound.ideal_step_s[name]) for name in names])
    figure("share attained", [format_percent(bound.attained[name]) for name in names])
    figure("operations of a step", [_millions(bound.operations_per_step[name]) for name in names])
    fit_in = [bound.capacity.get(name) for name in names]
    figure("such prompts that fit", [format_count(one.prompts if one else None) for one in fit_in])
    figure("such images, 1 prompt", [format_count(one.images if one else None) for one in fit_in])
    facts = (
        f"ideal decode ratio {_three(bound.ideal_decode_ratio)}; this device reads "
        f"{format_bytes(bound.bandwidth_bytes_per_s)}/s and does "
        f"{format_number(None if bound.operations_per_s is None else bound.operations_per_s / 1e9, 1)} "
        f"GFLOP/s as measured; its memory: {format_bytes(bound.device_memory_bytes)}. "
        f"{capacity(record)} Pruning has repaid its own cost: {repaid(record)}."
    )
    lines += wrapped(Text(facts), width)
    return [*lines, *_batches(record, width)]


def _batches(record: ProfileRecord, width: int) -> list[Text]:
    table = record.bound.table if record.bound is not None else ()
    if not table:
        return []
    lines = [Text("context in tokens from which the ideal gain passes; ideal gain by context:", style="dim")]
    lines.append(_batch_row("batch size", [str(row.batch) for row in table], "bold"))
    for gain in table[0].reached_at_tokens:
        reached = [row.reached_at_tokens[gain] for row in table]
        lines.append(_batch_row(f"{gain}x from", ["never" if at is None else _context(at) for at in reached]))
    for context in table[0].ideal_decode_ratio:
        values = [format_ratio(row.ideal_decode_ratio[context]) for row in table]
        lines.append(_batch_row(f"at {_context(int(context))}", values))
    return [line for whole in lines for line in wrapped(whole, width)]


def _batch_row(label: str, values: Sequence[str], style: str = "") -> Text:
    line = fit(Text(label, style=style or "dim"), 10)
    line.append("".join(value.rjust(7) for value in values), style)
    return line


def _quality(record: ProfileRecord, width: int, colour: bool) -> list[Text]:
    quality, texts = record.quality, record.quality.texts
    lines: list[Text] = []
    if quality.kl_mean is not None:
        lines = _rule("quality along the unpruned answer", width)
        both = [format_number(quality.perplexity.get(arm), 3) for arm in (PRUNED, UNPRUNED)]
        first = quality.first_divergence
        rows = [
            ("KL, unpruned || pruned", divergence(record)),
            ("top-1 agreement", format_percent(quality.top1_agreement)),
            ("first divergence", "none" if first is None else f"token {first}"),
            ("perplexity", f"{both[0]} pruned, {both[1]} unpruned"),
        ]
        for label, values in (
            ("exact match", quality.exact_match),
            ("tokens 2.. right", quality.answer_token_accuracy),
        ):
            if values.get(PRUNED) is not None:
                shown = [format_percent(values.get(arm)) for arm in (PRUNED, UNPRUNED)]
                rows.append((label, f"{shown[0]} pruned, {shown[1]} unpruned"))
        lines += [line for label, text in rows for line in _pair(label, text, width)]
    if texts.pruned is None and texts.unpruned is None:
        return lines
    which = "" if len(record.prompts) == 1 else ", of the prompt with the largest KL"
    known = {
        name: text
        for name, text in (("pruned", texts.pruned), ("unpruned", texts.unpruned))
        if text is not None
    }
    if texts.pruned is None or texts.unpruned is None or texts.unpruned == texts.pruned:
        title = " and ".join(known) + (": the same text" if len(known) > 1 else "")
        return [*lines, *_rule(title + which, width), *wrapped(_answer(next(iter(known.values()))), width)]
    cut, whole = word_diff(texts.pruned, texts.unpruned)
    how = Text("differences so", DIFFERENT_STYLE) if colour else Text("differences [[so]]")
    lines += [*_rule("pruned" + which, width), *wrapped(marked(cut, colour), width)]
    return [*lines, *_rule("unpruned", width, how), *wrapped(marked(whole, colour), width)]


def _prompts(record: ProfileRecord, width: int) -> list[Text]:
    if len(record.prompts) < 2:
        return []
    lines = _rule(f"over {len(record.prompts)} prompts", width)
    for name, arm in record.totals.items():
        seconds, held = format_seconds(arm.get("end_to_end_s")), format_bytes(arm.get("kv_bytes_held"))
        over = plural(int(arm.get("prompts") or 0), "prompt")
        text = f"end to end {seconds}, KV held {held}, {over}"
        lines += _pair(f"total, {name}", text, width)
    for name, five in record.spread.items():
        text = (
            f"{five.minimum:.3f} to {five.maximum:.3f}, middle half {five.quartile_1:.3f} to "
            f"{five.quartile_3:.3f}"
        )
        lines += _pair(f"spread, {FIGURES.get(name, name)}", text, width)
    for name, worst in worst_prompts(record):
        lines.append(_cut(Text(f"{name}:", style="dim"), width))
        for prompt, value in worst:
            told = f"  #{prompt.index + 1}, {value}: {' '.join(visible(prompt.prompt).split())}"
            lines.append(_cut(Text(told), width))
    return lines


def _layers(record: ProfileRecord, width: int) -> list[Text]:
    if not record.layers:
        return []
    title = "where the attention goes" if record.dummy is None else "what is kept, by the given rates"
    lines = _rule(f"{title}, layer by layer", width)
    counts = [prompt.vision_tokens for prompt in record.prompts if prompt.vision_tokens is not None]
    vision = round(sum(counts) / len(counts)) if counts else None
    found = [_as_record(layer) for layer in record.layers]
    lines += layer_lines(found, vision, width, scored=record.dummy is None)
    if len(record.prompts) > 1:
        lines.append(
            _cut(Text("means over prompts; groups: how many prompts have which", style="dim"), width)
        )
    overlaps = [layer.head_overlap for layer in record.layers if layer.head_overlap is not None]
    shares = [layer.image_shares for layer in record.layers if layer.image_shares]
    if overlaps:
        mean = sum(overlaps) / len(overlaps)
        between = f"({min(overlaps):.2f} to {max(overlaps):.2f})"
        text = f"overlap of what the heads of a layer keep, mean Jaccard: {mean:.2f} {between}"
        lines += wrapped(Text(text), width)
    if shares:
        means = [sum(column) / len(column) for column in zip(*shares, strict=True)]
        which = "" if len(record.prompts) == 1 else ", mean of the prompts that have it"
        text = f"kept per image{which}: " + ", ".join(
            f"image {number} {format_percent(share, 0)}" for number, share in enumerate(means, 1)
        )
        lines += wrapped(Text(text), width)
    return lines


def _as_record(layer: LayerProfile) -> LayerRecord:
    def whole(value: float | None) -> int | None:
        return None if finite(value) is None else round(value or 0)

    return LayerRecord(
        layer.index,
        layer.gamma,
        layer.group or " ".join(f"{count} {name[:3]}" for name, count in layer.groups.items()) or None,
        layer.rate,
        whole(layer.vision_tokens_kept),
        whole(layer.kv_bytes_held),
        whole(layer.kv_bytes_held_per_head),
        whole(layer.kv_bytes_full),
    )


def _context(tokens: int) -> str:
    return f"{tokens / 1024:.0f}k" if tokens >= 10 * 1024 or tokens in (1024, 4096) else format_count(tokens)


def _millions(count: int | None) -> str:
    return NOT_AVAILABLE if count is None else f"{count / 1e6:.1f} M"


def _three(value: float | None) -> str:
    return NOT_AVAILABLE if value is None else f"{value:.3f}x"


def _answer(text: str) -> Text:
    return Text(visible(text)) if text else Text("(no text)", style="dim")


def _pair(label: str, text: str, width: int) -> list[Text]:
    lines = wrapped(Text(text), max(width - _LABEL, 12))
    starts = [Text(label, style="dim")] + [Text()] * (len(lines) - 1)
    joined = []
    for start, line in zip(starts, lines, strict=True):
        whole = fit(start, _LABEL)
        whole.append_text(line)
        joined.append(whole)
    return joined


def _row(label: str, values: list[str], width: int, style: str = "") -> Text:
    line = fit(Text(label, style="" if style else "dim"), _LABEL)
    for value in values:
        line.append(value.rjust(_VALUE), style)
    line.rstrip()
    return _cut(line, width)


def _cut(line: Text, width: int) -> Text:
    line.truncate(width, overflow="ellipsis")
    return line


def _rule(title: str, width: int, note: Text | None = None) -> list[Text]:
    line = Text(f"── {title} ", style="bold")
    room = width - line.cell_len - (0 if note is None else note.cell_len + 1)
    line.append("─" * max(room, 0))
    if note is not None and room >= 0:
        line.append(" ")
        line.append_text(note)
    return [Text(), _cut(line, width)]
