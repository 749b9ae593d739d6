import os
import stat
from pathlib import Path

import pytest

from plphp_cli import files
from plphp_cli.errors import PLPHPError, UsageError


def test_a_file_is_written_and_never_overwritten_unasked(tmp_path):
    target = tmp_path / "r.json"
    files.write_text(target, "one")
    with pytest.raises(UsageError, match="exists already") as caught:
        files.write_text(target, "two")
    assert "--force" in caught.value.hint
    assert target.read_text() == "one"
    files.write_text(target, "two", force=True)
    assert target.read_text() == "two"
    assert [item.name for item in tmp_path.iterdir()] == ["r.json"]


def test_a_written_file_is_as_readable_as_the_umask_allows(tmp_path):
    previous = os.umask(0o027)
    try:
        files.write_text(tmp_path / "r.json", "x")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "r.json").stat().st_mode) == 0o640


@pytest.mark.parametrize("path", ["missing/r.json", ".", "n" * 300, "file/r.json"])
def test_a_path_that_cannot_be_written_is_a_usage_error(tmp_path, path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError):
        files.check_writable(tmp_path / path, force=True)
    with pytest.raises(UsageError):
        files.write_text(tmp_path / path, "x", force=True)
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    files.write_text(tmp_path / "link.json", "new", force=True)
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"


def test_a_device_is_written_to_and_a_full_one_is_an_error():
    files.write_text("/dev/null", "x")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(PLPHPError, match="No space left"):
        files.write_text("/dev/full", "x")


def test_a_broken_write_leaves_the_old_file_alone(tmp_path):
    target = tmp_path / "r.json"
    target.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(target, "\ud800", force=True)
    assert target.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["r.json"]


def test_a_name_taken_during_the_work_costs_nothing(tmp_path):
    target = tmp_path / "r.json"
    target.write_text("another's")
    assert files.write_beside(target, "one") == tmp_path / "r.1.json"
    assert files.write_beside(target, "two") == tmp_path / "r.2.json"
    assert files.write_beside(target, "three", force=True) == target
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["one", "two", "three"]
