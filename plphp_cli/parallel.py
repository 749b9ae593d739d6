"""Tensor parallel: `torchrun` starts one process per device, each with its share of every layer's heads.

Weights are shared out by transformers' own plan. Each rank ranks and cuts its own KV heads; the vision
attention score of a layer is taken over the heads of all ranks, and rank 0's decides the layer's rate. Rank 0
is the command that the user sees; the other ranks do the same on their heads, say nothing and write nothing.

Importing this module imports neither torch nor transformers.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from plphp_cli.errors import ModelError, UnsupportedError, UsageError
from plphp_cli.results import RankRecord, RanksByArm

if TYPE_CHECKING:
    import torch
    from torch import Tensor

L = TypeVar("L")
COMMAND = "run"
# The first transformers whose own plan runs vision-language models; 5.18 fails at a tied output head.
OLDEST = "5.20"
# Projections whose output holds a layer's keys, fused with others or not.
_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")


def world_size() -> int:
    """How many ranks `torchrun` started; 1 without it."""
    launched = all(name in os.environ for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR"))
    return max(1, _number("WORLD_SIZE", 1)) if launched else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return _number("RANK", 0) if world_size() > 1 else 0


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def silence(debug: bool = False) -> None:
    """Let no rank but 0 write to stdout or stderr; with `debug` stderr stays open, for tracebacks."""
    if rank() == 0:
        return
    sink = os.open(os.devnull, os.O_WRONLY)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        if stream is not None and not (debug and number == 2):
            stream.flush()
            # The descriptor itself: libraries write to it past Python.
            os.dup2(sink, number)


def refuse_command(name: str | None) -> None:
    """Raise `UsageError` for a command that is not made for several ranks."""
    if world_size() > 1 and name not in (None, COMMAND):
        raise UsageError(
            f"plphp {name} does not run on {world_size()} ranks (torchrun)",
            hint=f"start it without torchrun; plphp {COMMAND} is the command for several ranks",
        )


def refuse_stdin() -> None:
    """Raise `UsageError` where several ranks would read one stdin."""
    if world_size() > 1:
        raise UsageError(
            f"{world_size()} ranks cannot read one stdin", hint="give the text itself with --prompt"
        )


def device_of_rank(device: "torch.device", name: str) -> "torch.device":
    """The device of this rank, where `name` is what the user typed and `device` what one process would take.

    Raises:
        UsageError: ranks cannot run there, or there are fewer devices than ranks.
    """
    if world_size() == 1:
        return device
    import torch

    if device.type == "mps":
        raise UsageError("several ranks do not run on Metal (mps)", hint="use --device cpu, or one process")
    if ":" in name:
        raise UsageError(
            f"device {name}: torchrun gives each rank a device of its own",
            hint="use --device cuda; CUDA_VISIBLE_DEVICES chooses among the devices",
        )
    if device.type == "cpu" and torch.cuda.is_available():
        raise UsageError(
            "several ranks run on the CUDA devices where there are any",
            hint="hide them: CUDA_VISIBLE_DEVICES=",
        )
    if device.type != "cuda":
        return device
    local, count = _number("LOCAL_RANK", 0), torch.cuda.device_count()
    if local >= count:
        raise UsageError(
            f"torchrun started more ranks than this machine has CUDA devices ({count})",
            hint=f"use --nproc-per-node {count}",
        )
    return torch.device("cuda", local)


def check_heads(config: Any, name: str) -> None:
    """Refuse a model whose heads cannot be shared out evenly, from its config, before its weights are read.

    Raises:
        UsageError: the ranks do not divide its KV heads or its query heads.
    """
    ranks = world_size()
    if ranks == 1:
        return
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    if kv_heads % ranks or heads % ranks:
        fitting = [str(n) for n in range(1, kv_heads + 1) if kv_heads % n == 0 and heads % n == 0]
        raise UsageError(
            f"{ranks} ranks cannot share the {kv_heads} KV heads of {name} evenly",
            hint=f"use --nproc-per-node {' or '.join(fitting)}",
        )


def load_options() -> dict[str, Any]:
    """What `from_pretrained` is told so that it loads this rank's share; nothing without `torchrun`.

    Raises:
        UsageError: transformers is too old.
    """
    if world_size() == 1:
        return {}
    import transformers
    from packaging.version import Version

    if Version(transformers.__version__) < Version(OLDEST):
        raise UsageError(
            f"several ranks need transformers {OLDEST} or newer; this is {transformers.__version__}",
            hint="pip install -U transformers",
        )
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=world_size())}


def check_loaded(model: Any, name: str) -> None:
    """Refuse a model that its plan left whole on every rank.

    Raises:
        ModelError: transformers has no plan for its attention.
    """
    plan = getattr(model, "_tp_plan", None) or {}
    shares = [style for rule, style in plan.items() if rule.rpartition(".")[2] in _KEY_PROJECTIONS]
    if world_size() > 1 and "colwise" not in shares:
        raise no_plan(name)


def no_plan(name: str) -> ModelError:
    """What is said of a model that transformers cannot share out."""
    return ModelError(
        f"transformers has no tensor-parallel plan for the attention of {name}",
        hint="start it without torchrun",
    )


def ranks_of(model: Any) -> int:
    """Over how many ranks a loaded model's heads are shared."""
    return getattr(model, "_tp_size", None) or 1


def shared_policy(model: Any, policy: Any, keep_attention: bool = False) -> Any:
    """The policy that decides for all ranks; `policy` itself where the model is whole, or nothing is cut.

    Raises:
        UnsupportedError: a policy, or kept score rows, whose numbers would be those of one rank's heads.
    """
    if ranks_of(model) == 1 or (policy is None and not keep_attention):
        return policy
    from plphp_cli.pruning import PLPHPPolicy

    if type(policy) is not PLPHPPolicy or keep_attention:
        what = "score rows" if keep_attention else type(policy).__name__
        raise UnsupportedError(
            f"{what} on a model that several ranks share", hint="cut it by a PLPHPConfig, or use one process"
        )
    return dataclasses.replace(policy, score=_score_of_all(_group(model)))


def _score_of_all(group: Any) -> Callable[["Tensor", "Tensor"], float | None]:
    """What gives a layer's gamma, the same on every rank, from this rank's attention [H / ranks, N]."""
    import torch
    from torch import distributed

    def score(attention: "Tensor", vision: "Tensor") -> float | None:
        if vision.numel() == 0:
            return None
        local = attention[:, vision].sum().double()
        sums = torch.stack([local, torch.full_like(local, attention.shape[0])])
        distributed.all_reduce(sums, group=group)
        gamma = sums[:1] / sums[1:]
        # One rank decides: a sum may differ in its last bit from rank to rank, and a rate must not.
        distributed.broadcast(gamma, src=_first(group), group=group)
        return gamma.item()

    return score


def agreement(model: Any) -> "Callable[[Tensor], Tensor]":
    """What makes a new token rank 0's on every rank: takes and returns it; does nothing on a whole model."""
    if ranks_of(model) == 1:
        return lambda token: token
    from torch import distributed

    group = _group(model)

    def agree(token: "Tensor") -> "Tensor":
        distributed.broadcast(token, src=_first(group), group=group)
        return token

    return agree


def gathered(model: Any, layers: Sequence[L]) -> tuple[tuple[L, ...], tuple[RankRecord, ...]]:
    """Layers (`LayerState`) with the heads and bytes of all ranks together, and what each rank holds.

    The second is empty where the model is whole. `kept` stays this rank's own.
    """
    ranks = ranks_of(model)
    if ranks == 1:
        return tuple(layers), ()
    from torch import distributed

    names = ("kv_heads", "held_bytes", "full_bytes", "allocated_bytes")
    own = [[getattr(layer, name) for name in names] for layer in layers]
    everyone: list[Any] = [None] * ranks
    distributed.all_gather_object(everyone, own, group=_group(model))
    states = []
    for layer, rows in zip(layers, zip(*everyone, strict=True), strict=True):
        sums = [None if None in column else sum(column) for column in zip(*rows, strict=True)]
        states.append(dataclasses.replace(layer, **dict(zip(names, sums, strict=True))))  # type: ignore[type-var]
    records = [
        RankRecord(number, *(sum(row[column] for row in rows) for column in (1, 2, 3)))
        for number, rows in enumerate(everyone)
    ]
    return tuple(states), tuple(records)


def by_arm(ranks: Mapping[str, tuple[RankRecord, ...]]) -> RanksByArm | None:
    """What the ranks hold, by the name of the arm; None where the model is whole."""
    if not any(ranks.values()):
        return None
    from torch import distributed

    return RanksByArm(distributed.get_backend(), ranks.get("pruned", ()), ranks.get("unpruned", ()))


def _group(model: Any) -> Any:
    """The process group that shares a model's heads; None is that of all ranks."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or "tp" not in (mesh.mesh_dim_names or ()):
        return None
    return mesh["tp"].get_group()


def _first(group: Any) -> int:
    from torch import distributed

    return 0 if group is None else distributed.get_global_rank(group, 0)


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error says that another rank has ended."""
    words = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe")
    said = type(error).__name__.startswith("Dist") or any(word in str(error) for word in words)
    return world_size() > 1 and isinstance(error, RuntimeError) and said


def leave() -> None:
    """End this process's part in the group, after a run that ended well."""
    torch = sys.modules.get("torch")
    if world_size() > 1 and torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
