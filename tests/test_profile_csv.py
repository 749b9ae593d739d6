"""The CSV of a profile: every measurement that the JSON has, under its own name."""

import csv
import dataclasses
import io
from collections import Counter

import pytest
from profiles import profiled, request

from plphp_cli.profiling.records import ProfileRecord
from plphp_cli.profiling.state import Question
from plphp_cli.reports import profile_csv as table
from plphp_cli.reports.profile_csv import profile_csv
from plphp_cli.serialize import to_dict

# Places that the CSV tells in its columns, and what a ratio is of, which it tells in the column `arm`.
_PLACES = ("index", "numerator", "denominator")


@pytest.fixture
def several(toy, images, quick):
    questions = tuple(Question(images[:count], "what?") for count in (2, 0))
    return profiled(request(toy, images, questions=questions, repeats=2))


def rows(record):
    return list(csv.DictReader(io.StringIO(profile_csv(record))))


def numbers(value):
    """Every number of a record, as often as it stands there; lists of plain values are one JSON text."""
    if isinstance(value, dict):
        return [n for name, part in value.items() if name not in _PLACES for n in numbers(part)]
    if isinstance(value, list):
        return [n for part in value for n in numbers(part)]
    return [str(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_every_number_is_there_as_often_as_in_the_json(several):
    values = to_dict(several)
    for name in ("environment", "plan", "config", "worst", "bound"):
        values.pop(name)
    for prompt in values["prompts"]:
        prompt.pop("images")
    wanted = Counter(numbers(values))
    missing = wanted - Counter(row["value"] for row in rows(several))
    assert sum(wanted.values()) > 500
    assert missing == Counter()


def test_no_part_of_the_record_is_forgotten():
    parts = (*table._HEAD, *table._CIRCUMSTANCES, *table._OVERALL, *table._ROWS)
    assert sorted(parts) == sorted(field.name for field in dataclasses.fields(ProfileRecord))


def test_layers_and_the_control_are_told_over_all_prompts_too(several):
    told = [row for row in rows(several) if not row["prompt"]]
    gammas = [float(row["value"]) for row in told if (row["figure"], row["head"]) == ("gamma", "")]
    assert gammas == [layer.gamma for layer in several.layers]
    control = [row["value"] for row in told if (row["arm"], row["figure"]) == ("control", "prefill_s")]
    assert control == [str(seconds) for seconds in several.control.prefill_s]
