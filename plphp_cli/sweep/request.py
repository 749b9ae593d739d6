"""What a sweep is asked to do, checked as far as that is possible without the model."""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from plphp_cli.models.options import DEFAULTS, LoadOptions
from plphp_cli.profiling.state import Question
from plphp_cli.sweep.grid import Grid
from plphp_cli.sweep.records import Constraint, Setting

ALL, FRONT, NONE = "all", "front", "none"
SPEEDS = (ALL, FRONT, NONE)
# Pairs of timed decodes in all, over prompts and repeats, as `profile` takes of one prompt.
PAIRS = 9


@dataclass(frozen=True)
class SweepRequest:
    """What the user asked for.

    Attributes:
        questions: the prompts, each once.
        measure_speed: which settings are timed: `all`, `front` or `none`.
        repeats: timed decodes of each setting and prompt; None for as many as make nine pairs in all.
        workers: processes that prompts are spread over; 1 is this one.
        ray_address: of a cluster to spread over; None for this machine.
        out: the folder of results; `resume` continues what is in it.
        inputs: the words of a command line that give the same prompts.
    """

    questions: tuple[Question, ...]
    grid: Grid
    constraint: Constraint
    model: str
    out: Path
    options: LoadOptions = DEFAULTS
    max_pixels: int | None = None
    max_new_tokens: int = 128
    measure_speed: str = FRONT
    repeats: int | None = None
    warmup: int = 1
    workers: int = 1
    ray_address: str | None = None
    resume: bool = False
    inputs: tuple[str, ...] = ()
    command: tuple[str, ...] = ()

    @property
    def timed_repeats(self) -> int:
        """Timed decodes of each setting on each prompt."""
        return self.repeats or -(-PAIRS // len(self.questions))


def prompt_id(question: Question) -> str:
    """Hash of what is asked and expected: text, system message, answer, images."""
    content = [question.prompt, question.system, question.answer, [i.sha256 for i in question.images]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@lru_cache(maxsize=4096)
def setting_id(setting: Setting) -> str:
    """What a setting is kept under: its method, knobs and seed; where thresholds come from does not count."""
    config: dict[str, Any] | None = None
    if setting.config is not None:
        config = setting.config.to_dict()
        del config["calibrated"], config["calibrated_on"]
    return json.dumps([setting.method, config, setting.seed], sort_keys=True)
