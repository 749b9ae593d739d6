"""`plphp run --chat` as a user meets it: through a pipe, and at a terminal (a real pseudo-terminal)."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from plphp_cli.chat.records import CONTINUED, STARTED_OVER, from_json
from plphp_cli.cli.app import main
from plphp_cli.results import to_json

pty = pytest.importorskip("pty", reason="needs pseudo-terminals")
NEW_TOKENS = 6


@pytest.fixture
def command(toy, images):
    return ["run", "--chat", "--model", toy, "--image", images[0].path, "--max-new-tokens", str(NEW_TOKENS)]


@pytest.fixture
def pipe(monkeypatch):
    """Put lines into stdin, which is no terminal."""

    def fill(*lines):
        raw = b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))

    return fill


@pytest.fixture
def terminal(monkeypatch):
    """Type lines into a stdin that is a terminal."""
    keyboard, screen = pty.openpty()
    with os.fdopen(screen) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield lambda *lines: os.write(keyboard, b"".join(os.fsencode(line) + b"\n" for line in lines))
    os.close(keyboard)


@pytest.fixture
def ctrl_c_at():
    """Send this process a real SIGINT as the model runs for the n-th time (from 1)."""
    handles, before = [], signal.signal(signal.SIGINT, signal.default_int_handler)

    def register(*numbers, what=signal.SIGINT):
        calls = 0

        def hook(module, arguments):
            nonlocal calls
            if type(module).__name__ == "LlavaForConditionalGeneration":
                calls += 1
                if calls in numbers:
                    signal.raise_signal(what)

        handles.append(torch.nn.modules.module.register_module_forward_pre_hook(hook))

    yield register
    for handle in handles:
        handle.remove()
    signal.signal(signal.SIGINT, before)


def hold(arguments, tmp_path, code=0):
    """Run a conversation; its record."""
    target = tmp_path / "chat.json"
    assert main([*arguments, "--json", str(target)]) == code
    record = from_json(target.read_text())
    assert from_json(to_json(record)) == record
    return record


def test_questions_come_from_a_pipe_line_by_line(command, pipe, tmp_path, capsys):
    pipe("what colour?", "", "  and where? ", "/quit", "never asked")
    record = hold([*command, "--recut", "first-turn"], tmp_path)
    out, err = capsys.readouterr()
    first, second = record.turns
    assert [turn.question for turn in record.turns] == ["what colour?", "and where?"]
    assert (first.how, first.why, second.how, second.why) == (
        STARTED_OVER,
        "the first question",
        CONTINUED,
        None,
    )
    assert first.fed_tokens == first.prompt_tokens
    assert second.fed_tokens < second.prompt_tokens
    assert second.layers == first.layers
    assert second.kv_bytes_held < second.kv_bytes_full
    assert (len(first.images), len(second.images)) == (1, 0)
    assert first.quality.kl_mean_cut_anew is None
    assert first.quality.positions < second.quality.positions + 1
    assert second.quality.kl_mean > 0
    assert second.quality.kl_mean_cut_anew > 0
    assert len(first.token_ids) == len(second.token_ids) == NEW_TOKENS
    assert out == f"{first.answer}\n{second.answer}\n"
    for expected in (
        "> and where?",
        "continued on the cut cache",
        "if cut for this question",
        "1 of 2 turns",
    ):
        assert expected in err
    assert "Traceback" not in err


def test_each_turn_is_cut_for_its_own_question_unless_asked_otherwise(command, pipe, tmp_path, capsys):
    pipe("and where?")
    # There is no live view of a conversation: to leave it out is no contradiction.
    record = hold([*command, "--prompt", "what colour?", "--no-live"], tmp_path)
    assert record.recut == "each-turn"
    assert [turn.how for turn in record.turns] == [STARTED_OVER] * 2
    assert record.turns[1].why == "each question gets its own cut"
    assert record.turns[0].layers != record.turns[1].layers
    assert "started over from the full prompt (each question gets its own cut)" in capsys.readouterr().err


def test_what_is_said_of_turns_fits_in_eighty_columns(command, images, pipe, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    question = "what is the colour of the large object that stands between the two smaller ones on the left?"
    pipe("what colour?", question, f"/image {images[1].path}", "and this one?")
    assert main([*command, "--recut", "first-turn"]) == 0
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if command[3] not in line]  # a path of this test is longer
    assert max(map(len, told)) <= 80
    for expected in ("TTFT", "KV cache", "if cut for this question", "an image joined", "1 of 3 turns"):
        assert any(expected in line for line in told)
    # Nothing was cut off: the question is there, in the lines that it takes.
    assert question in " ".join("\n".join(lines).split())


def test_an_image_may_join(command, images, pipe, tmp_path):
    pipe("what colour?", f"/image {images[1].path}", "and this?", "and now?", "/quit", "never asked")
    record = hold([*command, "--recut", "first-turn", "--no-baseline"], tmp_path)
    first, second, third = record.turns
    assert (second.how, second.why) == (STARTED_OVER, "an image joined")
    assert [image.path for image in second.images] == [images[1].path]
    assert second.vision_tokens == third.vision_tokens == 2 * first.vision_tokens
    assert third.how == CONTINUED
    assert all(turn.quality is None for turn in record.turns)
    assert len(record.environment["image_sha256"]) == 2


def test_a_conversation_may_begin_without_an_image(command, images, pipe, tmp_path):
    del command[command.index("--image") :][:2]
    arguments = [word for word in command if word not in ("--image", images[0].path)]
    pipe("hello?", f"/image {images[1].path}", "and this?")
    first, second = hold(arguments, tmp_path).turns
    assert (first.vision_tokens, first.layers[0].gamma) == (0, None)
    assert second.vision_tokens > 0


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (["what?", "/image nowhere.png", "and now?"], "line 2 of stdin: image 'nowhere.png'"),
        (["what?", "", "/image", "and now?"], "line 3 of stdin: /image names no file"),
        (["what?", "/picture x.png", "and now?"], "line 2 of stdin: unknown command '/picture'"),
        (
            ["what?", "see <image> there", "and now?"],
            "line 2 of stdin: this question holds 1 <image>, but 0 images come with it",
        ),
        (["what?", b"caf\xe9?\n", "and now?"], "line 2 of stdin is not UTF-8"),
    ],
    ids=["missing image", "no name", "unknown command", "placeholder", "encoding"],
)
def test_what_goes_wrong_in_a_pipe_ends_it_and_keeps_what_there_is(
    command, pipe, lines, named, tmp_path, capsys
):
    pipe(*lines)
    record = hold([*command, "--no-baseline"], tmp_path, code=2)
    assert [turn.question for turn in record.turns] == ["what?"]
    assert named in record.notes[0]
    err = capsys.readouterr().err
    assert f"error: {record.notes[0].partition(': ')[2]}" in err
    assert "Traceback" not in err


def test_what_goes_wrong_at_a_terminal_is_told_and_can_be_put_right(
    command, images, terminal, tmp_path, capsys
):
    terminal(
        "what?",
        "/image nowhere.png",
        "/picture",
        "/image",
        "caf\udce9?",
        "see <image>",
        f"/image {images[1].path}",
        "and now?",
        "",
    )
    first, second = hold([*command, "--no-baseline"], tmp_path).turns
    assert (first.question, second.question) == ("what?", "and now?")
    assert len(second.images) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(told) == 5
    # What was no question is one line, which says what there is.
    assert "unknown command '/picture': there are /image FILE and /quit" in told[1]
    assert "/image names no file: write /image FILE" in told[2]


@pytest.mark.parametrize("call", [1, 3])
def test_ctrl_c_at_a_terminal_ends_the_answer_alone(command, terminal, ctrl_c_at, call, tmp_path, capsys):
    ctrl_c_at(call)
    terminal("what?", "and now?", "/quit")
    first, second = hold([*command, "--no-baseline", "--recut", "first-turn"], tmp_path).turns
    assert (first.stop_reason, len(first.token_ids)) == ("interrupted", call - 1)
    assert second.stop_reason == "length"
    # What the cache has seen goes on; a prompt that never came in does not, nor do its images get lost.
    assert second.how == (STARTED_OVER if call == 1 else CONTINUED)
    assert second.vision_tokens == first.vision_tokens or call == 1
    assert len(second.images) == (1 if call == 1 else 0)
    assert "interrupted: Ctrl-C once more" in capsys.readouterr().err


def test_ctrl_c_while_an_answer_is_judged_costs_the_figures_alone(command, terminal, ctrl_c_at, tmp_path):
    ctrl_c_at(NEW_TOKENS + 2)
    terminal("what?", "and now?", "/quit")
    first, second = hold(command, tmp_path).turns
    assert (first.stop_reason, first.quality) == ("length", None)
    assert second.quality is not None


@pytest.mark.parametrize("what", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_pipe_ends_everything(command, pipe, ctrl_c_at, what, tmp_path, capsys):
    before = signal.signal(what, signal.default_int_handler)
    try:
        ctrl_c_at(3, what=what)
        pipe("what?", "and now?")
        record = hold(command, tmp_path, code=128 + what)
    finally:
        signal.signal(what, before)
    assert record.interrupted
    assert [turn.stop_reason for turn in record.turns] == ["interrupted"]
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_ctrl_c_at_the_prompt_ends_with_130(command, tmp_path):
    target = tmp_path / "chat.json"
    keyboard, screen = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "plphp_cli", *command, "--no-baseline", "--json", str(target)],
        stdin=screen,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        os.write(keyboard, b"what?\n")
        err = b""
        while err.count(b"> ") < 2:  # the prompt came back: the question is answered
            piece = process.stderr.read1()
            assert piece, err
            err += piece
        process.send_signal(signal.SIGINT)
        rest = process.communicate()[1]
    finally:
        watchdog.cancel()
        with contextlib.suppress(OSError):
            os.close(keyboard)
        os.close(screen)
    assert process.returncode == 130
    assert rest.endswith(b"interrupted\n")
    assert [turn.question for turn in from_json(target.read_text()).turns] == ["what?"]


def test_json_on_stdout_is_one_object_and_nothing_else(command, pipe, capsys):
    pipe("what?", "and now?")
    assert main([*command, "--no-baseline", "--json", "-"]) == 0
    out, _ = capsys.readouterr()
    assert len(json.loads(out)["turns"]) == 2


def test_stop_texts_end_the_answers(command, pipe, tmp_path):
    pipe("describe the image.")
    arguments = ["run", "--chat", "--image", "sample_images/shapes.png", "--no-baseline", "--stop", "zebra"]
    first = hold([*arguments, "--stop", "star"], tmp_path).turns[0]
    assert first.stop_reason == "stop"
    assert first.answer.endswith("star")


def test_a_single_run_ends_at_a_stop_text_in_both_arms(tmp_path, capsys):
    from plphp_cli.results import from_json as run_from_json

    target = tmp_path / "run.json"
    arguments = ["run", "--image", "sample_images/shapes.png", "--prompt", "Describe the image."]
    assert main([*arguments, "--stop", "star", "--json", str(target)]) == 0
    record = run_from_json(target.read_text())
    assert record.generation.stop == ("star",)
    for arm in (record.pruned, record.unpruned):
        assert arm.stop_reason == "stop"
        assert arm.text.endswith("star")
    assert capsys.readouterr().out == record.pruned.text + "\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--recut", "first-turn", "--prompt", "x"], "--recut is for conversations"),
        (["--chat", "--recut", "never"], "recut 'never'; expected each-turn or first-turn"),
        (["--chat", "--raw-prompt"], "--raw-prompt exclude each other"),
        (["--chat", "--compile"], "--chat and --compile exclude each other"),
        (["--chat", "--prompt", "-"], "one a line"),
        (["--chat", "--prompt", " "], "blank"),
        (["--chat", "--stop", ""], "--stop is empty"),
        (["--prompt", "x", "--stop", "\udcff"], "stop text is not UTF-8"),
        (["--chat"], "no question came from stdin"),
    ],
)
def test_what_cannot_be_is_refused(arguments, named, pipe, capsys):
    pipe()
    assert main(["run", "--image", "sample_images/shapes.png", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, "Traceback" in err) == ("", False)
    assert named in err


@pytest.mark.parametrize("option", ["--num-beams", "--num-return-sequences", "--assistant-model"])
def test_what_the_engine_does_not_do_is_no_option(option, capsys):
    assert main(["run", "--image", "sample_images/shapes.png", "--prompt", "x", option, "2"]) == 2
    assert option in capsys.readouterr().err


def test_beams_that_a_checkpoint_asks_for_are_left_out_by_name(toy, images, tmp_path, capsys):
    from pathlib import Path
    from shutil import copytree

    folder = Path(copytree(toy, tmp_path / "beams"))
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "num_beams": 3}))
    arguments = ["--image", images[0].path, "--prompt", "what?", "--max-new-tokens", "4", "--no-baseline"]
    assert main(["run", "--model", str(folder), *arguments]) == 0
    beams, err = capsys.readouterr()
    assert (
        "note: beam search (num_beams > 1), which the model's generation config asks for, is left out" in err
    )
    assert main(["run", "--model", toy, *arguments]) == 0
    assert capsys.readouterr().out == beams
