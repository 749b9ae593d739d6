import json

import pytest

from plphp_cli.dataset import read_examples
from plphp_cli.errors import UsageError


def write(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_every_line_is_a_prompt_with_paths_from_the_files_own_folder(tmp_path):
    rows = [
        {"images": ["a.png", "/b.png"], "prompt": "one", "answer": "1"},
        {"images": "c.png", "prompt": "two"},
        {"prompt": "three", "system": "be brief"},
    ]
    first, second, third = read_examples(write(tmp_path, json.dumps(rows[0]), "", *map(json.dumps, rows[1:])))
    assert [str(p) for p in first.images] == [str(tmp_path / "a.png"), "/b.png"]
    assert (first.prompt, first.answer, first.line) == ("one", "1", 1)
    assert (second.images, second.answer, second.line) == ((tmp_path / "c.png",), None, 3)
    assert (third.images, third.system) == ((), "be brief")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "not JSON"),
        ("[1]", "list"),
        ('{"prompt": " "}', "blank"),
        ('{"images": ["a"]}', "prompt = None"),
        ('{"prompt": "x", "images": [1]}', "images = [1]"),
        ('{"prompt": "x", "answer": 3}', "answer = 3"),
        ('{"prompt": "x", "image": "a"}', "'image'"),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_its_fault(tmp_path, line, named):
    with pytest.raises(UsageError) as caught:
        read_examples(write(tmp_path, '{"prompt": "fine"}', line))
    assert "line 2" in caught.value.message
    assert named in caught.value.message


def test_files_that_hold_no_text_or_no_prompt_are_refused(tmp_path):
    (tmp_path / "latin").write_bytes(b'{"prompt": "caf\xe9"}')
    for path in (tmp_path / "missing", tmp_path, tmp_path / "latin", write(tmp_path, "", " ")):
        with pytest.raises(UsageError, match=path.name):
            read_examples(path)
