"""The folder of a sweep: nothing lost, nothing torn, nothing mixed."""

import dataclasses
import errno
import json
import random

import pytest
from PIL import Image

from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import PLPHPError, UsageError
from plphp_cli.images import load_image
from plphp_cli.profiling.state import Question
from plphp_cli.sweep import store as store_module
from plphp_cli.sweep.records import BASELINE, PLPHP, Row, Setting
from plphp_cli.sweep.request import prompt_id
from plphp_cli.sweep.store import RESULTS, RUN, Store, check_folder

IDENTITY = {"tool version": "1", "model": "toy", "model files": "ab12"}
QUESTIONS = (Question((), "one", line=1), Question((), "two", answer="2", line=2))
SETTINGS = (Setting(BASELINE, None), Setting(PLPHP, PLPHPConfig()), Setting("random", PLPHPConfig(), 3))


def row(setting, question, **changes):
    base = Row(
        *(setting.method, setting.config, setting.seed, prompt_id(question), 0, 0.5, 10, 20, 0.5),
        *(0.1, 0.2, 1.0, None, 7, "text\n\u2028", None, None, "cut", "toy", "1"),
    )
    return dataclasses.replace(base, **changes)


def every_row():
    return [row(setting, question) for question in QUESTIONS for setting in SETTINGS]


def opened(folder, questions=QUESTIONS, identity=IDENTITY, resume=True):
    return Store(folder, identity, questions, resume)


@pytest.fixture
def folder(tmp_path):
    """A folder with every row."""
    with opened(tmp_path / "out", resume=False) as store:
        for each in every_row():
            store.append(each)
    return tmp_path / "out"


def test_rows_come_back_as_they_were(folder):
    with opened(folder) as store:
        assert store.resumed == len(every_row())
        for each in every_row():
            assert store.get(each.setting, each.prompt_id) == each
        assert store.get(Setting("uniform", PLPHPConfig()), every_row()[0].prompt_id) is None
    lines = (folder / RESULTS).read_text(encoding="utf-8").splitlines()
    wanted = (
        "method config prompt_id kv_bytes_held kv_ratio kl_mean kl_max top1_agreement first_divergence "
        "answer_correct decode_tokens_per_s"
    )
    assert set(wanted.split()) <= json.loads(lines[0]).keys()


def test_a_row_is_on_disk_before_the_next_is_measured(tmp_path):
    with opened(tmp_path / "out", resume=False) as store:
        for count, each in enumerate(every_row(), 1):
            store.append(each)
            assert (tmp_path / "out" / RESULTS).read_bytes().count(b"\n") == count


def test_whatever_byte_a_kill_stops_at_whole_rows_stay_and_the_rest_is_dropped(folder):
    content = (folder / RESULTS).read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == 10]
    places = {0, 1, *ends, *(end - 1 for end in ends), *random.Random(0).sample(range(len(content)), 40)}
    for place in sorted(places):
        (folder / RESULTS).write_bytes(content[:place])
        whole = [end for end in ends if end <= place]
        with opened(folder) as store:
            assert store.resumed == len(whole)
            assert (folder / RESULTS).read_bytes() == content[: whole[-1] if whole else 0]
            for each in every_row()[len(whole) :]:
                store.append(each)
        assert (folder / RESULTS).read_bytes() == content


def test_garbage_at_the_end_is_dropped_but_garbage_in_the_middle_is_refused(folder):
    content = (folder / RESULTS).read_bytes()
    (folder / RESULTS).write_bytes(content + b"\0\0\0\n")
    with opened(folder) as store:
        assert store.resumed == len(every_row())
    assert (folder / RESULTS).read_bytes() == content
    (folder / RESULTS).write_bytes(content.replace(b'{"method": "plphp"', b'{"method": plphp', 1))
    with pytest.raises(UsageError, match=f"{RESULTS} line 2 is not a row"):
        opened(folder)


def test_a_full_disk_leaves_whole_rows(folder, monkeypatch):
    before = (folder / RESULTS).read_bytes()

    class Full:
        """A file that takes ten bytes more."""

        def __init__(self, file):
            self.file, self.left = file, 10

        def write(self, data):
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken, self.left = data[: self.left], self.left - min(self.left, len(data))
            return self.file.write(taken)

        def __getattr__(self, name):
            return getattr(self.file, name)

    new = row(Setting("uniform", PLPHPConfig()), QUESTIONS[0])
    with opened(folder) as store:
        monkeypatch.setattr(store, "_file", Full(store._file))
        with pytest.raises(PLPHPError, match="No space left") as caught:
            store.append(new)
        assert "--resume" in caught.value.hint
        assert store.get(new.setting, new.prompt_id) is None
    assert (folder / RESULTS).read_bytes() == before


def test_a_later_row_of_the_same_setting_and_prompt_counts_and_the_earlier_goes(folder):
    timed = row(SETTINGS[1], QUESTIONS[0], decode_tokens_per_s=5.0, decode_samples_s=(1.0, 2.0))
    with opened(folder) as store:
        store.append(timed)
        assert store.get(timed.setting, timed.prompt_id) == timed
    lines = [json.loads(line) for line in (folder / RESULTS).read_text(encoding="utf-8").splitlines()]
    assert len(lines) == len(every_row())
    assert [line["decode_tokens_per_s"] for line in lines] == [None, 5.0, *[None] * 4]
    with opened(folder) as store:
        assert store.get(timed.setting, timed.prompt_id) == timed


def test_more_prompts_continue_and_their_order_does_not_matter(folder):
    third = Question((), "three", line=3)
    with opened(folder, (third, *reversed(QUESTIONS))) as store:
        assert store.resumed == len(every_row())
        store.append(row(SETTINGS[0], third))
    with opened(folder, (*QUESTIONS, third)) as store:
        assert store.resumed == len(every_row()) + 1


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"tool version": "2"}, "tool version was 1 and is 2"),
        ({"model": "other"}, "model was toy and is other"),
        ({"model files": "cd34"}, "model files was ab12 and is cd34"),
        ({"dtype": "float16"}, "dtype was None and is float16"),
    ],
)
def test_another_model_or_tool_is_refused_by_name(folder, changes, difference):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UsageError, match=difference) as caught:
        opened(folder, identity=IDENTITY | changes)
    assert "--out" in caught.value.hint
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("questions", "difference"),
    [
        (QUESTIONS[:1], "the prompt of line 2 .* is not among the prompts now"),
        ((Question((), "one!", line=1), QUESTIONS[1]), "line 1 has another text .*'one', now 'one!'"),
        ((QUESTIONS[0], dataclasses.replace(QUESTIONS[1], answer="3")), "line 2 has another expected answer"),
        ((dataclasses.replace(QUESTIONS[0], system="s"), QUESTIONS[1]), "line 1 has another system message"),
    ],
)
def test_other_prompts_are_refused_with_what_differs(folder, questions, difference):
    with pytest.raises(UsageError, match=difference):
        opened(folder, questions)


def test_an_image_of_other_content_is_refused_by_name(tmp_path):
    path = tmp_path / "a.png"

    def question(colour):
        Image.new("RGB", (8, 8), colour).save(path)
        return (Question((load_image(str(path)),), "what?"),)

    with opened(tmp_path / "out", question("red"), resume=False) as store:
        store.append(row(SETTINGS[0], question("red")[0]))
    with opened(tmp_path / "out", question("red")) as store:
        assert store.resumed == 1
    with pytest.raises(UsageError, match=r"image .*a\.png of prompt 1 has other content"):
        opened(tmp_path / "out", question("blue"))


def test_a_folder_is_used_only_if_it_is_empty_or_resumed(folder, tmp_path):
    with pytest.raises(UsageError, match="not empty") as caught:
        check_folder(folder, resume=False)
    assert "--resume" in caught.value.hint
    check_folder(folder, resume=True)
    check_folder(tmp_path / "new" / "inner", resume=True)
    assert not (tmp_path / "new").exists(), "a folder was made before there was anything to put into it"
    opened(tmp_path / "new" / "inner").close()
    # Stopped before its first row: there is nothing to lose, and the next try may be another sweep.
    check_folder(tmp_path / "new" / "inner", resume=False)
    opened(tmp_path / "new" / "inner", resume=False).close()
    assert (tmp_path / "new" / "inner" / RUN).is_file()
    (tmp_path / "new" / "notes.txt").write_text("mine")
    for name, message in (("new", "holds no sweep"), ("new/notes.txt", "is a file")):
        with pytest.raises(UsageError, match=message):
            check_folder(tmp_path / name, resume=True)


def test_a_sweep_that_was_stopped_before_its_first_row_begins_anew(folder):
    (folder / RUN).unlink()
    (folder / RESULTS).write_bytes(b"")
    (folder / f".{RUN}.x1y2").write_text("{")
    with opened(folder, identity=IDENTITY | {"model": "other"}) as store:
        assert store.resumed == 0


def test_one_sweep_at_a_time_writes_to_a_folder(folder):
    pytest.importorskip("fcntl", reason="this system has no file locks")
    with opened(folder), pytest.raises(UsageError, match="another sweep is writing"):
        opened(folder)
    opened(folder).close()


def test_rows_reach_the_disk_now_and_then_and_at_the_end(folder, monkeypatch):
    synced = []
    monkeypatch.setattr(store_module.os, "fsync", lambda number: synced.append(number))
    store = opened(folder)
    synced.clear()
    store.append(row(Setting("uniform", PLPHPConfig()), QUESTIONS[0]))
    assert len(synced) == 1
    store.close()
    assert len(synced) >= 2
