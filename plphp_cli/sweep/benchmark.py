"""What a sweep takes, beside the naive way to the same figures, and how it grows.

    python -m plphp_cli.sweep.benchmark [--settings 60] [--prompts 20] [--images 1 2 3] [--data FILE]

The naive way: for every setting and prompt a prefill of its own, then the unpruned answer fed token by token.
It is given the unpruned arm once per prompt, and neither loads the model again nor writes anything. Expected
answers are left out, so that both do the same work. Both run in one process with the same threads.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from plphp_cli.attention import prune
from plphp_cli.builtin.evaluate import draw_items, pictures
from plphp_cli.config import PLPHPConfig
from plphp_cli.dataset import read_examples
from plphp_cli.images import load_image
from plphp_cli.models import default_config, load, prepare
from plphp_cli.prefilling import advance, prefill
from plphp_cli.profiling.answers import answer_with
from plphp_cli.profiling.state import Question
from plphp_cli.quality import divergence
from plphp_cli.sweep.grid import Grid, expand
from plphp_cli.sweep.records import Constraint, Row
from plphp_cli.sweep.request import NONE, SweepRequest
from plphp_cli.sweep.session import SweepSession

if TYPE_CHECKING:
    from plphp_cli.models import LoadedModel


def grid_of(count: int, base: PLPHPConfig) -> Grid:
    """A grid of `count` settings around a config: rates and both thresholds vary."""
    rates = [round(0.05 + 0.06 * step, 2) for step in range(-(-count // 4))]
    thresholds = {"alpha": [0.5, 0.7], "beta": [0.2, 0.35]}
    whole = expand(base.replace(delta_r=0.03), {"r": rates, **thresholds})
    return dataclasses.replace(whole, settings=whole.settings[: count + 1])


def sample_questions(count: int, images: Sequence[int]) -> tuple[Question, ...]:
    """Held-out questions of the built-in model's own world, none twice."""
    found = []
    for item in draw_items(count, images, seed=1):
        shown = tuple(
            dataclasses.replace(picture, sha256=hashlib.sha256(picture.image.tobytes()).hexdigest())
            for picture in pictures(item.group)
        )
        found.append(Question(shown, item.qa.question))
    return tuple(found)


def read_questions(path: Path, count: int) -> tuple[Question, ...]:
    """The first prompts of a file, without their expected answers."""
    examples = read_examples(path)[:count]
    return tuple(Question(tuple(map(load_image, one.images)), one.prompt, one.system) for one in examples)


def time_sweep(request: SweepRequest) -> tuple[float, list[Row]]:
    """Seconds of a whole sweep but for loading the model, rows on disk included, and the rows."""
    with (
        tempfile.TemporaryDirectory() as folder,
        SweepSession(dataclasses.replace(request, out=Path(folder) / "out")) as session,
    ):
        session.prepare()
        start = time.perf_counter()
        session.run()
        return time.perf_counter() - start, session.rows()


def time_naive(loaded: "LoadedModel", request: SweepRequest) -> tuple[float, list[tuple[int, float | None]]]:
    """Seconds of the naive way, and what it finds: (bytes held, mean KL) per prompt and setting."""
    found = []
    start = time.perf_counter()
    for question in request.questions:
        prompt = prepare(loaded, question.images, question.prompt, question.system)
        _, ids = answer_with(loaded, prompt, None, request.max_new_tokens)
        reference, _ = _step_by_step(loaded, question, None, ids)
        for config in request.grid.configs:
            logits, held = _step_by_step(loaded, question, config, ids)
            found.append((held, divergence(reference, logits).kl_mean))
    return time.perf_counter() - start, found


def _step_by_step(
    loaded: "LoadedModel", question: Question, config: PLPHPConfig | None, ids: Sequence[int]
) -> tuple[torch.Tensor, int]:
    prompt = prepare(loaded, question.images, question.prompt, question.system)
    with prune(loaded.model, config) as pruner:
        run = prefill(loaded, prompt, pruner, len(ids))
        tokens = torch.tensor(ids, device=loaded.device)[None]
        rows = [advance(loaded, run, tokens[:, place : place + 1]) for place in range(len(ids) - 1)]
    return torch.cat([run.logits[None], *rows]), sum(layer.held_bytes for layer in run.state.layers)


def compare(loaded: "LoadedModel", request: SweepRequest, naive_settings: int) -> dict[str, Any]:
    """Both ways on the same prompts; the naive one on the first `naive_settings` settings."""
    grid = request.grid
    few = dataclasses.replace(grid, settings=grid.settings[: naive_settings + 1])
    swept_s, rows = time_sweep(request)
    naive_s, found = time_naive(loaded, dataclasses.replace(request, grid=few))
    taken = [row for row in rows if row.setting in few.settings and row.config is not None]
    if [held for held, _ in found] != [row.kv_bytes_held for row in taken]:
        raise SystemExit("the two ways do not hold the same bytes")
    gaps = [abs((kl or 0.0) - (row.kl_mean or 0.0)) for (_, kl), row in zip(found, taken, strict=True)]
    each, pairs = naive_s / len(found), len(request.questions) * len(grid.configs)
    prompts = {row.prompt_id: row for row in rows}.values()
    return {
        "settings": len(grid.configs),
        "prompts": len(request.questions),
        "prompt_tokens_mean": fmean(row.prompt_tokens or 0 for row in prompts),
        "answer_tokens_mean": fmean(row.answer_tokens for row in prompts),
        "sweep_s": swept_s,
        "naive_s": each * pairs,
        "naive_pairs_timed": len(found),
        "naive_over_sweep": each * pairs / swept_s,
        "largest_kl_difference": max(gaps),
    }


def growth(request: SweepRequest, settings: Sequence[int], prompts: Sequence[int]) -> list[dict[str, Any]]:
    """Seconds of sweeps over the first settings, and over the first prompts."""
    sizes = [(count, len(request.questions)) for count in settings]
    sizes += [(len(request.grid.configs), count) for count in prompts]
    found = []
    for some, first in sizes:
        grid = dataclasses.replace(request.grid, settings=request.grid.settings[: some + 1])
        smaller = dataclasses.replace(request, grid=grid, questions=request.questions[:first])
        found.append({"settings": some, "prompts": first, "sweep_s": time_sweep(smaller)[0]})
    return found


def main() -> None:
    """Measure from the command line; figures as JSON on stdout."""
    parser = argparse.ArgumentParser(prog="python -m plphp_cli.sweep.benchmark", description=__doc__)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--data", type=Path, help="prompts; by default questions of the built-in model")
    parser.add_argument("--settings", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 3], help="a prompt, by turns")
    parser.add_argument("--naive-settings", type=int, help="time the naive way on so many, and scale")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--growth", action="store_true", help="also a quarter and a half of each")
    given = parser.parse_args()
    loaded = load(given.model)
    questions = (
        sample_questions(given.prompts, given.images)
        if given.data is None
        else read_questions(given.data, given.prompts)
    )
    request = SweepRequest(
        questions=questions,
        grid=grid_of(given.settings, default_config(loaded)),
        constraint=Constraint("kl", 0.05),
        model=given.model,
        out=Path(),
        max_new_tokens=given.max_new_tokens,
        measure_speed=NONE,
    )
    report: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        **compare(loaded, request, given.naive_settings or given.settings),
    }
    if given.growth:
        parts = [(given.settings // n, given.prompts // n) for n in (4, 2)]
        report["growth"] = growth(request, [s for s, _ in parts], [p for _, p in parts])
    json.dump(report, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
