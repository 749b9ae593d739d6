"""Prompts spread over a real Ray cluster of this machine: the serial results, also when a worker dies."""

import contextlib
import os
import signal
from pathlib import Path

import pytest
from PIL import Image
from toy_model import save_toy_llava

from plphp_cli.config import PLPHPConfig
from plphp_cli.errors import ModelError, UsageError
from plphp_cli.images import load_image
from plphp_cli.models.options import LoadOptions
from plphp_cli.profiling.state import Question
from plphp_cli.sweep.grid import expand
from plphp_cli.sweep.records import Constraint
from plphp_cli.sweep.request import NONE, SweepRequest
from plphp_cli.sweep.session import SweepSession

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'plphp-cli[ray]'")

from plphp_cli.sweep.spread import spread  # noqa: E402
from plphp_cli.sweep.work import Job  # noqa: E402

PROMPTS = 6


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return str(save_toy_llava(tmp_path_factory.mktemp("toy")))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "ring.png"
    Image.radial_gradient("L").save(path)
    image = load_image(str(path))
    return tuple(Question((image,) * (1 + n % 2), f"what is {n}?", answer="red") for n in range(PROMPTS))


@pytest.fixture(scope="module")
def cluster():
    """One local cluster for all tests of this file: starting one takes longer than its work here."""
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(Path.cwd())]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", paths)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20)
        yield
        ray.shutdown()


def request_of(toy, questions, out, **changes):
    options = {
        "workers": 2,
        "options": LoadOptions(device="cpu"),
        "max_new_tokens": 8,
        "measure_speed": NONE,
        **changes,
    }
    grid = expand(PLPHPConfig(alpha=0.6, beta=0.3), {"r": [0.2, 0.5]}, ["plphp", "uniform"])
    return SweepRequest(questions, grid, Constraint("kl", 0.05), options.pop("model", toy), out, **options)


def rows_of(session):
    session.prepare()
    session.run()
    return {(row.setting, row.prompt_id): row for row in session.rows()}


def test_a_worker_that_dies_costs_nothing_but_time(toy, questions, cluster, tmp_path):
    with SweepSession(request_of(toy, questions, tmp_path / "serial", workers=1)) as session:
        serial = rows_of(session)
    request = request_of(toy, questions, tmp_path / "spread")
    jobs = [Job(i, q, request.grid.settings, request.max_new_tokens) for i, q in enumerate(questions)]
    found, workers = [], []
    with contextlib.closing(spread(request, jobs, lambda: None)) as portions:
        for portion in portions:
            found += portion.outcomes
            workers += portion.worker
            if len(workers) == 2:
                # By now the first worker has a second prompt, or is about to get one.
                os.kill(int(workers[0]), signal.SIGKILL)
    assert len(set(workers)) >= 2
    assert workers[0] not in workers[2:]
    assert len(found) == len(serial)
    for row in found:
        one = serial[row.setting, row.prompt_id]
        assert row.cut_id == one.cut_id
        assert row.kv_bytes_held == one.kv_bytes_held
        assert row.kl_mean == pytest.approx(one.kl_mean, abs=1e-6)
        assert row.answer == one.answer


def test_what_a_worker_had_done_of_a_prompt_is_kept_when_it_dies(
    toy, questions, cluster, tmp_path, monkeypatch
):
    from plphp_cli.sweep import spread as module

    class Eager(module._Worker):
        flush_s = 0.0

    monkeypatch.setattr(module, "_Worker", Eager)
    request = request_of(toy, questions, tmp_path)
    jobs = [Job(0, questions[0], request.grid.settings, request.max_new_tokens)]
    portions = []
    with contextlib.closing(spread(request, jobs, lambda: None)) as stream:
        for portion in stream:
            portions.append(portion)
            if len(portions) == 1:
                os.kill(int(next(iter(portion.worker))), signal.SIGKILL)
    assert [len(portion.outcomes) for portion in portions[:1]] == [1]
    assert [portion.last for portion in portions].count(True) == 1
    settings = [row.setting for portion in portions for row in portion.outcomes]
    assert sorted(map(repr, settings)) == sorted(map(repr, request.grid.settings))


def test_the_session_writes_what_workers_measured(toy, questions, cluster, tmp_path):
    with SweepSession(request_of(toy, questions, tmp_path / "out")) as session:
        rows = rows_of(session)
        record = session.record()
    assert len(rows) == record.rows_done == record.rows_expected == PROMPTS * 5
    assert (record.cost.rows, record.cost.prefills) == (PROMPTS * 5, PROMPTS)
    assert {worker["device"] for worker in record.environment["workers"].values()} == {"cpu"}
    assert (tmp_path / "out" / "results.jsonl").read_bytes().count(b"\n") == PROMPTS * 5


def test_what_a_worker_meets_is_the_same_error(toy, questions, cluster, tmp_path):
    with pytest.raises(UsageError, match="workers = 3, but Ray has 2 CPUs"):
        list(spread(request_of(toy, questions, tmp_path, workers=3), [None], lambda: None))
    (tmp_path / "config.json").write_text("{}")
    request = request_of(toy, questions, tmp_path / "out", model=str(tmp_path))
    job = Job(0, questions[0], request.grid.settings, 4)
    with pytest.raises(ModelError, match=r"model_type"):
        list(spread(request, [job], lambda: None))


def test_a_prompt_on_which_every_worker_dies_is_named(toy, questions, cluster, tmp_path, monkeypatch):
    from plphp_cli.errors import PLPHPError
    from plphp_cli.sweep import spread as module

    class Doomed(module._Worker):
        def measure(self, job):
            os.kill(os.getpid(), signal.SIGKILL)
            yield

    monkeypatch.setattr(module, "_Worker", Doomed)
    request = request_of(toy, questions, tmp_path)
    with pytest.raises(PLPHPError, match="prompt 1 ended 3 workers"):
        list(spread(request, [Job(0, questions[0], request.grid.settings, 4)], lambda: None))


def test_an_interrupt_lets_the_workers_go(toy, questions, cluster, tmp_path):
    def check():
        raise KeyboardInterrupt

    request = request_of(toy, questions, tmp_path)
    jobs = [Job(i, q, request.grid.settings, 4) for i, q in enumerate(questions)]
    with pytest.raises(KeyboardInterrupt):
        list(spread(request, jobs, check))
