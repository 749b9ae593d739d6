import dataclasses
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.text import Text

from plphp_cli.config import PLPHPConfig
from plphp_cli.reports.diff import first_difference, marked, word_diff
from plphp_cli.reports.layers import bar, condense, layer_lines
from plphp_cli.reports.summary import remarks, verdict
from plphp_cli.reports.terminal import run_report
from plphp_cli.reports.text import fit, for_encoding, one_line, visible, wrapped
from plphp_cli.results import (
    ArmRecord,
    GenerationRecord,
    LayerRecord,
    MemoryByArm,
    MemoryRecord,
    RunRecord,
    decode_bound,
    run_ratios,
)

KIB = 1024
GROUPS = (("attentive", 0.7), ("balanced", 0.4), ("indifferent", 0.1))


def layer(index: int) -> LayerRecord:
    """A layer of 4 KV heads and 1 KiB per token, with 36 text and 100 vision tokens."""
    group, rate = GROUPS[index % 3]
    kept = round(rate * 100)
    held = (36 + kept) * KIB
    return LayerRecord(
        index=index,
        gamma=rate / 2,
        group=group,
        rate=rate,
        vision_tokens_kept=kept,
        kv_bytes_held=held,
        kv_bytes_held_per_head=held // 4,
        kv_bytes_full=136 * KIB,
        kv_bytes_allocated=264 * KIB,
        kv_heads=4,
    )


def arm(text: str, layers: tuple[LayerRecord, ...], step_s: float = 0.01, tokens: int = 33) -> ArmRecord:
    return ArmRecord.from_stream(
        text=text,
        token_ids=range(tokens),
        elapsed_s=[0.2 + step_s * index for index in range(tokens)],
        preprocess_s=0.01,
        prefill_s=0.19,
        stop_reason="eos",
        layers=layers,
    )


def record(pruned_text: str = "a red circle", unpruned_text: str | None = "a red circle") -> RunRecord:
    layers = tuple(layer(index) for index in range(3))
    whole = tuple(
        dataclasses.replace(one, gamma=None, group=None, rate=None, kv_bytes_held=one.kv_bytes_full)
        for one in layers
    )
    pruned = arm(pruned_text, layers)
    unpruned = None if unpruned_text is None else arm(unpruned_text, whole, step_s=0.0125)
    assert pruned.kv_bytes_held is not None
    assert pruned.kv_bytes_full is not None
    return RunRecord(
        model="builtin",
        config=PLPHPConfig(),
        prompt="what is this?",
        system=None,
        generation=GenerationRecord(128),
        prompt_tokens=136,
        vision_tokens=100,
        images=(),
        pruned=pruned,
        unpruned=unpruned,
        layers=layers,
        memory=MemoryByArm(MemoryRecord(rss_peak_bytes=1 << 29), MemoryRecord(rss_peak_bytes=1 << 29)),
        ratios=run_ratios(pruned, unpruned),
        bound=decode_bound(1 << 20, pruned.kv_bytes_held, pruned.kv_bytes_full),
    )


def plain(lines: list[Text]) -> str:
    return "\n".join(line.plain for line in lines)


# Sanitizing


@settings(deadline=None)
@given(st.text(st.characters()))
def test_visible_text_has_no_control_that_a_terminal_obeys(text: str) -> None:
    shown = visible(text)
    assert all(character in "\n\t" or unicodedata.category(character) != "Cc" for character in shown)
    assert not any(
        "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069" for character in shown
    )
    shown.encode("utf-8")


@settings(deadline=None)
@given(st.text("abcäöü漢字[]\\/ \n\t"))
def test_visible_text_leaves_ordinary_text_alone(text: str) -> None:
    assert visible(text) == text


def test_escapes_are_shown_as_what_they_are() -> None:
    assert visible("\x1b[31mred\x07\r") == "\\x1b[31mred\\x07\\x0d"
    assert visible("\u202eabc\ud800") == "\\u202eabc\\ud800"
    assert one_line("a\nb\tc") == "a\\nb\\tc"


def test_ascii_terminals_get_lines_of_the_same_width() -> None:
    line = Text("── █▌ │ …")
    assert for_encoding(line, "ascii").plain.isascii()
    assert for_encoding(line, "ascii").cell_len == line.cell_len
    assert for_encoding(line, "utf-8").plain == line.plain


@settings(deadline=None)
@given(st.text("ab 漢\n"), st.integers(2, 30))
def test_wrapped_lines_fit_and_lose_no_letter(text: str, width: int) -> None:
    lines = wrapped(Text(text), width)
    assert all(line.cell_len <= width for line in lines)
    assert "".join("".join(line.plain.split()) for line in lines) == "".join(text.split())


@settings(deadline=None)
@given(st.text("ab漢"), st.integers(1, 12))
def test_fitted_text_is_exactly_as_wide_as_asked(text: str, width: int) -> None:
    assert fit(Text(text), width).cell_len == width


# Differences


@settings(deadline=None)
@given(st.text("ab .\n"), st.text("ab .\n"))
def test_the_pieces_of_a_diff_are_the_texts(first: str, second: str) -> None:
    sides = word_diff(first, second)
    assert ["".join(piece.text for piece in side) for side in sides] == [first, second]
    same = ["".join(piece.text for piece in side if piece.same) for side in sides]
    assert same[0] == same[1]
    assert (first == second) == all(piece.same for side in sides for piece in side)


def test_differences_are_marked_with_and_without_colour() -> None:
    pieces, _ = word_diff("a red circle", "a blue circle")
    assert marked(pieces, colour=False).plain == "a [[red]] circle"
    coloured = marked(pieces, colour=True)
    assert coloured.plain == "a red circle"
    assert [coloured.plain[span.start : span.end] for span in coloured.spans] == ["red"]


def test_markup_in_an_answer_stays_text() -> None:
    pieces, _ = word_diff("[bold]x[/bold] \x1b[0m", "y")
    assert "[bold]" in marked(pieces, colour=True).plain
    assert "\x1b" not in marked(pieces, colour=True).plain


@pytest.mark.parametrize(
    ("first", "second", "place"),
    [("a b", "a b", None), ("a b", "a c", 2), ("a", "a b", 2), ("", "a", 1), ("a  b", "a b", 3)],
)
def test_first_difference_counts_words_from_one(first: str, second: str, place: int | None) -> None:
    assert first_difference(first, second) == place


# The layer table


@settings(deadline=None)
@given(st.integers(1, 100), st.integers(1, 50))
def test_condensing_shows_every_layer_once_in_order(count: int, rows: int) -> None:
    layers = [layer(index) for index in range(count)]
    shown: list[int] = []
    condensed = condense(layers, rows)
    for row in condensed:
        first, _, last = row.layers.partition("-")
        shown += range(int(first), int(last or first) + 1)
    assert shown == list(range(count))
    assert len(condensed) <= rows


def test_a_condensed_row_holds_means() -> None:
    row = condense([layer(0), layer(1)], 1)[0]
    assert row.layers == "0-1"
    assert row.group == "1att 1bal"
    assert row.rate == pytest.approx(0.55)
    assert row.layer_bytes == pytest.approx((106 + 76) / 2 * KIB)


@settings(deadline=None)
@given(st.integers(1, 90), st.integers(3, 40), st.integers(30, 200))
def test_the_table_fits_and_no_row_is_cut(count: int, height: int, width: int) -> None:
    lines = layer_lines([layer(index) for index in range(count)], 100, width, height)
    assert 3 <= len(lines) <= height
    assert all(line.cell_len <= width for line in lines)
    for line in lines[1:-1]:
        assert "…" not in line.plain
        assert "/100" in line.plain


def test_the_table_at_80_columns() -> None:
    lines = layer_lines([layer(index) for index in range(3)], 100, 80)
    assert plain(lines) == (
        " layer gamma 0 to 0.5                 group       rate   kept  KV/head  KV/layer\n"
        "     0 0.350 ████████████████▊        attentive   0.70 70/100 26.5 KiB 106.0 KiB\n"
        "     1 0.200 █████████▋               balanced    0.40 40/100 19.0 KiB  76.0 KiB\n"
        "     2 0.050 ██▍                      indifferent 0.10 10/100 11.5 KiB  46.0 KiB\n"
        " 3 layers hold 228.0 KiB of 408.0 KiB (56%)"
    )


def test_unknown_figures_are_not_zero() -> None:
    unknown = LayerRecord(0, None, None, None, None, None, None, None)
    row = layer_lines([unknown], None, 80)[1].plain
    assert "0.0" not in row
    assert "N/A" in row


@settings(deadline=None)
@given(st.floats(-1, 2), st.integers(1, 40))
def test_a_bar_is_as_wide_as_asked_and_grows_with_its_value(fraction: float, width: int) -> None:
    assert len(bar(fraction, width)) == width
    assert bar(fraction, width).count("█") <= bar(min(fraction + 0.5, 2), width).count("█")


# The report


@pytest.mark.parametrize("width", [40, 60, 80, 140])
@pytest.mark.parametrize("texts", [("a b", "a b"), ("a long " * 40, "a wide " * 40), ("x", None)])
def test_every_line_of_the_report_fits(width: int, texts: tuple[str, str | None]) -> None:
    lines = run_report(record(*texts), width, colour=False)
    assert all(line.cell_len <= width for line in lines)


def test_ratios_name_their_arms() -> None:
    text = plain(run_report(record(), 80, colour=False))
    assert "1.25x  pruned / unpruned" in text
    assert "0.56x  pruned / unpruned" in text
    assert "single sample" in text
    assert "plphp profile" in text


def test_equal_texts_are_shown_once_and_different_ones_marked() -> None:
    assert plain(run_report(record("a red", "a red"), 80, colour=False)).count("a red") == 1
    different = plain(run_report(record("a red", "a blue"), 80, colour=False))
    assert "a [[red]]" in different
    assert "a [[blue]]" in different
    assert "from word 2 on" in different


def test_the_verdict_names_saving_speed_and_bound() -> None:
    sentence = verdict(record())
    assert "56 % of the prompt's KV cache (228.0 KiB of 408.0 KiB)" in sentence
    assert "1.25x the unpruned speed" in sentence
    assert "ideal bound is 1.144x" in sentence


def test_the_verdict_hides_neither_slower_nor_untimed_decoding() -> None:
    slower = record()
    assert slower.unpruned is not None
    fast = arm("a red circle", (), step_s=0.005)
    slower = dataclasses.replace(slower, unpruned=fast, ratios=run_ratios(slower.pruned, fast))
    assert "more slowly" in verdict(slower)
    short = arm("a", (), tokens=3)
    untimed = dataclasses.replace(slower, unpruned=short, ratios=run_ratios(slower.pruned, short))
    assert "too short to time" in verdict(untimed)
    assert "not compared" in verdict(record(unpruned_text=None))


def test_beating_the_bound_is_explained() -> None:
    assert any("beats the bound" in remark for remark in remarks(record()))


def test_nothing_cut_is_said() -> None:
    whole = record(unpruned_text=None)
    uncut = dataclasses.replace(whole.pruned, kv_bytes_held=whole.pruned.kv_bytes_full)
    assert "cut nothing" in verdict(dataclasses.replace(whole, pruned=uncut))
