"""Peak bytes of live tensor storage: counted operation by operation on a CPU, by the allocator on CUDA."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.generation.streamers import BaseStreamer

from plphp_cli.attention import prune
from plphp_cli.cache import cache_of
from plphp_cli.config import PLPHPConfig
from plphp_cli.decoding import decode_batch
from plphp_cli.prefilling import prefill
from plphp_cli.profiling.timing import Timer, generate_exactly, stock_rows, time_stock
from plphp_cli.prompt import Prompt
from plphp_cli.pruning import Policy
from plphp_cli.sampling import Settings

if TYPE_CHECKING:
    from plphp_cli.models import LoadedModel

# The tool's own cache has its room from the start, so that a few steps show what all of them hold.
PEAK_DECODE_TOKENS = 8


@dataclass(frozen=True)
class Peaks:
    """Most bytes live at one moment: of prefill, of prefill while the decoder ran, of decoding.

    `decode_unknown` says why those of decoding are not known, where there was any.
    """

    prefill_bytes: int | None
    prefill_decoder_bytes: int | None
    decode_bytes: int | None
    decode_unknown: str | None = None


class LiveBytes(TorchDispatchMode):
    """Counts bytes of live storages on one device while it is active, and their peak.

    It sees every storage that an operation takes or returns; scratch space inside a kernel is not seen.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._device = device
        self._known: dict[int, Any] = {}

    def count(self, tensors: Any) -> None:
        """Count the storages of tensors that were there before."""
        for leaf in tree_leaves(tensors):
            if isinstance(leaf, Tensor) and leaf.device.type == self._device.type:
                self._add(leaf)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it returned."""
        output = func(*args, **(kwargs or {}))
        self.count(output)
        return output

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        # A storage's Python object lives as long as its memory does, so its end can be watched.
        self._known[key] = weakref.finalize(storage, self._remove, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _remove(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


class Meter:
    """Peak of live bytes since `reset`, on any device."""

    def __init__(self, device: torch.device, before: Any) -> None:
        self._device = device
        self._mode = None if device.type == "cuda" else LiveBytes(device)
        if self._mode is not None:
            self._mode.count(before)

    @contextmanager
    def running(self) -> Iterator[None]:
        """While open, what runs is counted."""
        if self._mode is None:
            yield
            return
        with self._mode:
            yield

    def reset(self) -> None:
        """Let the peak start from what is live now."""
        if self._mode is None:
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._mode.peak = self._mode.live

    @property
    def peak(self) -> int:
        """Bytes."""
        if self._mode is None:
            torch.cuda.synchronize(self._device)
            return torch.cuda.max_memory_allocated(self._device)
        return self._mode.peak


def measure_peaks(
    loaded: "LoadedModel",
    prompt: Prompt,
    arm: str,
    policy: PLPHPConfig | Policy | None,
    new_tokens: int,
    batch_size: int = 1,
) -> Peaks:
    """Peaks of one prompt in one arm; `stock` is plain `generate`, others the path with `policy`.

    Prefill is of one prompt, decoding of `batch_size` copies of it from its one prefill, steps uncompiled.
    """
    model = loaded.model
    meter = Meter(loaded.device, [*model.parameters(), *model.buffers(), *prompt.inputs.values()])
    before = [0]
    decoder: list[int] = []

    def enter(*_: Any) -> None:
        before[0] = max(before[0], meter.peak)
        meter.reset()

    def leave(*_: Any) -> None:
        decoder.append(meter.peak)

    steps = min(new_tokens, PEAK_DECODE_TOKENS)
    with meter.running():
        meter.reset()
        hooks = [
            model.get_decoder().register_forward_pre_hook(enter),
            model.get_decoder().register_forward_hook(leave),
        ]
        try:
            if arm == "stock":
                whole = _stock(loaded, prompt, meter, hooks, (new_tokens, batch_size))
            else:
                whole = _path(loaded, prompt, policy, meter, hooks, (new_tokens, steps, batch_size))
        finally:
            for hook in hooks:
                hook.remove()
    prefill_peak, decode_peak = whole
    unknown = None
    if decode_peak is None and new_tokens > 1:
        unknown = "its cache cannot be copied into a batch"
    return Peaks(max(prefill_peak, *before, *decoder), max(decoder), decode_peak, unknown)


def _path(
    loaded: "LoadedModel",
    prompt: Prompt,
    policy: PLPHPConfig | Policy | None,
    meter: Meter,
    hooks: list[Any],
    counts: tuple[int, int, int],
) -> tuple[int, int | None]:
    new_tokens, steps, batch_size = counts
    with prune(loaded.model, policy) as pruner:
        prefilled = prefill(loaded, prompt, pruner, new_tokens)
        after_prefill = meter.peak
        _remove(hooks)
        if new_tokens == 1:
            return after_prefill, None
        rows = [prefilled, *(prefilled.fork(new_tokens) for _ in range(batch_size - 1))]
        meter.reset()
        settings = Settings(steps, stop_at_eos=False)
        for _ in decode_batch(loaded, rows, settings):
            pass
        return after_prefill, meter.peak


def _stock(
    loaded: "LoadedModel", prompt: Prompt, meter: Meter, hooks: list[Any], counts: tuple[int, int]
) -> tuple[int, int | None]:
    """One plain `generate` of all tokens, in its own cache: a copy kept for repeats would count, too.

    A batch goes on from copies of one prefilled cache, which is let go of, as its times are taken: prefilled
    together its prompts would peak by their prefill, which the tool's arms do one at a time.
    """
    new_tokens, batch_size = counts
    turn = _Turn(meter, hooks)
    alone = batch_size == 1
    output = generate_exactly(loaded.model, dict(prompt.inputs), new_tokens if alone else 1, turn)
    assert turn.prefill_bytes is not None
    if alone or new_tokens == 1:
        return turn.prefill_bytes, meter.peak if new_tokens > 1 else None
    cache = stock_rows(cache_of(output), batch_size)
    if cache is None:
        return turn.prefill_bytes, None
    del output
    meter.reset()
    inputs, timer = dict(prompt.inputs), Timer(loaded.device)
    time_stock(loaded.model, inputs, cache, batch_size, new_tokens, timer)
    return turn.prefill_bytes, meter.peak


class _Turn(BaseStreamer):
    """Takes the peak of prefill as the first token comes, and lets that of decoding begin."""

    def __init__(self, meter: Meter, hooks: list[Any]) -> None:
        self.prefill_bytes: int | None = None
        self._meter, self._hooks = meter, hooks
        self._prompt_came = False

    def put(self, value: Tensor) -> None:
        if self._prompt_came and self.prefill_bytes is None:
            self.prefill_bytes = self._meter.peak
            _remove(self._hooks)
            self._meter.reset()
        self._prompt_came = True

    def end(self) -> None:
        pass


def _remove(hooks: list[Any]) -> None:
    while hooks:
        hooks.pop().remove()
