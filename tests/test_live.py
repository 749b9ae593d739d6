import os
import pty
import re
import select
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
from rich.text import Text

from plphp_cli.memory import MemorySnapshot
from plphp_cli.reports.live import REFRESH_PER_SECOND, screen
from plphp_cli.reports.snapshot import DECODING, DONE, PREFILL, WAITING, ArmSnapshot, LiveSnapshot
from plphp_cli.results import LayerRecord

KIB = 1024
SIZES = [(80, 24), (80, 40), (140, 50), (60, 24), (100, 16), (200, 60)]


def layers(count: int, group: str | None = "balanced") -> tuple[LayerRecord, ...]:
    return tuple(
        LayerRecord(index, 0.2, group, 0.4, 40, 76 * KIB, 19 * KIB, 136 * KIB, 136 * KIB, 4)
        for index in range(count)
    )


def decoding(name: str = "pruned", count: int = 10, text: str = "a red circle") -> ArmSnapshot:
    return ArmSnapshot(name, DECODING, text, (0.2, 0.3, 0.4), 0.01, 0.19, 136, layers(count))


def snapshot(pruned: ArmSnapshot, unpruned: ArmSnapshot | None = None, **memory: int) -> LiveSnapshot:
    return LiveSnapshot(
        title="plphp run  builtin (float32, cpu, sdpa), 1 image, 136 tokens, 100 vision",
        config="r 0.4 delta_r 0.3 alpha 0.25 beta 0.1  (defaults, not calibrated)",
        stage="pruned arm, 1 of 2",
        pruned=pruned,
        unpruned=unpruned or ArmSnapshot("unpruned"),
        vision_tokens=100,
        memory=MemorySnapshot(rss_bytes=1 << 29, **memory),
    )


def shown(lines: list[Text]) -> str:
    return "\n".join(line.plain.rstrip() for line in lines)


# What is on the screen


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("count", [0, 1, 10, 28, 80])
@pytest.mark.parametrize("text", ["", "a red circle", "漢字 and words " * 200, "x" * 5000, "\n" * 100])
def test_every_screen_fits_and_cuts_no_row(width: int, height: int, count: int, text: str) -> None:
    pruned = decoding(count=count, text=text)
    for unpruned in (ArmSnapshot("unpruned"), replace(decoding("unpruned"), text=text)):
        lines = screen(snapshot(pruned, unpruned, device_total_bytes=1 << 37), width, height)
        assert len(lines) <= height
        assert all(line.cell_len <= width for line in lines)
        rows = [line.plain for line in lines if "40/100" in line.plain]
        assert all(row.rstrip().endswith("76.0 KiB") and "…" not in row for row in rows)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_all_layers_are_on_the_screen_condensed_where_they_must_be(width: int, height: int) -> None:
    lines = shown(screen(snapshot(decoding(count=28)), width, height))
    found: list[int] = []
    for first, last in re.findall(r"^ +(\d+)(?:-(\d+))? +0\.200", lines, re.MULTILINE):
        found += range(int(first), int(last or first) + 1)
    assert found == list(range(28))


def test_ten_layers_need_no_condensing_at_80_by_24() -> None:
    assert len(re.findall("40/100", shown(screen(snapshot(decoding(count=10)), 80, 24)))) == 10


def test_the_figures_of_both_arms_stand_side_by_side() -> None:
    slower = replace(decoding("unpruned"), elapsed_s=(0.2, 0.4, 0.6))
    text = shown(screen(snapshot(replace(decoding(), phase=DONE), slower), 80, 30))
    assert re.search(r"tokens/s +10\.0 +5\.0", text)
    assert re.search(r"prefill +190 ms +190 ms", text)
    assert "pruned: done" in text
    assert "unpruned: decoding" in text


def test_what_is_not_known_yet_is_left_blank_or_not_available() -> None:
    waiting = shown(screen(snapshot(ArmSnapshot("pruned", PREFILL)), 80, 24))
    assert re.search(r"prefill +running", waiting)
    assert "GPU, torch" in waiting
    assert "N/A" in waiting
    assert " 0 B" not in waiting
    gpu = shown(screen(snapshot(decoding(), device_used_bytes=1 << 30, device_total_bytes=1 << 36), 80, 24))
    assert re.search(r"GPU used/total +1\.00GiB/64\.00GiB", gpu)
    assert re.search(r"this process +N/A", gpu)


def test_of_a_long_answer_the_end_is_shown() -> None:
    words = " ".join(str(number) for number in range(1000))
    text = shown(screen(snapshot(decoding(text=words)), 80, 24))
    assert "999█" in text
    assert "the end of it" in text


def test_generated_text_cannot_command_the_terminal() -> None:
    text = shown(screen(snapshot(decoding(text="[red]x[/red] \x1b[2J\x9b31m")), 80, 24))
    assert "[red]x[/red] \\x1b[2J\\x9b31m" in text


# Snapshots


def test_the_cache_grows_by_each_token_that_was_fed() -> None:
    arm = decoding(count=1)
    # Three tokens are chosen, two of them fed: each adds 1 KiB to this layer.
    assert arm.kv_bytes == (76 + 2) * KIB
    assert arm.kv_bytes_uncut == (136 + 2) * KIB
    sliding = replace(arm, layers=layers(1, group="sliding"))
    assert sliding.kv_bytes == 76 * KIB


def test_rates_need_two_tokens() -> None:
    arm = ArmSnapshot("pruned", PREFILL, preprocess_s=0.1)
    assert arm.tokens_per_s is None
    assert arm.ttft_s is None
    one = arm.with_token("a", 0.5)
    assert one.ttft_s == pytest.approx(0.6)
    assert one.tokens_per_s is None
    assert one.with_token("b", 0.75).tokens_per_s == pytest.approx(4)
    assert arm.phase != WAITING


# The terminal itself

PROGRAM = """
import sys, time
from plphp_cli.cli.output import live_view
from plphp_cli.reports.snapshot import ArmSnapshot, LiveSnapshot

shot = [LiveSnapshot("title", "config", "stage", ArmSnapshot("pruned"), None)]
try:
    with live_view(lambda: shot[0]):
        print("a library's warning", file=sys.stderr)
        for number in range(8):
            shot[0] = LiveSnapshot("title", "config", f"stage {number}.", ArmSnapshot("pruned"), None)
            time.sleep(0.3)
        LEAVE
except KeyboardInterrupt:
    print("interrupted")
print("after", "torch" in sys.modules)
"""


def in_terminal(program: str) -> str:
    """What a program writes to a terminal of 80 x 24."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        written = b""
        while select.select([ours], [], [], 120)[0]:
            try:
                piece = os.read(ours, 65536)
            except OSError:
                break
            if not piece:
                break
            written += piece
        process.wait(120)
    os.close(ours)
    return written.decode()


@pytest.mark.parametrize(("leave", "ending"), [("pass", "after"), ("raise KeyboardInterrupt", "interrupted")])
def test_the_terminal_is_given_back(leave: str, ending: str) -> None:
    written = in_terminal(textwrap.dedent(PROGRAM).replace("LEAVE", leave))
    assert written.count("\x1b[?1049h") == 1
    view, _, rest = written.partition("\x1b[?1049l")
    assert "\x1b[?25l" in view
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")
    # Nobody drew but the view's own thread, and it drew more than once.
    assert REFRESH_PER_SECOND >= 4
    assert sum(f"stage {number}." in view for number in range(8)) >= 2
    assert "a library's warning" not in view
    assert "a library's warning" in rest
    assert ending in rest
    assert "stage" not in rest
    assert "after False" in rest
