import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from sweep_records import HOSTILE, grid, realistic, shapes, sweep_of_all, sweep_of_alpha, without_kl

from plphp_cli.config import PLPHPConfig
from plphp_cli.reports.sweep_csv import COLUMNS, sweep_csv
from plphp_cli.reports.sweep_html import sweep_html
from plphp_cli.serialize import parse, to_json
from plphp_cli.sweep.records import Interval, SweepRecord


@pytest.fixture(scope="module")
def whole():
    return sweep_of_all()


@pytest.fixture(scope="module")
def line():
    return sweep_of_alpha()


# CSV


def test_the_csv_gives_back_every_point(whole):
    rows = list(csv.DictReader(io.StringIO(sweep_csv(whole))))
    assert len(rows) == len(whole.points)
    assert tuple(rows[0]) == COLUMNS
    for read, point in zip(rows, whole.points, strict=True):
        assert read["method"] == point.setting.method
        if point.setting.config is not None:
            knobs = {knob: float(read[knob]) for knob in ("r", "delta_r", "alpha", "beta")}
            config = PLPHPConfig(**knobs, scope=read["scope"], head_reduce=read["head_reduce"])
            assert config == point.setting.config
        assert float(read["kv_ratio"]) == point.kv_ratio.mean
        assert float(read["kl_mean_nats_low"]) == point.kl_mean.low
        assert (read["on_front"] == "true") == point.on_front
        assert (float(read["decode_ratio"]) if read["decode_ratio"] else None) == (
            point.decode_ratio.mean if point.decode_ratio else None
        )
    best = [place for place, read in enumerate(rows) if read["recommended"] == "true"]
    assert best == [whole.recommendation.point]


def test_what_is_not_known_is_empty_in_the_csv():
    rows = list(csv.DictReader(io.StringIO(sweep_csv(without_kl()))))
    assert {read["kl_mean_nats"] for read in rows} == {""}
    assert {read["feasible"] for read in rows} == {""}
    skipped = realistic(grid(skip_layers=(0, 3)), prompts=2)
    assert next(csv.DictReader(io.StringIO(sweep_csv(skipped)[0:]))) is not None
    assert ",0 3," in sweep_csv(skipped)


def test_the_record_goes_through_json(whole):
    assert parse(SweepRecord, to_json(whole)) == whole


# The page


class Page(HTMLParser):
    """What a page holds: tags with attributes, and the text of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "rect", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)


def test_pages_are_well_formed_and_ask_nothing_of_any_network(whole, line):
    for record in shapes(whole, line):
        text = sweep_html(record)
        page = Page(text)
        assert page.open == []
        assert len(page.scripts) == 2
        for tag, attributes in page.tags:
            assert not {"src", "href", "srcset", "action"} & set(attributes), tag
        assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp|import\(", text)
        assert "nan" not in re.sub(r"<script>.*", "", text, flags=re.DOTALL).lower().split()


def test_texts_of_others_stay_texts(whole):
    hostile = tuple(replace(one, prompt=HOSTILE, unpruned_answer=HOSTILE) for one in whole.prompts)
    record = replace(
        whole,
        model=HOSTILE,
        prompts=hostile,
        warnings=(HOSTILE,),
        environment={"command": HOSTILE, "x": HOSTILE},
        recommendation=replace(whole.recommendation, reason=HOSTILE, next_command=HOSTILE),
    )
    text = sweep_html(record)
    page = Page(text)
    assert len(page.scripts) == 2
    assert not any(tag == "img" for tag, _ in page.tags)
    assert "\x1b" not in text
    assert "\u2028" not in text


def test_the_embedded_data_is_json_that_closes_no_tag(whole):
    # A figure that is shown with a sign of HTML.
    tiny = replace(whole.points[1], kl_mean=Interval(3e-7, 2e-7, 4e-7))
    page = Page(sweep_html(replace(whole, points=(whole.points[0], tiny, *whole.points[2:]))))
    data = json.loads(page.scripts[0])
    assert not {"<", ">", "&"} & set(page.scripts[0])
    assert len(data["points"]) == len(whole.points)
    assert data["best"] == whole.recommendation.point
    assert data["points"][data["best"]]["knobs"] == {
        "r": "0.5",
        "delta_r": "0.2",
        "alpha": "0.25",
        "beta": "0.1",
    }


def test_the_page_reads_without_its_script(whole):
    text = sweep_html(whole)
    page = Page(text)
    marks = [a for tag, a in page.tags if tag == "g" and "data-i" in a]
    # Every point in both plots, each with a title of its own.
    assert len(marks) == 2 * len(whole.points)
    assert text.count("<title>") == 1 + len(marks)
    rows = [a for tag, a in page.tags if tag == "tr" and "data-i" in a]
    assert [int(a["data-i"]) for a in rows] == list(range(len(whole.points)))
    assert 'id="heat"' in text
    assert "Recommended: r 0.5" in text
    assert "PLPHP beats chance" in text


def test_marks_stay_within_the_plot(whole, line):
    for record in (whole, line):
        for x, y in re.findall(
            r'class="mark[^"]*" data-i="\d+" transform="translate\(([\d.-]+),([\d.-]+)\)', sweep_html(record)
        ):
            assert 58 <= float(x) <= 480 - 24
            assert 14 <= float(y) <= 340 - 46


def test_the_heatmap_has_a_cell_for_every_pair_and_needs_two_knobs(whole, line):
    text = sweep_html(whole)
    heat = text[text.index('id="heat"') : text.index("</table>", text.index('id="heat"'))]
    assert heat.count("<td") == 5 * 3
    assert heat.count("best") == 1
    assert 'id="heat"' not in sweep_html(line)
    assert "beside each mark" in sweep_html(line)


def test_columns_that_nothing_was_measured_for_are_left_out(line):
    text = sweep_html(line)
    assert "<th>agreement</th>" in text
    assert "<th>accuracy</th>" not in text


def test_pages_are_the_same_every_time(line):
    assert sweep_html(line) == sweep_html(line)
