"""Stage 0 of the training: the loop around :mod:`plphp_cli.builtin.tower`."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import torch
from torch import nn
from transformers import SiglipVisionModel

from plphp_cli.builtin import attention_training
from plphp_cli.builtin.architecture import vision_config
from plphp_cli.builtin.optimization import Trainer, is_first, rank, save_atomically, schedule
from plphp_cli.builtin.scenes import sample_scene
from plphp_cli.builtin.tower import DenseHead, dense_targets, draw_batch, positions_2d


class TowerWithHead(nn.Module):
    """A SigLIP tower and the head that reads dense targets off it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tower = SiglipVisionModel._from_config(
            vision_config(), attn_implementation=attention_training.NAME
        )
        self.tower.embeddings.position_embedding.weight.data.copy_(0.5 * positions_2d())
        self.head = DenseHead()

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, 96, 96] to the features that the projector will read [B, 144, width]."""
        return self.tower(pixels, output_hidden_states=True).hidden_states[-1]


def train_tower(out: Path, seed: int, steps: int, batch: int) -> None:
    """Train or resume the tower; writes ``tower.pt`` and one line per 20 steps to ``tower.jsonl``."""
    module = TowerWithHead(seed)
    trainer = Trainer(module, muon_lr=0.02, adam_lr=2e-3)
    path = out / "tower.pt"
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        trainer.load(saved["trainer"])
        first = saved["step"]
    started = time.monotonic()
    for step in range(first, steps):
        rng = random.Random(hash((seed, 0, rank(), step)))
        scenes = [sample_scene(rng, "train", sign_share=0.7) for _ in range(batch)]
        pixels, placed = draw_batch(scenes, [rng.getrandbits(48) for _ in scenes], rng)
        features = trainer.work.features(pixels.bfloat16())
        loss, accuracy = trainer.work.head.loss(features, dense_targets(placed))
        trainer.step(loss, schedule(step, steps))
        if is_first() and (step % 20 == 0 or step + 1 == steps):
            line = {"step": step, "loss": round(loss.item(), 4), "s": round(time.monotonic() - started, 1)}
            line |= {name: round(value, 4) for name, value in accuracy.items()}
            with (out / "tower.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(line, flush=True)
        if is_first() and (step % 200 == 199 or step + 1 == steps):
            save_atomically({"trainer": trainer.state(), "step": step + 1}, path)
