"""The program around its commands: what it imports, its help, and its exit codes."""

import re
import subprocess
import sys

import pytest

from plphp_cli.cli.app import main


def in_fresh_python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("args", [["--help"], ["run", "--help"], ["--version"], ["run", "--image", "/none"]])
def test_help_and_refusals_do_not_import_torch(args: list[str]) -> None:
    code = (
        "import sys; from plphp_cli.cli.app import main; main(sys.argv[1:]);"
        "sys.exit(3 if {'torch', 'transformers'} & set(sys.modules) else 0)"
    )
    assert in_fresh_python(code, *args).returncode == 0


def test_without_a_command_the_help_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "profile" in err


def test_the_program_can_be_run_as_a_module_and_reads_its_exit_code() -> None:
    shown = subprocess.run([sys.executable, "-m", "plphp_cli", "--version"], capture_output=True, text=True)
    assert re.fullmatch(r"plphp \d+\.\d+\.\d+\n", shown.stdout)
    assert shown.returncode == 0
    refused = subprocess.run([sys.executable, "-m", "plphp_cli", "run"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stdout == ""


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    out = capsys.readouterr().out
    names = "image prompt model config r delta-r alpha beta scope head-reduce skip-layers system max-pixels"
    names += " max-new-tokens temperature top-p seed no-baseline json force no-live debug dtype device attn"
    names += " device-map quantize processor-arg offline trust-remote-code"
    assert all(re.search(rf"--{name}\b", out) for name in names.split())
