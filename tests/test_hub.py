"""What comes of a model's name when the hub is asked: a small server stands in the hub's place."""

import contextlib
import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from hub_server import COMMITS, Hub, serving
from PIL import Image
from toy_model import save_toy_llava

NAME = "some-org/toy-llava"
# The hub's client waits between its tries, for half a minute in all.
AT_ONCE = "import sys, time; time.sleep = lambda seconds: None;"
COMMAND = AT_ONCE + "from plphp_cli.__main__ import main; main()"
FETCH = AT_ONCE + "from plphp_cli.models.sources import *; print(complete(locate(sys.argv[1])).folder)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_llava(tmp_path_factory.mktemp("served") / "toy-llava")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("images") / "red.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return str(path)


@pytest.fixture
def hub(folder: Path):
    with serving(Hub({NAME: folder})) as served:
        yield served


@pytest.fixture
def plphp(hub: Hub, image: str, tmp_path: Path):
    """`plphp run` as a user has it, with an empty cache and the hub's place taken."""

    def run(*args: str, code: int = 0, **variables: str) -> str:
        given = ["--image", image, "--prompt", "what?", "--max-new-tokens", "2", "--no-baseline"]
        command = [sys.executable, "-c", COMMAND, "run", *given, "--device", "cpu", *args]
        done = ended(command, environment(hub, tmp_path) | variables)
        assert done.returncode == code, done.stderr
        assert code == 0 or done.stdout == ""
        assert not {"Traceback", "Warning"} & set(done.stderr.replace(":", " ").split())
        said = done.stderr.splitlines()
        errors = [line for line in said if line.startswith("error: ")]
        assert len(errors) == (code != 0)
        # The error and its hint are the last that is said.
        assert not code or len(said) - said.index(errors[0]) <= 2, done.stderr
        return done.stderr

    return run


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path):
    """The files of a model, as every command fetches them, without importing torch."""

    def run(name: str, before: tuple[str, ...] = (), **variables: str) -> str:
        done = ended([*before, sys.executable, "-c", FETCH, name], environment(hub, tmp_path) | variables)
        return done.stdout or done.stderr.strip().splitlines()[-1]

    return run


def ended(command: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)


def environment(hub: Hub, home: Path) -> dict[str, str]:
    there = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home / "hub"), "HF_HUB_OFFLINE": "0"}
    package = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **there, "PYTHONPATH": package, "HF_HUB_DISABLE_TELEMETRY": "1"}


def files_asked(hub: Hub) -> list[str]:
    return [line.split()[1].rsplit("/", 1)[1] for line in hub.asked if line.startswith("GET some-org")]


def test_a_model_is_fetched_once_and_then_runs_offline(hub: Hub, plphp, fetch) -> None:
    assert f"fetching {NAME} from the hub, at {COMMITS['main']}" in plphp("--model", NAME)
    assert files_asked(hub).count("model.safetensors") == 1
    hub.asked.clear()
    assert COMMITS["main"] in fetch(NAME)
    assert files_asked(hub) == []
    hub.asked.clear()
    assert "fetching" not in plphp("--model", NAME, "--offline")
    assert COMMITS["main"] in fetch(NAME, HF_HUB_OFFLINE="1")
    assert hub.asked == []


def test_offline_holds_in_a_program_that_has_asked_the_hub_before(hub: Hub, fetch, tmp_path: Path) -> None:
    code = "from plphp_cli import models; from plphp_cli.errors import PLPHPError; import os\n"
    code += f"models.fetch({NAME!r}, models.LoadOptions(offline=False)); print('there')\n"
    code += f"models.fetch({NAME!r}, models.LoadOptions(offline=True))\n"
    code += "try:\n    models.fetch('some-org/other', models.LoadOptions(offline=True))\n"
    code += "except PLPHPError as error:\n    print(error)\n"
    code += "try:\n    models.fetch('some-org/another')\n"
    code += "except PLPHPError as error:\n    print(error)\n"
    done = ended([sys.executable, "-c", code], environment(hub, tmp_path))
    there, other, another = done.stdout.splitlines()
    assert there == "there"
    assert "the hub is not asked" in other
    # Only for that one call.
    assert "the hub has no model some-org/another" in another
    asked = [
        line for line in hub.asked if NAME in line and "HEAD" in line and line.endswith("/main/config.json")
    ]
    assert len(asked) == 1
    assert not any("some-org/other" in line for line in hub.asked)


def test_the_card_obeys_offline(hub: Hub, tmp_path: Path) -> None:
    command = [sys.executable, "-c", COMMAND, "models", NAME, "--offline"]
    done = ended(command, environment(hub, tmp_path))
    assert (done.returncode, done.stdout, hub.asked) == (1, "", [])
    assert "the hub is not asked (offline)" in done.stderr
    assert "without --offline" in done.stderr


def test_a_revision_is_its_own_model(hub: Hub, plphp, fetch) -> None:
    assert COMMITS["v1"] in fetch(f"{NAME}@v1")
    assert "no revision 'v2'" in plphp("--model", f"{NAME}@v2", code=2)
    # Only what was fetched is there.
    hub.asked.clear()
    assert COMMITS["v1"] in fetch(f"{NAME}@v1", HF_HUB_OFFLINE="1")
    error = plphp("--model", NAME, "--offline", code=1)
    assert "not in the local cache, and the hub is not asked (offline)" in error
    assert "without --offline" in error
    assert hub.asked == []


@pytest.mark.parametrize(
    ("refusal", "expected", "hint"),
    [
        ((403, "GatedRepo"), "is gated", "hf auth login"),
        ((401, "GatedRepo"), "is gated", "accept them on https://huggingface.co/some-org/other"),
        ((404, "RepoNotFound"), "the hub has no model some-org/other", "check the spelling"),
        ((401, "RepoNotFound"), "the hub has no model some-org/other", "hf auth login"),
    ],
)
def test_what_the_hub_does_not_give(hub: Hub, plphp, refusal, expected: str, hint: str) -> None:
    hub.refusals["some-org/other"] = refusal
    error = plphp("--model", "some-org/other", code=2)
    assert expected in error
    assert hint in error


def test_a_misspelt_model_is_recognised_among_those_here(plphp, fetch) -> None:
    fetch(NAME)
    assert f"did you mean {NAME}?" in plphp("--model", "some-org/toy-lava", code=2)


def test_what_is_no_vision_language_model_is_refused_before_its_weights(
    hub: Hub, plphp, folder: Path, tmp_path: Path
) -> None:
    text, empty = tmp_path / "text", tmp_path / "empty"
    shutil.copytree(folder, text)
    (text / "config.json").write_text('{"model_type": "llama"}')
    empty.mkdir()
    (empty / "README.md").write_text("no model")
    hub.folders |= {"some-org/text": text, "some-org/empty": empty}
    assert "is a text-only model (llama)" in plphp("--model", "some-org/text", code=2)
    assert "has no config.json" in plphp("--model", "some-org/empty", code=2)
    assert "model.safetensors" not in files_asked(hub)


def test_a_repository_without_safetensors_says_so_instead_of_fetch_again(
    hub: Hub, plphp, folder: Path, tmp_path: Path
) -> None:
    pickled = Path(shutil.copytree(folder, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    sharded = Path(shutil.copytree(folder, tmp_path / "sharded"))
    (sharded / "model.safetensors").rename(sharded / "model-00002-of-00002.safetensors")
    shards = {"weight_map": {name: f"model-0000{name}-of-00002.safetensors" for name in "12"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(shards))
    hub.folders |= {"some-org/pickled": pickled, "some-org/sharded": sharded}
    told = "the repository of some-org/pickled has no safetensors weights, only pytorch_model.bin"
    error = plphp("--model", "some-org/pickled", code=2)
    assert told in error
    assert "hint: only safetensors are read" in error
    code = "import sys; from plphp_cli.card import describe\n"
    code += "for name in sys.argv[1:]:\n    print('; '.join(describe(name, device='cpu').notes))"
    names = ["some-org/pickled", "some-org/sharded"]
    done = ended([sys.executable, "-c", code, *names], environment(hub, tmp_path))
    one, two = done.stdout.splitlines()
    assert told in one
    assert "the repository of some-org/sharded lacks the weights model-00001" in two, two


def test_a_download_that_breaks_off_is_tried_again(hub: Hub, fetch, folder: Path) -> None:
    hub.truncations["model.safetensors"] = 1
    got = Path(fetch(NAME).strip()) / "model.safetensors"
    assert got.read_bytes() == (folder / "model.safetensors").read_bytes()
    assert files_asked(hub).count("model.safetensors") == 2


def test_a_download_that_never_ends_is_told_and_can_be_repeated(hub: Hub, plphp, fetch) -> None:
    hub.broken.add("model.safetensors")
    error = plphp("--model", NAME, code=1)
    assert f"the download of {NAME}" in error
    assert "broke off" in error
    assert "repeat the command" in error
    assert "only partly in the local cache" in fetch(NAME, HF_HUB_OFFLINE="1")
    hub.broken.clear()
    hub.asked.clear()
    assert COMMITS["main"] in fetch(NAME)
    assert files_asked(hub) == ["model.safetensors"]


def test_one_ctrl_c_ends_a_download_that_stands_still(
    hub: Hub, fetch, image: str, tmp_path: Path, folder: Path
) -> None:
    hub.stalled.add("model.safetensors")
    words = ["run", "--image", image, "--prompt", "what?", "--model", NAME, "--device", "cpu"]
    # Signals a process was started to ignore stay ignored.
    heard = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {COMMAND}"
    command = [sys.executable, "-c", heard, *words]
    patient = environment(hub, tmp_path) | {"HF_HUB_DOWNLOAD_TIMEOUT": "300"}
    with subprocess.Popen(command, env=patient, stdout=-1, stderr=-1, text=True) as process:
        try:
            while "stalled model.safetensors" not in hub.asked and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
            hub.released.set()
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in err
    hub.stalled.clear()
    assert (Path(fetch(NAME).strip()) / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()


def test_a_hub_that_is_down_or_out_of_reach(hub: Hub, plphp, fetch) -> None:
    hub.status = 503
    assert "the hub cannot be reached" in plphp("--model", NAME, code=1)
    error = plphp("--model", NAME, code=1, HF_ENDPOINT="http://127.0.0.1:9")
    assert "the hub cannot be reached" in error
    assert "check the network" in error
    # What was fetched before needs no hub.
    hub.status = None
    assert COMMITS["main"] in fetch(NAME)
    assert COMMITS["main"] in fetch(NAME, HF_ENDPOINT="http://127.0.0.1:9")


def test_a_full_disk(fetch, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=64k none {disk}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("needs a disk of its own, which this machine does not let us make")
    before = ("unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh")
    error = fetch(NAME, before, HF_HOME=str(disk))
    assert f"PLPHPError: no space left to download {NAME} into {disk}" in error, error


def test_progress_is_shown_on_a_terminal(hub: Hub, image: str, tmp_path: Path) -> None:
    control, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    done = subprocess.run(
        [sys.executable, "-c", FETCH, NAME],
        env=environment(hub, tmp_path),
        stdout=subprocess.PIPE,
        stderr=terminal,
        timeout=120,
    )
    os.close(terminal)
    shown = ""
    # The other end is closed: once all is read, there is an error on Linux, and nothing elsewhere.
    with contextlib.suppress(OSError):
        while piece := os.read(control, 1 << 16):
            shown += piece.decode()
    os.close(control)
    assert done.returncode == 0, shown
    assert COMMITS["main"] in done.stdout.decode()
    assert "100%" in shown


def test_code_is_fetched_only_where_it_is_trusted_and_before_the_weights(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    config = json.loads((own / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForImageTextToText": "own.OwnModel"}
    (own / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    (own / "own.py").write_text("1 / 0\n")
    hub.folders["some-org/own"] = own
    # Code beside a model that needs none.
    known = Path(shutil.copytree(folder, tmp_path / "known"))
    (known / "own.py").write_text("1 / 0\n")
    hub.folders["some-org/known"] = known
    code = "import sys; from plphp_cli import models; from plphp_cli.errors import ModelError\n"
    code += "for trusted in (False, True):\n"
    code += "    try:\n        models.fetch('some-org/own', models.LoadOptions(trust_remote_code=trusted))\n"
    code += "    except ModelError as error:\n        print(error)\n"
    code += "models.fetch('some-org/known')\n"
    done = ended([sys.executable, "-c", code], environment(hub, tmp_path))
    refused, failed = done.stdout.splitlines()
    assert "no model type 'own', and the model's code is not run" in refused
    assert "the code that some-org/own brings fails: division by zero" in failed
    asked = files_asked(hub)
    assert asked[:2] == ["config.json", "own.py"]
    assert asked.count("own.py") == 1
    assert asked.count("model.safetensors") == 1
