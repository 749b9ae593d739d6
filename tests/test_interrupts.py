import contextlib
import json
import signal
import subprocess
import sys

import pytest

from plphp_cli.cli.app import main
from plphp_cli.cli.interrupts import Interrupts
from plphp_cli.sweep.store import check_folder

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_stops_the_work_and_the_shell_is_told_which(number):
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert interrupts.exit_code == 128 + number


def test_a_swallowed_interrupt_is_raised_again():
    with Interrupts() as interrupts:
        interrupts.check()
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


def test_a_second_signal_does_not_disturb_the_wrapping_up_and_a_third_ends_it():
    with Interrupts():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_while_results_are_written_signals_wait_unless_repeated():
    with Interrupts() as interrupts:
        interrupts.hold()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert interrupts.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_are_put_back_and_ignored_signals_stay_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupts():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# Before there is anything to tell

AT_AN_IMPORT = """
import signal, sys
from plphp_cli.cli.app import main

class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.nn":
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, CtrlC())
code = main(sys.argv[1:])
sys.stderr.flush()
sys.exit(code)
"""


@pytest.fixture
def words(toy, images, tmp_path):
    """By form of a command, what it is given; and the file that its record would replace."""
    target, data = tmp_path / "record.json", tmp_path / "prompts.jsonl"
    target.write_text("precious", encoding="utf-8")
    data.write_text(json.dumps({"images": [images[0].path], "prompt": "what?"}), encoding="utf-8")
    one = ["--image", images[0].path, "--prompt", "what?"]
    forms = {
        "run": ["run", *one],
        "run --data": ["run", "--data", str(data)],
        "run --chat": ["run", "--chat", *one],
        "profile": ["profile", *one],
        "sweep": ["sweep", *one, "--out", str(tmp_path / "sweep")],
    }
    common = ["--model", toy, "--device", "cpu", "--json", str(target), "--force"]
    return {form: [*words, *common] for form, words in forms.items()}, target


@pytest.mark.parametrize("form", ["run", "run --data", "run --chat", "profile", "sweep"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_loading_nothing_is_written_and_what_there_was_stays(
    words, form, number, monkeypatch, capsys
):
    commands, target = words
    monkeypatch.setattr(
        "transformers.AutoModelForImageTextToText.from_pretrained",
        lambda *args, **options: signal.raise_signal(number),
    )
    before = sorted(target.parent.iterdir())
    assert main(commands[form]) == 128 + number
    out, err = capsys.readouterr()
    assert out == ""
    assert [line for line in err.splitlines() if "interrupted" in line] == [err.splitlines()[-1]]
    assert err.endswith(" was written\n")
    assert target.read_text(encoding="utf-8") == "precious"
    if form == "sweep":  # a folder in which the same command begins anew
        check_folder(target.parent / "sweep", resume=False)
        assert not (target.parent / "sweep" / "report.json").exists()
        before.append(target.parent / "sweep")
    assert sorted(target.parent.iterdir()) == before


@pytest.mark.parametrize("form", ["run", "sweep"])
def test_torch_imported_by_half_is_no_error_of_its_own(words, form):
    commands, target = words
    done = subprocess.run(
        [sys.executable, "-c", AT_AN_IMPORT, *commands[form]], capture_output=True, text=True, check=False
    )
    # Python itself may pass the signal on as it ends: a shell reads 130 of both.
    assert done.returncode in (130, -signal.SIGINT)
    assert done.stderr.endswith(" was written\n")
    assert "error" not in done.stderr
    assert target.read_text(encoding="utf-8") == "precious"
