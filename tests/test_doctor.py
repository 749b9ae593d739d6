import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from plphp_cli import doctor
from plphp_cli.cli.app import main
from plphp_cli.doctor import CRASHED, FAILS, LATE, NOT_REACHED, WORKS, HubCache, examine, hide_home, try_parts
from plphp_cli.probe import BUILTIN, NVML, TORCH, TORCHVISION, TRANSFORMERS
from plphp_cli.reports.doctor import doctor_report
from plphp_cli.serialize import parse, to_json

H100 = {
    "device": "cuda:0",
    "name": "NVIDIA H100",
    "memory_bytes": 80 << 30,
    "free_bytes": 79 << 30,
    "capability": "9.0",
    "bfloat16": True,
}


def probe(*told: dict, then: str = ""):
    """A stand-in for the probe that tells so much and then does something: what a real one does at worst."""
    lines = "\n".join(json.dumps(each) for each in told)
    return (sys.executable, "-c", f"import os, time\nprint({lines!r}, flush=True)\n{then}")


def works(part: str, **found: object) -> dict:
    return {"part": part, "state": WORKS, "seconds": 1.0, "found": found}


ALL_WELL = [works(TORCH, cuda=None, hip=None, threads=1, devices=[]), works(TRANSFORMERS), works(BUILTIN)]
ABSENT = {
    "part": TORCHVISION,
    "state": "absent",
    "error": "ModuleNotFoundError: No module named 'torchvision'",
}


@pytest.fixture(scope="module")
def record():
    """The real thing, once."""
    return examine()


def test_here_everything_that_is_needed_works(record):
    assert record.usable
    for name in (TORCH, TRANSFORMERS, BUILTIN):
        part = record.part(name)
        assert (part.state, part.error) == (WORKS, None)
        assert part.seconds > 0
    assert record.part(BUILTIN).found["new_tokens"] >= 1
    assert not any(problem.fatal for problem in record.problems)
    assert record.packages["torch"]
    assert parse(type(record), to_json(record)) == record


@pytest.mark.parametrize("width", [60, 80, 132])
def test_the_page_is_plain_text_that_names_every_package_and_part(record, width):
    report = doctor_report(record, width)
    assert report.isascii()
    assert max(map(len, report.splitlines())) <= width
    for name in (*record.packages, *doctor.PARTS):
        assert name in report
    assert report.endswith("usable: yes")


def test_the_home_folder_and_secrets_are_not_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "models"))
    monkeypatch.setenv("HF_ENDPOINT", "https://me:pass-word@hub.example.org/x")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    broken = {"part": TORCH, "state": FAILS, "error": f"ImportError: {tmp_path}/lib/torch.so: bad"}
    record = examine(probe(broken))
    page = doctor_report(record, 80) + to_json(record)
    assert str(tmp_path) not in page
    assert "pass-word" not in page
    assert "hf_secret" not in page
    assert record.variables["HF_HOME"] == "~/models"
    assert record.variables["HF_ENDPOINT"] == "https://***@hub.example.org/x"
    assert "~/lib/torch.so" in page


def test_only_the_home_folder_itself_is_hidden(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert hide_home("/home/ann/x, /home/anna/x, '/home/ann'") == "~/x, /home/anna/x, '~'"


def test_a_crash_is_told_with_the_part_that_it_happened_in():
    parts = try_parts(probe(ALL_WELL[0], {"part": TRANSFORMERS, "state": "began"}, then="os.abort()"))
    assert parts[TORCH].state == WORKS
    assert (parts[TRANSFORMERS].state, parts[BUILTIN].state) == (CRASHED, NOT_REACHED)
    assert "signal 6" in parts[TRANSFORMERS].error


def test_a_part_that_hangs_is_given_up():
    parts = try_parts(probe({"part": TORCH, "state": "began"}, then="time.sleep(60)"), timeout_s=1.5)
    assert parts[TORCH].state == LATE
    assert parts[TRANSFORMERS].state == NOT_REACHED


def test_a_program_that_cannot_start_tells_nothing():
    assert {part.state for part in try_parts(probe(then="raise SystemExit(3)")).values()} == {NOT_REACHED}


@pytest.mark.parametrize(
    ("told", "named"),
    [
        (
            [{"part": TORCH, "state": FAILS, "error": "ImportError: libc10.so"}],
            "torch fails: ImportError: libc10.so",
        ),
        (
            [ALL_WELL[0], {"part": TRANSFORMERS, "state": FAILS, "error": "ImportError: x"}],
            "transformers fails",
        ),
        ([*ALL_WELL[:2], {"part": BUILTIN, "state": FAILS, "error": "KeyError: y"}], "built-in model fails"),
        ([*ALL_WELL[:1], {"part": TRANSFORMERS, "state": "began"}], "transformers crashed"),
        ([], "torch not reached"),
    ],
)
def test_what_prevents_running_is_the_first_problem_and_fatal(told, named):
    record = examine(probe(*told))
    assert not record.usable
    assert record.problems[0].fatal
    assert named in record.problems[0].text
    assert record.problems[0].hint
    assert doctor_report(record, 80).endswith("usable: NO")


def found(*told, gpus=False, packages=None):
    parts = try_parts(probe(*told))
    installed = dict.fromkeys(("nvidia-ml-py", "torchvision", "num2words"), "1.0") | {
        "transformers": "5.20.1"
    }
    installed |= packages or {}
    problems = [*doctor._device_problems(parts, installed, gpus), *doctor._package_problems(parts, installed)]
    assert not any(problem.fatal for problem in problems)
    return [problem.text + " / " + problem.hint for problem in problems]


def test_a_sound_machine_has_no_problems():
    assert found(*ALL_WELL, works(TORCHVISION)) == []
    cuda = works(TORCH, cuda="12.8", hip=None, devices=[H100])
    assert (
        found(works(NVML, driver="1", devices=[]), cuda, *ALL_WELL[1:], works(TORCHVISION), gpus=True) == []
    )


def test_each_problem_is_named_with_what_to_do():
    (text,) = found(*ALL_WELL, gpus=True)
    assert "built without CUDA" in text
    (text,) = found(works(TORCH, cuda="12.8", hip=None, devices=[]), *ALL_WELL[1:], gpus=True)
    assert "CUDA_VISIBLE_DEVICES" in text
    cuda = works(TORCH, cuda="12.8", hip=None, devices=[H100])
    no_nvml = {"part": NVML, "state": "absent", "error": "ModuleNotFoundError: No module named 'pynvml'"}
    (text,) = found(no_nvml, cuda, *ALL_WELL[1:], gpus=True, packages={"nvidia-ml-py": None})
    assert "pip install nvidia-ml-py" in text
    (text,) = found(*ALL_WELL, ABSENT, packages={"torchvision": None})
    assert "plphp-cli[vision]" in text
    (text,) = found(*ALL_WELL, packages={"num2words": None})
    assert "SmolVLM" in text
    for version in ("5.3.0", "5.99.1", "6.0.0"):
        (text,) = found(*ALL_WELL, packages={"transformers": version})
        assert version in text


def test_a_full_disk_and_a_cache_of_others_are_told():
    cache = HubCache("~/hub", 0, 1 << 30, False, False)
    full, readonly = doctor._disk_problems(cache)
    assert "1.00 GiB left" in full.text
    assert "HF_HOME" in full.hint
    assert "cannot be written" in readonly.text
    assert doctor._disk_problems(HubCache("~/hub", None, 1 << 40, True, False)) == []


def test_a_gpu_is_shown_with_its_memory():
    told = [works(NVML, driver="570.1", devices=["NVIDIA H100"]), works(TORCH, cuda="12.8", devices=[H100])]
    report = doctor_report(examine(probe(*told, *ALL_WELL[1:])), 80)
    assert "cuda:0" in report
    assert "NVIDIA H100, 79.00 GiB of 80.00 GiB free, compute 9.0" in report
    assert "driver 570.1, NVIDIA H100" in report
    assert "built for CUDA 12.8" in report


def test_a_torchvision_that_breaks_transformers_is_found_by_importing_it(tmp_path):
    """As the registry's torchvision does beside a torch for CPUs alone: it is there, and its import fails."""
    (tmp_path / "torchvision").mkdir()
    program = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    (tmp_path / "torchvision" / "__init__.py").write_text(program)
    information = tmp_path / "torchvision-0.99.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.99\n")
    paths = [str(tmp_path), str(Path(doctor.__file__).parents[1])]
    run = subprocess.run(
        [sys.executable, "-m", "plphp_cli", "doctor", "--json", "-"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        check=False,
    )
    record = json.loads(run.stdout)
    states = {part["name"]: part["state"] for part in record["parts"]}
    assert states[TORCHVISION] == FAILS
    assert run.returncode == (0 if states[BUILTIN] == WORKS else 1) == (not record["usable"])
    problem = next(each for each in record["problems"] if "torchvision is installed" in each["text"])
    assert "operator torchvision::nms does not exist" in problem["text"]
    assert "pip uninstall torchvision" in problem["hint"]


def test_the_command_prints_the_page_and_its_exit_code_says_whether_it_runs(
    record, monkeypatch, tmp_path, capsys
):
    from plphp_cli.cli import doctor as command

    for usable, code in ((True, 0), (False, 1)):
        monkeypatch.setattr(
            command, "examine", lambda usable=usable: dataclasses.replace(record, usable=usable)
        )
        assert main(["doctor"]) == code
        assert capsys.readouterr().out == doctor_report(dataclasses.replace(record, usable=usable), 80) + "\n"
    assert main(["doctor", "--json", str(tmp_path / "no" / "x.json")]) == 2


def test_the_supported_range_is_stated_once_for_all():
    root = Path(__file__).parents[1]
    stated = re.search(r'"transformers>=(\d+)\.(\d+),<(\d+)\.(\d+)"', (root / "pyproject.toml").read_text())
    oldest, beyond = tuple(map(int, stated.groups()[:2])), tuple(map(int, stated.groups()[2:]))
    assert oldest == doctor.OLDEST_TRANSFORMERS
    assert beyond == (doctor.NEWEST_TRANSFORMERS[0], doctor.NEWEST_TRANSFORMERS[1] + 1)
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert "transformers {}.{} to {}.{}".format(*oldest, *doctor.NEWEST_TRANSFORMERS) in readme
