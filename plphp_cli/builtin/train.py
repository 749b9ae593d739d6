"""Train the built-in model from scratch.

    python -m plphp_cli.builtin.train --out FOLDER [--workers 2] [--seed 0]

Two stages, each checkpointed in FOLDER and resumed from there by the same command: the tower learns what each
patch shows, then projector and decoder learn to answer. The learning curves are ``*.jsonl`` in FOLDER, the
finished and calibrated model is ``FOLDER/model``.
"""

import argparse
from pathlib import Path

import torch
from transformers import GenerationConfig

from plphp_cli.builtin.choose import PROMPTS, SURVEYED, Candidate, choose, table
from plphp_cli.builtin.dialogue import load_tokenizer, processor
from plphp_cli.builtin.optimization import launch
from plphp_cli.builtin.train_model import Learner, train_model
from plphp_cli.builtin.train_tower import train_tower
from plphp_cli.models import load
from plphp_cli.models.loaded import CONFIG_NAME
from plphp_cli.reports.calibration import calibration_report

TOWER_STEPS, TOWER_BATCH = 850, 48
STEPS = 4600
ROWS = 7


def export(out: Path, seed: int, folder: Path) -> None:
    """Write a checkpoint as a transformers model folder: float16 safetensors, tokenizer, processor."""
    tokenizer = load_tokenizer(out, seed)
    learner = Learner(tokenizer, seed)
    saved = torch.load(out / "model.pt", weights_only=True)
    learner.load_state_dict(saved["trainer"]["module"])
    model = learner.llava.to(torch.float16)
    config = model.config.get_text_config()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    processor(tokenizer).save_pretrained(folder)


def ship_setting(folder: Path, seed: int) -> list[Candidate]:
    """Choose the exported model's setting on training scenes and put it beside the model."""
    candidates = choose(load(str(folder), dtype="float32", device="cpu"), seed, print)
    config = candidates[0].record.config
    thresholds = f"builtin, {SURVEYED} prompts about training scenes"
    origin = f"{thresholds}; r, delta_r, scope and exempt layers by {PROMPTS} of them"
    shipped = config.replace(calibrated_on=origin)
    shipped.to_file(folder / CONFIG_NAME, force=True)
    return candidates


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(prog="python -m plphp_cli.builtin.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, curves and the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="one-thread processes, one per core")
    parser.add_argument("--tower-steps", type=int, default=TOWER_STEPS)
    parser.add_argument("--steps", type=int, default=STEPS, help="of projector and decoder")
    parser.add_argument("--no-compile", action="store_true", help="do without a C++ compiler, 15 %% slower")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    load_tokenizer(out, arguments.seed)
    launch(train_tower, arguments.workers, out, arguments.seed, arguments.tower_steps, TOWER_BATCH)
    compiled = not arguments.no_compile
    launch(train_model, arguments.workers, out, arguments.seed, arguments.steps, ROWS, compiled)
    export(out, arguments.seed, out / "model")
    candidates = ship_setting(out / "model", arguments.seed)
    for line in calibration_report(candidates[0].record):
        print(line)
    print(table(candidates))
    print(f"model written to {out / 'model'}")


if __name__ == "__main__":
    main()
