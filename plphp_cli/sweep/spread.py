"""Prompts spread over processes with Ray: every worker has its own model, and this process alone writes.

A worker does what the serial sweep does, with the same function; the prompts of one that dies are given to
another.
"""

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plphp_cli.errors import PLPHPError, UsageError
from plphp_cli.sweep.identity import Identity, identity
from plphp_cli.sweep.request import SweepRequest
from plphp_cli.sweep.work import Job, Refused, Tally, check_settings, measure_prompt

if TYPE_CHECKING:
    from plphp_cli.models import LoadedModel
    from plphp_cli.sweep.records import Row

# A prompt on which so many workers died is not given to another.
TRIES = 3
# Seconds between two looks at whether the user wants to stop.
LOOK_S = 0.5
_STORE_BYTES = 512 << 20


@dataclass(frozen=True)
class Portion:
    """What a worker made of a prompt since the last portion, what that took, and which worker it was.

    `last` ends the prompt.
    """

    outcomes: "tuple[Row | Refused, ...]"
    tally: Tally
    worker: dict[str, Any]
    last: bool


@dataclass
class _Task:
    """A prompt that a worker has, the stream of its portions, and how many workers have had it."""

    job: Job
    tries: int
    worker: Any
    stream: Any

    def without(self, portion: Portion) -> None:
        """Leave out what is done: should the worker die, another need not measure it again."""
        done = {outcome.setting for outcome in portion.outcomes}
        left = tuple(setting for setting in self.job.settings if setting not in done)
        self.job = dataclasses.replace(self.job, settings=left)


def spread(
    request: SweepRequest, jobs: Sequence[Job], check: Callable[[], None]
) -> Generator[Portion, None, None]:
    """Measure prompts on workers, each as it is done; close it to let the workers go.

    Raises:
        UsageError: there are fewer devices than workers.
        PLPHPError: a prompt ended three workers, or what a worker raised.
    """
    if not jobs:
        return
    import ray

    with _cluster(request) as make:
        waiting = deque((job, 1) for job in jobs)
        idle = [make() for _ in range(min(request.workers, len(jobs)))]
        busy: list[_Task] = []
        while waiting or busy:
            while waiting and idle:
                worker, (job, tries) = idle.pop(), waiting.popleft()
                stream = worker.measure.options(num_returns="streaming").remote(job)
                busy.append(_Task(job, tries, worker, stream))
            ready, _ = ray.wait([task.stream for task in busy], timeout=LOOK_S)
            check()
            for task in [task for task in busy if any(task.stream is stream for stream in ready)]:
                portion = _next(task.stream)
                if portion is not None:
                    task.without(portion)
                    yield portion
                    if not portion.last:
                        continue
                busy.remove(task)
                idle.append(make() if portion is None else task.worker)
                if portion is None and task.tries == TRIES:
                    raise PLPHPError(
                        f"prompt {task.job.index + 1} ended {TRIES} workers",
                        hint="out of memory? use fewer --workers; what was measured is kept: --resume",
                    )
                if portion is None:
                    waiting.append((task.job, task.tries + 1))


def _next(stream: Any) -> Portion | None:
    """The next portion of a worker; None if it died. What it raised is raised here."""
    import ray
    from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError

    try:
        return ray.get(next(stream))
    except StopIteration:
        return None
    except (RayActorError, WorkerCrashedError, OutOfMemoryError):
        return None
    except RayTaskError as error:
        cause = getattr(error, "cause", None)
        raise (cause if isinstance(cause, Exception) else error) from None


class _Worker:
    """One model in one process. It is loaded with the first prompt: a failure is then an error like any."""

    flush_s = 0.5

    def __init__(self, request: SweepRequest, expected: Identity, threads: int | None) -> None:
        self._request, self._expected, self._threads = request, expected, threads
        self._loaded: LoadedModel | None = None

    def measure(self, job: Job) -> Iterator[Portion]:
        """All settings of one prompt, handed over about every `flush_s` seconds."""
        loaded, tally = self._load(job), Tally()
        worker = {str(os.getpid()): self._describe(loaded)}
        done: list[Row | Refused] = []
        since = time.monotonic()
        with contextlib.closing(measure_prompt(loaded, job, tally)) as outcomes:
            for outcome in outcomes:
                done.append(outcome)
                if time.monotonic() - since >= self.flush_s:
                    yield Portion(tuple(done), tally.take(), worker, last=False)
                    done, since = [], time.monotonic()
        yield Portion(tuple(done), tally, worker, last=True)

    def _load(self, job: Job) -> "LoadedModel":
        if self._loaded is None:
            import torch

            from plphp_cli.models import load

            if self._threads is not None:
                torch.set_num_threads(self._threads)
            found = identity(self._request)
            for what, value in self._expected.items():
                if found.get(what) != value:
                    raise UsageError(f"a worker has another {what}: {found.get(what)}, expected {value}")
            request = self._request
            self._loaded = load(request.model, request.options)
            check_settings(self._loaded, job.settings)
        return self._loaded

    def _describe(self, loaded: "LoadedModel") -> dict[str, Any]:
        import torch

        return {
            "device": str(loaded.device),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }


@contextlib.contextmanager
def _cluster(request: SweepRequest) -> Iterator[Callable[[], Any]]:
    """A Ray cluster, this machine's own unless another is named; gives what makes a worker."""
    import ray
    import torch

    made: list[Any] = []
    ours = not ray.is_initialized()
    if ours:
        _start(request)
    try:
        on_gpu = request.options.device in ("auto", "cuda") and ray.cluster_resources().get("GPU", 0) > 0
        kind = "GPU" if on_gpu else "CPU"
        count = int(ray.cluster_resources().get(kind, 0))
        if count < request.workers:
            raise UsageError(f"workers = {request.workers}, but Ray has {count} {kind}s", hint="use fewer")
        local = request.ray_address is None
        threads = max(1, torch.get_num_threads() // request.workers) if local and not on_gpu else None
        remote = ray.remote(num_cpus=1, num_gpus=1 if on_gpu else 0, max_restarts=0)(_Worker)
        # Without the prompts: a worker is given one at a time.
        bare, expected = dataclasses.replace(request, questions=()), identity(request)

        def make() -> Any:
            made.append(remote.remote(bare, expected, threads))
            return made[-1]

        yield make
    finally:
        for worker in made:
            ray.kill(worker)
        if ours:
            ray.shutdown()


def _start(request: SweepRequest) -> None:
    import ray

    # Workers import what this process imports; and Ray must not take SIGTERM away from whoever has it.
    package, paths = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")
    handler = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"address": request.ray_address}
    if request.ray_address is None:
        options = {
            "address": "local",
            "num_cpus": request.workers,
            "include_dashboard": False,
            "object_store_memory": _STORE_BYTES,
        }
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["PYTHONPATH"] = os.pathsep.join([package, *([paths] if paths else [])])
    try:
        with contextlib.redirect_stdout(sys.stderr):
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        text = str(error).strip().splitlines()
        raise PLPHPError(
            f"Ray does not start: {text[0] if text else type(error).__name__}",
            hint="check --ray-address, or use --workers 1",
        ) from error
    finally:
        if paths is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = paths
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
