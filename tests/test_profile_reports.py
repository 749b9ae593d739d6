"""What the terminal and the page tell of a profile: nothing cut off, nothing that contradicts itself."""

import dataclasses
import re

import pytest
from profiles import TOKENS, profiled, request

from plphp_cli.config import PLPHPConfig
from plphp_cli.profiling.records import (
    FASTER,
    NO_DIFFERENCE,
    PRUNED,
    SLOWER,
    UNPRUNED,
    QualityRecord,
    TextsRecord,
)
from plphp_cli.profiling.state import Question
from plphp_cli.reports.profile_html import profile_html
from plphp_cli.reports.profile_terminal import profile_report
from plphp_cli.reports.profile_text import headline
from plphp_cli.units import format_bytes, format_seconds

VERDICTS = (FASTER, SLOWER, NO_DIFFERENCE)


@pytest.fixture
def several(toy, images, quick):
    """Three prompts of 2, 0 and 1 images, thresholds such that their layers fall into different groups."""
    texts = ((2, "which <b>one</b>?"), (0, "hello"), (1, "what?"))
    questions = tuple(Question(images[:count], text) for count, text in texts)
    config = PLPHPConfig(alpha=0.4, beta=0.35)
    return profiled(request(toy, images, questions=questions, config=config, repeats=1))


def judged(record):
    """The record as if there had been pairs enough: every verdict, with intervals."""
    names = [name for name, found in record.ratios.items() if found is not None and name != "kv"]
    ratios = {
        name: dataclasses.replace(
            record.ratios[name], low=0.9, high=1.1, control_low=0.95, control_high=1.05, verdict=verdict
        )
        for name, verdict in zip(names, VERDICTS * len(names), strict=False)
    }
    return dataclasses.replace(record, ratios=record.ratios | ratios)


def plain(page):
    """What a reader sees of a page, in its order."""
    without = re.sub(r"<(style|svg).*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", without).split())


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_verdict_and_no_context_is_cut_off(several, width):
    record = judged(several)
    lines = [line.plain for line in profile_report(record, width, colour=False)]
    assert all(len(line) <= width for line in lines)
    ratios = next(place for place, line in enumerate(lines) if line.startswith("── ratios"))
    memory = next(place for place, line in enumerate(lines) if line.startswith("── memory"))
    part = lines[ratios + 1 : memory]
    assert not any("…" in line for line in part)
    told = " ".join(" ".join(part).split())
    expected = [found.verdict for found in record.ratios.values() if found is not None and found.verdict]
    for verdict in VERDICTS:
        shown = told.replace("SLOWER", SLOWER).count(verdict)
        assert shown == expected.count(verdict) > 0
    assert told.count("0.950 to 1.050") == len(expected)
    rows = {line.split()[0]: line.split()[2:] for line in lines if " from " in line and "x from" in line}
    assert rows.keys() == {"1.1x", "1.5x", "2x"}
    assert all(len(cells) == len(record.bound.table) for cells in rows.values())


def test_on_a_page_verdicts_come_before_intervals(several):
    page = profile_html(judged(several))
    table = page[page.index("Ratios of paired samples") : page.index("<h2>Memory")]
    for row in re.findall(r"<tr>(?!<th scope=\"col\").*?</tr>", table):
        cells = re.findall(r'data-head="([^"]*)"', row)
        assert cells == ["verdict", "median", "95 % interval", "A/A interval"]
    blank = re.findall(r'data-head="verdict">\s*</td>', profile_html(several))
    assert blank == []
    assert "too few pairs" in profile_html(several)


def test_a_page_over_prompts_has_totals_and_each_prompt_the_worst_first(several):
    page, record = profile_html(several), several
    shown = plain(page)
    for arm in (PRUNED, UNPRUNED):
        totals = record.totals[arm]
        row = f"{arm} 3 {format_seconds(totals['prefill_s'])}"
        assert row in shown
        assert format_bytes(totals["kv_bytes_held"]) in shown
    order = [int(number) - 1 for number in re.findall(r'class="prompt"><summary><b>#(\d+)</b>', page)]
    means = [record.prompts[index].quality.kl_mean for index in order]
    assert sorted(order) == [0, 1, 2]
    assert means == sorted(means, reverse=True)
    for index in record.worst["kl"]:
        assert f"#{index + 1} ({record.prompts[index].quality.kl_mean:.4f} nats)" in shown
    # Two maps of the means, and two of each prompt with vision tokens; two plots of the whole.
    assert page.count("<svg") == 2 + 2 * (1 + 2)
    assert "which &lt;b&gt;one&lt;/b&gt;?" in page
    shares = [layer.image_shares for layer in record.prompts[0].layers]
    means = [sum(column) / len(column) for column in zip(*shares, strict=True)]
    assert f"red.png ({means[0] * 100:.0f} % kept), ring.png ({means[1] * 100:.0f} % kept)" in shown


def test_plots_share_no_ids_and_name_no_address(several):
    page = profile_html(several)
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    used = [set(re.findall(r"url\(#([^)]*)\)", figure)) for figure in figures]
    assert all(used)
    assert sum(map(len, used)) == len(set.union(*used))
    for foreign in ("purl.org", "creativecommons", "rdf:"):
        assert foreign not in page


def test_groups_that_differ_are_counted(several):
    layer = dataclasses.replace(several.layers[0], group=None, groups={"balanced": 2, "attentive": 1})
    record = dataclasses.replace(several, layers=(layer, *several.layers[1:]))
    assert "2 balanced, 1 attentive" in plain(profile_html(record))
    lines = " ".join(line.plain for line in profile_report(record, 120, colour=False))
    assert "2 bal 1 att" in lines


def test_both_means_of_kl_are_named(several):
    quality = several.quality
    both = f"{quality.kl_mean:.4f} nats a token as the mean of tokens, {quality.kl_mean_over_prompts:.4f}"
    assert both in " ".join(headline(several))
    assert both in " ".join(" ".join(line.plain for line in profile_report(several, 100, False)).split())


def test_an_arm_that_failed_is_the_reason_and_the_other_is_shown(several):
    arms = dataclasses.replace(
        several.arms,
        pruned=dataclasses.replace(several.arms.pruned, failed="out of memory", kv_bytes_held=None),
    )
    quality = QualityRecord(texts=TextsRecord(unpruned="a red circle"))
    record = dataclasses.replace(several, arms=arms, quality=quality, ratios={})
    told = " ".join(headline(record))
    assert "the pruned arm failed" in told
    assert "no second token" not in told
    assert format_bytes(record.arms.unpruned.kv_bytes_held) in told
    assert "unpruned a red circle" in plain(profile_html(record))
    assert "a red circle" in [line.plain for line in profile_report(record, 80, False)]


def test_one_of_a_thing_is_singular(several):
    lines = " ".join(line.plain for line in profile_report(several, 80, False))
    assert "median of 1 repeat " in lines
    assert f"end to end, {TOKENS} tokens" in lines
