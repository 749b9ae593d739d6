"""Stage 1 of the training: projector and decoder learn to answer; the tower rests."""

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
from plphp_cli.builtin.tower import draw_batch

BLOCKS = 16
FORESIGHT_LAYERS = (2, 4, 6, 8)
FORESIGHT_WEIGHT = 1.5
SEVERAL_SHARE = 0.45
PEAK_LR = 0.005
EASY_STEPS = 300
# Once answers are right, they are made to survive with part of the cache: dropout and foresight begin.
LATE_STEP = 2000


class Learner(nn.Module):
    """The LLaVA model, with a tower that learns no more, and heads that are used in training only."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        super().__init__()
        ids = special_ids(tokenizer)
        config = model_config(
            tokenizer.get_vocab_size(), image_token_id=ids[IMAGE], bos=ids[BOS], eos=ids[EOS], pad=ids[PAD]
        )
        self.llava = build(config, seed)
        self.llava.set_attn_implementation(attention_training.NAME)
        self.llava.model.vision_tower.requires_grad_(False)
        self.foresight = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, tokenizer.get_vocab_size()))
            for _ in FORESIGHT_LAYERS
        )

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, 96, 96] to what the projector reads [B, 144, width]."""
        return self.llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]

    def take_tower(self, path: Path) -> None:
        """Start from a trained tower and whiten what enters the projector."""
        saved = torch.load(path, weights_only=True)["trainer"]["module"]
        tower = {k.removeprefix("tower."): v for k, v in saved.items() if k.startswith("tower.")}
        self.llava.model.vision_tower.load_state_dict(tower)
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


def hidden_states(learner: Learner, batch: Batch) -> tuple[torch.Tensor, ...]:
    """The decoder's hidden states [B, S, width]: embeddings, then after each layer, the last one normed."""
    model = learner.llava.model
    embeds = model.get_input_embeddings()(batch.ids)
    if batch.pixels is not None:
        with torch.no_grad():
            features = learner.features(batch.pixels.to(embeds.dtype))
        seen = model.multi_modal_projector(features).reshape(len(batch.ids), -1, WIDTH)
        embeds = embeds.masked_scatter(batch.image_mask[None, :, None].expand_as(embeds), seen)
    return model.language_model(
        inputs_embeds=embeds,
        position_ids=batch.positions,
        use_cache=False,
        packing=batch.packing,
        output_hidden_states=True,
    ).hidden_states


def answer_loss(
    learner: Learner, batch: Batch, foresight_weight: float = 0.0
) -> tuple[torch.Tensor, float, float]:
    """Weighted loss of the answers, their plain loss in nats a token, and the share of tokens right."""
    layers = hidden_states(learner, batch)
    hidden = layers[-1]
    asked = batch.targets != -100
    logits = learner.llava.lm_head(hidden[asked]).float()
    wanted = batch.targets[asked]
    nats = F.cross_entropy(logits, wanted, reduction="none")
    weights = batch.weights[asked]
    right = float((logits.argmax(-1) == wanted).float().mean())
    loss = (nats * weights).sum() / weights.sum()
    if foresight_weight:
        loss = loss + foresight_weight * foresight(learner, batch, layers)
    return loss, float(nats.detach().mean()), right


def foresight(learner: Learner, batch: Batch, layers: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """How badly the last prompt token foretells which tokens the answer will hold, in any order.

    A multi-token objective: a model that is to say much about a picture has looked at all of it before it
    begins. Mean over some layers of the cross-entropy to a uniform distribution over the answer's tokens.
    """
    asked = batch.targets != -100
    rows, _ = asked.nonzero(as_tuple=True)
    answer = rows * BLOCKS + batch.blocks[asked]
    firsts = torch.cat([answer.new_ones(1, dtype=torch.bool), answer[1:] != answer[:-1]])
    number = firsts.cumsum(0) - 1
    bags = torch.zeros(int(firsts.sum()), learner.llava.lm_head.out_features)
    bags[number, batch.targets[asked]] = 1.0
    bags /= bags.sum(-1, keepdim=True)
    losses = []
    for head, layer in zip(learner.foresight, FORESIGHT_LAYERS, strict=True):
        scores = head(layers[layer][asked][firsts]).float().log_softmax(-1)
        losses.append(-(bags * scores).sum(-1).mean())
    return torch.stack(losses).mean()


@torch.no_grad()
def exact_matches(learner: Learner, batch: Batch) -> dict[str, list[bool]]:
    """Per kind of question, whether each answer is right from its first token to the end of sequence.

    Greedy decoding gives the expected answer exactly when every teacher-forced argmax agrees with it.
    """
    hidden = hidden_states(learner, batch)[-1]
    agrees = (learner.llava.lm_head(hidden).argmax(-1) == batch.targets) | (batch.targets == -100)
    found: dict[str, list[bool]] = {}
    for row, kinds in enumerate(batch.kinds):
        start = batch.packing.prefix
        slots = [tokens for count, tokens in batch.packing.groups for _ in range(count)]
        for kind, tokens in zip(kinds, slots, strict=True):
            found.setdefault(kind, []).append(bool(agrees[row, start : start + tokens].all()))
            start += tokens
    return found


def draw(tokenizer: Tokenizer, rng: random.Random, step: int, rows: int) -> Batch:
    """One worker's batch of a step. The first steps are easier; some batches stay so, with few items or told.

    Finding a thing by its name among few things, or in words, is what the look-ups in full scenes grow from.
    """
    images = rng.choice((2, 2, 3)) if rng.random() < SEVERAL_SHARE else 1
    return sample_batch(
        tokenizer,
        rng,
        rows=max(2, rows // images),
        blocks=BLOCKS,
        images=images,
        most=3 if step < EASY_STEPS else rng.choice((2, 3, 5, 5)),
        told=rng.random() < 0.2,
        dropout=step >= LATE_STEP,
    )


def train_model(out: Path, seed: int, steps: int, rows: int, compiled: bool) -> None:
    """Train or resume projector and decoder; writes ``model.pt`` and its curve to ``model.jsonl``."""
    if compiled:
        attention_training.compile_elementwise()
    tokenizer = load_tokenizer(out, seed)
    learner = Learner(tokenizer, seed)
    learner.take_tower(out / "tower.pt")
    trainer = Trainer(learner, muon_lr=PEAK_LR, adam_lr=PEAK_LR / 6)
    path = out / "model.pt"
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        trainer.load(saved["trainer"])
        first = saved["step"]
    started = time.monotonic()
    recent: list[tuple[float, float]] = []
    for step in range(first, steps):
        rng = random.Random(hash((seed, 1, rank(), step)))
        torch.manual_seed(rng.getrandbits(40))
        foresight_weight = FORESIGHT_WEIGHT if step >= LATE_STEP else 0.0
        batch = draw(tokenizer, rng, step, rows)
        loss, nats, right = answer_loss(trainer.work, batch, foresight_weight)
        trainer.step(loss, schedule(step, steps, decay_share=0.4))
        recent.append((nats, right))
        if is_first() and (step % 50 == 49 or step + 1 == steps):
            nats, right = (round(sum(column) / len(recent), 4) for column in zip(*recent, strict=True))
            line = {"step": step + 1, "nats": nats, "right": right, "s": round(time.monotonic() - started, 1)}
            recent.clear()
            with (out / "model.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(line, flush=True)
        if is_first() and (step % 250 == 249 or step + 1 == steps):
            save_atomically({"trainer": trainer.state(), "step": step + 1}, path)
