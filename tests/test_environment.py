import hashlib
import json
import shlex
import subprocess
import sys
from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st

import plphp_cli
from plphp_cli import environment as module
from plphp_cli.config import PLPHPConfig
from plphp_cli.environment import command_line, environment
from plphp_cli.models.options import DEFAULTS

LOADED = SimpleNamespace(
    name="builtin",
    revision=None,
    dtype=torch.bfloat16,
    device=torch.device("cpu"),
    attn="sdpa",
    options=DEFAULTS,
)


def test_the_block_names_what_a_reader_needs():
    block = environment(
        loaded=LOADED,
        config=PLPHPConfig(r=0.5),
        seed=7,
        command=["/usr/bin/plphp", "run", "--prompt", "what is it?"],
        images=[SimpleNamespace(sha256="ab")],
        prompt="what is it?",
    )
    assert block["tool"] == {"name": "plphp-cli", "version": plphp_cli.__version__}
    assert block["torch"] == torch.__version__
    assert block["model"] == {
        "id": "builtin",
        "revision": None,
        "dtype": "bfloat16",
        "attention": "sdpa",
        "quantize": None,
        "device_map": None,
        "processor_args": {},
        "trust_remote_code": False,
    }
    assert block["device"]["type"] == "cpu"
    assert block["threads"] == torch.get_num_threads()
    assert block["cpu"]["logical_cores"] >= block["cpu"]["usable_cores"] >= 1
    assert block["command"] == "plphp run --prompt 'what is it?'"
    assert block["prompt_sha256"] == hashlib.sha256(b"what is it?").hexdigest()
    assert (block["image_sha256"], block["seed"]) == (["ab"], 7)
    assert PLPHPConfig.from_dict(block["config"]) == PLPHPConfig(r=0.5)


def test_the_block_is_strict_json_even_when_nothing_is_known():
    block = environment()
    assert json.loads(json.dumps(block, allow_nan=False)) == block
    assert block["model"] is None
    assert block["prompt_sha256"] is None


def test_only_the_machine_state_changes_between_two_looks():
    first, second = environment(loaded=LOADED, prompt="p"), environment(loaded=LOADED, prompt="p")
    first.pop("machine_state")
    second.pop("machine_state")
    assert first == second


def test_a_package_that_is_not_there_has_no_version():
    assert module.package_version("no-such-package-here") is None


@given(st.lists(st.text(), min_size=0, max_size=4))
def test_the_command_line_can_be_typed_again(words):
    assert shlex.split(command_line(["/opt/bin/plphp", *words])) == ["plphp", *words]


def test_the_command_line_of_a_module_run():
    assert command_line(["/x/plphp_cli/__main__.py", "run"]) == "python -m plphp_cli run"
    assert command_line([]) == "plphp"


def test_text_that_is_not_unicode_has_a_hash():
    assert len(module.sha256_of_text("\udcff")) == 64


def test_it_imports_no_torch():
    code = (
        "import sys, plphp_cli.environment as e; e.environment()\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
