"""Peaks in a fresh process per arm: what one arm leaves behind must not count for another.

`measure_fresh` starts `python -m plphp_cli.profiling.fresh`, which reads a JSON job from stdin and answers
one JSON line per prompt on stdout.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import plphp_cli
from plphp_cli.config import PLPHPConfig
from plphp_cli.models.loaded import LoadedModel
from plphp_cli.models.options import LoadOptions
from plphp_cli.profiling.records import PRUNED
from plphp_cli.profiling.state import DummyPlan
from plphp_cli.results import MemoryRecord

_OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class FreshPrompt:
    """One prompt, as another process can prepare it again: paths of its images instead of pixels."""

    images: tuple[str, ...]
    prompt: str
    system: str | None = None


@dataclass(frozen=True)
class FreshJob:
    """What a fresh process does: load the model, measure one arm on every prompt."""

    arm: str
    config: PLPHPConfig
    prompts: tuple[FreshPrompt, ...]
    max_pixels: int | None
    new_tokens: int
    model: str
    options: LoadOptions
    batch_size: int = 1
    dummy: DummyPlan | None = None


@dataclass(frozen=True)
class FreshPeaks:
    """One prompt's peaks in bytes, and the process's memory at its end; `failed` says why there are none.

    `decode_unknown` says why those of decoding are not known, where there was any.
    """

    prefill_bytes: int | None = None
    prefill_decoder_bytes: int | None = None
    decode_bytes: int | None = None
    memory: MemoryRecord | None = None
    failed: str | None = None
    decode_unknown: str | None = None

    @property
    def peak_bytes(self) -> int | None:
        """Of prefill and decoding; None where decoding's is not known: prefill's alone would pass for it."""
        if self.decode_unknown is not None:
            return None
        return max((p for p in (self.prefill_bytes, self.decode_bytes) if p is not None), default=None)


def measure_fresh(job: FreshJob, done: Callable[[int], None] = lambda count: None) -> list[FreshPeaks]:
    """Run the job in a process of its own, which does not outlive this call.

    Returns:
        The peaks of each prompt, in order; those that could not be taken say why.
    """
    payload = {**asdict(job), "config": job.config.to_dict()}
    found: list[FreshPeaks] = []
    # What it says on stderr goes to a file: a pipe that nobody reads would fill up and stop it.
    with (
        tempfile.TemporaryFile("w+", errors="replace") as words,
        subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
            env=_environment(),
            # A Ctrl-C on the terminal is for this process, which ends the other.
            start_new_session=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(payload))
            process.stdin.close()
            for line in process.stdout:
                found.append(_read(json.loads(line)))
                done(len(found))
        except BrokenPipeError:
            # It ended before it read its job; what it said tells why.
            pass
        finally:
            process.kill()
        process.wait()
        words.seek(0)
        error = words.read()
    if len(found) < len(job.prompts):
        last = error.strip().splitlines()[-1:] or ["it ended without a word"]
        found += [FreshPeaks(failed=last[0][:300])] * (len(job.prompts) - len(found))
    return found


def _environment() -> dict[str, str]:
    """This process's environment, and the package where this process has it from."""
    root = str(Path(plphp_cli.__file__).parents[1])
    paths = [root, os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _read(values: dict[str, Any]) -> FreshPeaks:
    memory = values.pop("memory", None)
    return FreshPeaks(**values, memory=None if memory is None else MemoryRecord(**memory))


def load_model(name: str, options: LoadOptions, dummy: DummyPlan | None) -> LoadedModel:
    """The model, or with `dummy` its size with random weights. Raises what `load` and `load_dummy` raise."""
    from plphp_cli.models import load

    if dummy is None:
        return load(name, options)
    from plphp_cli.models.dummy import load_dummy

    return load_dummy(name, dtype=options.dtype, device=options.device, attn=options.attn, seed=dummy.seed)


def _main() -> None:
    values = json.load(sys.stdin)
    prompts = tuple(FreshPrompt(tuple(p["images"]), p["prompt"], p["system"]) for p in values.pop("prompts"))
    config = PLPHPConfig.from_dict(values.pop("config"))
    plan = values.pop("dummy")
    dummy = None if plan is None else DummyPlan(**{**plan, "layer_rates": tuple(plan["layer_rates"])})
    options = LoadOptions.from_dict(values.pop("options"))
    job = FreshJob(prompts=prompts, config=config, options=options, dummy=dummy, **values)

    from plphp_cli.models import is_out_of_memory

    loaded = load_model(job.model, job.options, job.dummy)
    for prompt in job.prompts:
        try:
            peaks = _measure(loaded, job, prompt)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            peaks = FreshPeaks(failed=_OUT_OF_MEMORY)
        print(json.dumps(asdict(peaks)), flush=True)


def _measure(loaded: Any, job: FreshJob, example: FreshPrompt) -> FreshPeaks:
    from plphp_cli.images import load_image
    from plphp_cli.memory import MemorySampler
    from plphp_cli.models import prepare
    from plphp_cli.profiling.peaks import measure_peaks

    pruned: Any = job.config
    if job.dummy is not None:
        from plphp_cli.models.dummy import dummy_prompt
        from plphp_cli.support import layer_kinds

        plan = job.dummy
        prompt = dummy_prompt(loaded, plan.vision_tokens, plan.images, plan.text_tokens, plan.seed)
        pruned = plan.policy(len(layer_kinds(loaded.model.config)))
    else:
        images = [load_image(path, job.max_pixels) for path in example.images]
        prompt = prepare(loaded, images, example.prompt, example.system)
    with MemorySampler(loaded.device) as sampler:
        policy = pruned if job.arm == PRUNED else None
        peaks = measure_peaks(loaded, prompt, job.arm, policy, job.new_tokens, job.batch_size)
    return FreshPeaks(**asdict(peaks), memory=sampler.record())


if __name__ == "__main__":
    _main()
