import io
import re
from dataclasses import replace

import pytest
from rich.console import Console
from sweep_records import ALPHAS, HOSTILE, MAX_KL, realistic, shapes, sweep_of_all, sweep_of_alpha, without_kl

from plphp_cli.profiling.records import FASTER, SLOWER
from plphp_cli.reports.sweep_live import progress_lines, sweep_live
from plphp_cli.reports.sweep_terminal import MOST_ROWS, sweep_report
from plphp_cli.reports.sweep_text import conclusions, duration, evenly, front, keeps, merit
from plphp_cli.reports.text import for_encoding
from plphp_cli.sweep.progress import SweepProgress
from plphp_cli.sweep.recommendation import recommend
from plphp_cli.sweep.records import (
    HEAD_ONLY,
    LAYER_ONLY,
    METHODS,
    RANDOM,
    Ablation,
    Constraint,
    Interval,
)

WIDTHS = [60, 80, 120]


@pytest.fixture(scope="module")
def whole():
    return sweep_of_all()


@pytest.fixture(scope="module")
def line():
    return sweep_of_alpha()


def text_of(record, width=100):
    return "\n".join(line.plain for line in sweep_report(record, width, False))


def flat(text):
    return " ".join(text.split())


# The terminal


@pytest.mark.parametrize("width", [*WIDTHS, 40, 24])
def test_no_line_is_wider_than_the_console(whole, line, width):
    for record in shapes(whole, line):
        for drawn in sweep_report(record, width, True):
            # The command to paste alone is never broken.
            assert drawn.cell_len <= width or drawn.plain.startswith("plphp profile ")
            assert "\n" not in drawn.plain


@pytest.mark.parametrize("width", WIDTHS)
def test_the_baseline_has_its_whole_name(whole, line, width):
    for record in (whole, line):
        assert any(one.plain.split()[:1] == ["unpruned"] for one in sweep_report(record, width, False))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_front_shows_whole_figures_and_the_constrained_one_always(whole, width):
    lines = [one.plain for one in sweep_report(whole, width, False)]
    start = next(place for place, one in enumerate(lines) if "the fronts" in one)
    head = lines[start + 1]
    assert "KL mean" in head
    assert "KV held" in head
    for shown in lines[start + 1 : start + 3 + len(front(whole))][:MOST_ROWS]:
        assert "…" not in shown
    assert "unpruned" in lines[start + 2]
    assert sum(one.startswith("> ") for one in lines) == 1


def test_the_report_says_what_to_take_and_what_to_type(whole):
    assert whole.recommendation.next_command in text_of(whole, 24).splitlines()
    text = flat(text_of(whole, 80))
    assert text.startswith("Recommended: r 0.5, delta_r 0.2, alpha 0.25, beta 0.1.")
    assert "feasible by the mean, but the interval reaches beyond the limit" in text
    assert "config: out/recommended.json" in text
    assert "next: plphp profile --config out/recommended.json" in text
    assert "3 combinations skipped" in text
    assert "alpha = 0.05 is below beta = 0.1 (3 times)" in text
    assert "20 prefills" in text
    assert "3 min 14 s" in text


def test_few_prompts_are_an_indication_only(line):
    assert text_of(line).startswith("Indication only: alpha 0.3.")
    assert "6 prompts are few (under 10): indication only." in flat(text_of(line))


def test_all_infeasible_is_the_headline():
    record = realistic(ALPHAS, constraint=Constraint("kl", 0.001))
    text = flat(text_of(record))
    assert text.startswith("No setting keeps mean KL at most 0.001 nats.")
    assert "nearest miss" in text
    assert "next:" not in text


def test_without_kl_the_settings_are_listed_all_the_same():
    text = flat(text_of(without_kl()))
    assert "can be judged by" in text
    assert "all settings" in text
    assert "0.0000" not in text


def test_a_sweep_of_one_knob_is_plotted(whole, line):
    text = text_of(line, 80)
    assert "by alpha" in text
    assert "│: the limit, 0.05 nats" in text
    bars = [one for one in text.splitlines() if "█" in one]
    assert len(bars) == len(ALPHAS)
    assert [one.split()[0] for one in bars if not one.startswith(">")] == ["0.1", "0.2", "0.4", "0.5"]
    assert "█" not in text_of(whole, 80)


def test_it_reads_on_a_terminal_without_unicode(line):
    for drawn in sweep_report(line, 80, False):
        plain = for_encoding(drawn, "ascii")
        assert plain.plain.isascii()
        assert plain.cell_len == drawn.cell_len


def test_identical_cuts_stand_once_with_their_number(whole):
    rows = front(whole)
    assert sum(count for _, count in rows) == sum(p.on_front or p.on_accuracy_front for p in whole.points)
    assert len(rows) < sum(count for _, count in rows)
    assert [point.kv_ratio.mean for point, _ in rows] == sorted(point.kv_ratio.mean for point, _ in rows)


def test_a_long_front_keeps_its_ends_and_the_recommended_setting(whole):
    items = [(point, 1) for point in whole.points]
    for keep in (items[0][0], items[7][0], items[-1][0]):
        shown = evenly(items, 5, keep)
        assert len(shown) == 5
        assert shown[0] is items[0]
        assert shown[-1] is items[-1]
        assert any(point is keep for point, _ in shown)
    assert evenly(items[:3], 5, None) == items[:3]


def test_prompts_and_texts_of_others_cannot_command_the_terminal(line):
    hostile = replace(line, warnings=(HOSTILE,), model=HOSTILE)
    hostile = replace(hostile, recommendation=replace(line.recommendation, next_command=HOSTILE))
    assert all("\x1b" not in drawn.plain for drawn in sweep_report(hostile, 80, False))
    progress = SweepProgress(1, 2, 3.0, HOSTILE, title=HOSTILE)
    assert all("\x1b" not in drawn.plain for drawn in progress_lines(progress, 80, 24))


# What is said of methods


def ablation(method, mean, low, high, **others):
    interval = Interval(mean, low, high)
    return Ablation(method, 4, 20, interval, None, *others.pop("counts", (4, 0)), 0.0, **others)


def said(line, *found):
    return conclusions(replace(line, ablations=found))


def test_chance_that_wins_is_named(line):
    (text,) = said(line, ablation(RANDOM, -0.02, -0.03, -0.01, counts=(0, 4), seeds=5, seed_sd=0.001))
    assert text.startswith("CHANCE WINS")
    assert "0.0200 nats [0.0100, 0.0300] LESS" in text
    assert "indication only" not in text
    (text,) = said(line, ablation(RANDOM, 0.3, 0.2, 0.4, seeds=5, seed_sd=0.01))
    assert text.startswith("PLPHP beats chance")
    few = replace(ablation(RANDOM, -0.02, -0.03, -0.01, seeds=5, seed_sd=0.001), prompts=3)
    assert "3 prompts: indication only" in said(line, few)[0]


@pytest.mark.parametrize(
    "found",
    [
        ablation(RANDOM, 0.01, -0.01, 0.03, seeds=5, seed_sd=0.001),
        # Certain over prompts, but no more than two draws of chance differ by.
        ablation(RANDOM, 0.01, 0.005, 0.03, seeds=5, seed_sd=0.02),
        ablation(RANDOM, 0.01, 0.005, 0.03, seeds=1, seed_sd=None),
        # Certain, and nothing that anyone would notice.
        ablation(RANDOM, -0.0001, -0.0002, -0.00005, seeds=5, seed_sd=0.00001),
    ],
)
def test_what_chance_could_have_done_beats_nothing(line, found):
    (text,) = said(line, found)
    assert text.startswith("PLPHP does not measurably beat chance")


def test_a_level_helps_harms_or_cannot_be_told(line):
    texts = said(
        line,
        ablation(LAYER_ONLY, 0.02, 0.01, 0.03),
        ablation(HEAD_ONLY, -0.02, -0.03, -0.01, counts=(1, 2)),
        ablation(HEAD_ONLY, 0.01, -0.01, 0.02),
        ablation(HEAD_ONLY, 0.0, 0.0, 0.0, counts=(0, 0)),
        ablation(HEAD_ONLY, 0.1, None, None),
        replace(ablation(HEAD_ONLY, 0, 0, 0), kl_excess=None),
    )
    for text, words in zip(
        texts,
        ("saves", "HARM", "no difference", "changes nothing", "proves nothing", "not known"),
        strict=True,
    ):
        assert words in text
    assert "lower in 1 of 4 settings, equal in 1" in texts[1]


def test_the_methods_stand_in_a_table_with_their_cost(whole):
    text = text_of(whole, 100)
    for method in METHODS:
        assert re.search(rf"^{method} +0\.\d{{4}}", text, re.MULTILINE)
    assert "PLPHP beats chance" in text


def test_the_speed_says_no_more_than_was_found(whole):
    point = whole.points[whole.recommendation.point]
    place = whole.recommendation.point

    def with_verdict(verdict):
        changed = replace(point, decode_verdict=verdict, decode_ratio=Interval(1.1, 1.05, 1.2))
        return merit(replace(whole, points=(*whole.points[:place], changed, *whole.points[place + 1 :])))

    assert "Decoding is faster: 1.10x [1.05, 1.20]." in with_verdict(FASTER)
    assert "SLOWER" in with_verdict(SLOWER)
    assert "without a verdict" in with_verdict(None)


def test_whether_the_limit_is_kept_is_told_by_mean_and_interval(whole):
    shown = {keeps(point, whole.constraint) for point in whole.points}
    assert shown == {"yes", "by mean", "no"}


# The live table


@pytest.mark.parametrize(("width", "height"), [(60, 24), (80, 24), (120, 50), (80, 6), (40, 10), (20, 3)])
def test_the_live_table_fits_the_terminal(whole, width, height):
    for found in ((), whole.points):
        progress = SweepProgress(333, 1200, 95.0, "prompt 7 of 20", found, MAX_KL, "plphp sweep")
        lines = progress_lines(progress, width, height)
        assert len(lines) <= height
        assert all(drawn.cell_len <= width for drawn in lines)


def test_the_live_table_tells_progress_time_left_and_the_best(whole):
    progress = SweepProgress(300, 1200, 95.0, "prompt 7 of 20", whole.points, MAX_KL, "plphp sweep")
    text = "\n".join(drawn.plain for drawn in progress_lines(progress, 80, 24))
    assert "25 %  300 of 1,200 results, 95.0 s left" in text
    assert "best so far, over 20 prompts" in text
    assert len([one for one in text.splitlines() if one.startswith("> ")]) == 1
    strict = replace(progress, constraint=Constraint("kl", 1e-9), remaining_s=None)
    assert "no setting keeps" in "\n".join(drawn.plain for drawn in progress_lines(strict, 80, 24))


def test_the_best_so_far_is_shown_also_off_the_front(whole):
    constraint = Constraint("accuracy_drop", 0.02)
    found = tuple(replace(p, on_front=p.on_front and p is not whole.points[1]) for p in whole.points)
    progress = SweepProgress(1, 2, None, "", found, constraint)
    marked = [d.plain for d in progress_lines(progress, 100, 40) if d.plain.startswith("> ")]
    assert len(marked) == (0 if recommend(found, constraint).point is None else 1)


def test_the_live_table_leaves_nothing_behind():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, height=24)
    with sweep_live(console, lambda: SweepProgress(1, 4, None, "stage", title="title")):
        pass
    written = stream.getvalue()
    assert "title" in written
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


def test_durations_are_said_as_people_say_them():
    assert [duration(s) for s in (None, 0.5, 12.34, 99, 194.2, 7500)] == [
        "N/A", "500 ms", "12.3 s", "99.0 s", "3 min 14 s", "2 h 05 min",
    ]  # fmt: skip


def test_ablations_of_a_realistic_sweep_are_recovered(whole):
    found = {one.method: one for one in whole.ablations}
    assert set(found) == set(METHODS) - {"plphp"}
    assert all(one.kl_excess.low > 0 for one in found.values())
    assert found[RANDOM].seeds == 5
