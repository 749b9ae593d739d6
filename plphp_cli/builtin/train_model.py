"""Stages 1 and 2: projector and decoder learn to answer; in stage 2 the tower moves along, slowly."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F

from plphp_cli.builtin import attention_training
from plphp_cli.builtin.architecture import WIDTH, build, model_config
from plphp_cli.builtin.batches import Batch, sample_batch
from plphp_cli.builtin.dialogue import BOS, EOS, IMAGE, PAD, load_tokenizer, special_ids
from plphp_cli.builtin.optimization import Trainer, is_first, rank, save_atomically, schedule
from plphp_cli.builtin.scenes import sample_scene
from plphp_cli.builtin.tower import DenseHead, dense_targets, draw_batch

DENSE_WEIGHT = 0.05
BLOCKS = 16


class Learner(nn.Module):
    """The LLaVA model and, for stage 2, the tower's dense head."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        super().__init__()
        ids = special_ids(tokenizer)
        config = model_config(
            tokenizer.get_vocab_size(), image_token_id=ids[IMAGE], bos=ids[BOS], eos=ids[EOS], pad=ids[PAD]
        )
        self.llava = build(config, seed)
        self.llava.set_attn_implementation(attention_training.NAME)
        self.head = DenseHead()

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, 96, 96] to what the projector reads [B, 144, width]."""
        return self.llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]

    def take_tower(self, path: Path) -> None:
        """Start from a trained tower and whiten what enters the projector."""
        saved = torch.load(path, weights_only=True)["trainer"]["module"]
        tower = {k.removeprefix("tower."): v for k, v in saved.items() if k.startswith("tower.")}
        head = {k.removeprefix("head."): v for k, v in saved.items() if k.startswith("head.")}
        self.llava.model.vision_tower.load_state_dict(tower)
        self.head.load_state_dict(head)
        rng = random.Random(0)
        pixels, _ = draw_batch([sample_scene(rng, "train") for _ in range(200)], list(range(200)), rng)
        with torch.no_grad():
            features = self.features(pixels).reshape(-1, WIDTH).double()
            mean = features.mean(0)
            values, vectors = torch.linalg.eigh(torch.cov((features - mean).T))
            # Directions that hardly vary are noise: the floor keeps them from being blown up.
            whiten = (vectors / (values + 1e-2 * values.mean()).sqrt()) @ vectors.T
            first = self.llava.model.multi_modal_projector.linear_1
            first.weight.copy_(whiten)
            first.bias.copy_(-whiten @ mean)

    def freeze_tower(self, frozen: bool) -> None:
        """Exclude or include the tower and its head from training."""
        for parameter in [*self.llava.model.vision_tower.parameters(), *self.head.parameters()]:
            parameter.requires_grad_(not frozen)


def hidden_states(learner: Learner, batch: Batch, *, tower_moves: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The decoder's last hidden states [B, S, width] and the dense loss (0 while the tower rests)."""
    model = learner.llava.model
    embeds = model.get_input_embeddings()(batch.ids)
    dense = torch.zeros(())
    if batch.pixels is not None:
        with torch.set_grad_enabled(tower_moves):
            features = learner.features(batch.pixels.to(embeds.dtype))
        if tower_moves:
            dense = learner.head.loss(features, dense_targets(batch.placed))[0]
        seen = model.multi_modal_projector(features).reshape(len(batch.ids), -1, WIDTH)
        embeds = embeds.masked_scatter(batch.image_mask[None, :, None].expand_as(embeds), seen)
    hidden = model.language_model(
        inputs_embeds=embeds, position_ids=batch.positions, use_cache=False, packing=batch.packing
    ).last_hidden_state
    return hidden, dense


def answer_loss(learner: Learner, batch: Batch, *, tower_moves: bool) -> tuple[torch.Tensor, float, float]:
    """Loss (with the dense part if the tower moves), answer loss in nats a token, share of tokens right."""
    hidden, dense = hidden_states(learner, batch, tower_moves=tower_moves)
    asked = batch.targets != -100
    logits = learner.llava.lm_head(hidden[asked]).float()
    wanted = batch.targets[asked]
    nats = F.cross_entropy(logits, wanted, reduction="none")
    weights = batch.weights[asked]
    loss = (nats * weights).sum() / weights.sum()
    right = float((logits.argmax(-1) == wanted).float().mean())
    return loss + DENSE_WEIGHT * dense, float(nats.detach().mean()), right


@torch.no_grad()
def exact_matches(learner: Learner, batch: Batch) -> dict[str, list[bool]]:
    """Per kind of question, whether each answer is right from its first token to the end of sequence.

    Greedy decoding gives the expected answer exactly when every teacher-forced argmax agrees with it.
    """
    hidden, _ = hidden_states(learner, batch, tower_moves=False)
    agrees = (learner.llava.lm_head(hidden).argmax(-1) == batch.targets) | (batch.targets == -100)
    found: dict[str, list[bool]] = {}
    for row, kinds in enumerate(batch.kinds):
        start = batch.packing.prefix
        slots = [tokens for count, tokens in batch.packing.groups for _ in range(count)]
        for kind, tokens in zip(kinds, slots, strict=True):
            found.setdefault(kind, []).append(bool(agrees[row, start : start + tokens].all()))
            start += tokens
    return found


def draw(tokenizer: Tokenizer, rng: random.Random, step: int, rows: int, several_share: float) -> Batch:
    """One worker's batch of a step. The first steps are easier: told scenes and few items."""
    easy = step < 300
    told = rng.random() < (0.3 if easy else 0.05)
    images = rng.choice((2, 2, 3)) if rng.random() < several_share else 1
    rows = max(2, rows // images)
    return sample_batch(
        tokenizer, rng, rows=rows, blocks=BLOCKS, images=images, most=3 if easy else 5, told=told
    )


def train_model(out: Path, seed: int, stage: int, steps: int, rows: int, compiled: bool) -> None:
    """Train or resume a stage; writes ``stage<n>.pt`` and its curve to ``stage<n>.jsonl``."""
    if compiled:
        attention_training.compile_elementwise()
    tokenizer = load_tokenizer(out, seed)
    learner = Learner(tokenizer, seed)
    path = out / f"stage{stage}.pt"
    if stage == 1:
        learner.take_tower(out / "tower.pt")
    else:
        learner.load_state_dict(torch.load(out / "stage1.pt", weights_only=True)["trainer"]["module"])
    learner.freeze_tower(stage == 1)
    tower = [*learner.llava.model.vision_tower.parameters(), *learner.head.parameters()]
    peak = 0.008 if stage == 1 else 0.005
    trainer = Trainer(learner, muon_lr=peak, adam_lr=peak / 6, slow=tower, slow_factor=0.15)
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        trainer.load(saved["trainer"])
        first = saved["step"]
    started = time.monotonic()
    recent: list[tuple[float, float]] = []
    for step in range(first, steps):
        rng = random.Random(hash((seed, stage, rank(), step)))
        batch = draw(tokenizer, rng, step if stage == 1 else steps, rows, 0.3 if stage == 1 else 0.5)
        loss, nats, right = answer_loss(trainer.work, batch, tower_moves=stage == 2)
        trainer.step(loss, schedule(step, steps, decay_share=0.1 if stage == 1 else 0.8))
        recent.append((nats, right))
        if is_first() and (step % 50 == 49 or step + 1 == steps):
            nats, right = (round(sum(column) / len(recent), 4) for column in zip(*recent, strict=True))
            line = {"step": step + 1, "nats": nats, "right": right, "s": round(time.monotonic() - started, 1)}
            recent.clear()
            with (out / f"stage{stage}.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(line, flush=True)
        if is_first() and (step % 250 == 249 or step + 1 == steps):
            save_atomically({"trainer": trainer.state(), "step": step + 1}, path)
