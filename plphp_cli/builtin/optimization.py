"""Data-parallel training on CPU cores: bfloat16 work, float32 masters, Muon for matrices, else AdamW."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import nn

M = TypeVar("M", bound=nn.Module)


class Trainer(Generic[M]):
    """Steps a module from losses computed on its bfloat16 copy.

    Args:
        module: float32 master; ``self.work`` is the bfloat16 copy that losses must be computed on.
        muon_lr: peak learning rate of the weight matrices inside blocks (Muon).
        adam_lr: peak learning rate of everything else (AdamW).
    """

    def __init__(self, module: M, *, muon_lr: float, adam_lr: float) -> None:
        self.module = module
        self.work: M = copy.deepcopy(module).bfloat16()
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        matrices = [p for name, p in trained if p.ndim == 2 and "layers." in name]
        others = [p for name, p in trained if not (p.ndim == 2 and "layers." in name)]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
            torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01),
        ]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]
        self.pairs = [
            (master, work)
            for master, work in zip(module.parameters(), self.work.parameters(), strict=True)
            if master.requires_grad
        ]

    def step(self, loss: torch.Tensor, lr_scale: float) -> float:
        """Back-propagate, average over the workers, update the masters; returns the gradient norm."""
        loss.backward()
        grads = [
            torch.zeros_like(master) if work.grad is None else work.grad.float()
            for master, work in self.pairs
        ]
        flat = torch.cat([g.reshape(-1) for g in grads])
        if dist.is_initialized():
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
        norm = float(flat.norm())
        flat *= min(1.0, 1.0 / max(norm, 1e-9))
        offset = 0
        for master, work in self.pairs:
            master.grad = flat[offset : offset + master.numel()].view_as(master)
            offset += master.numel()
            work.grad = None
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_scale
            optimizer.step()
        with torch.no_grad():
            for master, work in self.pairs:
                work.copy_(master)
        return norm

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        return {"module": self.module.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}

    def load(self, state: dict[str, Any]) -> None:
        """Take up a saved state."""
        self.module.load_state_dict(state["module"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            peaks = [group["peak_lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["peak_lr"] = peak
        self.work.load_state_dict(self.module.state_dict())


def schedule(step: int, total: int, *, warmup: int = 50, decay_share: float = 0.3) -> float:
    """Learning-rate factor: linear warm-up, a plateau, and a linear decay to zero over the last share."""
    decay = max(1, int(total * decay_share))
    return min(1.0, (step + 1) / warmup, max(0.0, (total - step) / decay))


def save_atomically(state: object, path: Path) -> None:
    """Write a checkpoint whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def is_first() -> bool:
    """Whether this worker is the one that logs and saves."""
    return not dist.is_initialized() or dist.get_rank() == 0


def rank() -> int:
    """This worker's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def launch(work: Callable[..., None], workers: int, *arguments: object) -> None:
    """Run ``work(*arguments)`` in that many one-thread processes joined by gloo."""
    if workers == 1:
        work(*arguments)
        return
    rendezvous = Path(os.environ.get("TMPDIR", "/tmp")) / f"plphp-train-{os.getpid()}-{time.time_ns()}"
    torch.multiprocessing.spawn(
        _worker, args=(workers, str(rendezvous), work, arguments), nprocs=workers, join=True
    )


def _worker(
    index: int, workers: int, rendezvous: str, work: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=index, world_size=workers)
    try:
        work(*arguments)
    finally:
        dist.destroy_process_group()
