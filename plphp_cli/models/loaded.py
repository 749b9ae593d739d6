"""A model with its processor, ready to run, and what can be read off it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plphp_cli.config import PLPHPConfig
from plphp_cli.models.options import DEFAULTS, LoadOptions

if TYPE_CHECKING:
    import torch

# Its calibrated setting, shipped beside the built-in model's weights.
CONFIG_NAME = "plphp_config.json"


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A vision-language model on its device, in evaluation mode, without gradients.

    Attributes:
        model: the transformers model.
        processor: its processor (tokenizer and image processor).
        name: as the user named it, without a revision.
        revision: commit of a hub model; None for folders and the built-in model.
        dtype: of its weights.
        device: that it is on.
        builtin: whether it is the model that the package carries.
        attn: attention back-end of the decoder, one of `choices.ATTENTION`.
        folder: where its files are.
        notes: what was chosen for the user, in words.
        options: how it was loaded.
        warnings: what a reader of figures must know of how it is run.
    """

    model: Any
    processor: Any
    name: str
    revision: str | None
    dtype: "torch.dtype"
    device: "torch.device"
    builtin: bool
    attn: str = "sdpa"
    folder: Path | None = None
    notes: tuple[str, ...] = ()
    options: LoadOptions = DEFAULTS
    warnings: tuple[str, ...] = ()


def settled_options(loaded: LoadedModel) -> LoadOptions:
    """The options that load the same once more, with what `auto` chose; a device map chooses anew."""
    options = loaded.options
    if options.device_map is None:
        options = replace(options, device=str(loaded.device))
    if options.quantize is None:
        options = replace(options, dtype=str(loaded.dtype).removeprefix("torch."))
    return options


def default_config(loaded: LoadedModel) -> PLPHPConfig:
    """The setting a model is run with unless the user names one.

    The built-in model ships its own calibrated setting; every other model has the defaults of `PLPHPConfig`.
    """
    if loaded.builtin and loaded.folder is not None and (loaded.folder / CONFIG_NAME).is_file():
        return PLPHPConfig.from_file(loaded.folder / CONFIG_NAME)
    return PLPHPConfig()


def decoder_weight_bytes(loaded: LoadedModel) -> int:
    """Weight bytes that one decoding step reads: decoder layers, final norm and output head, as stored.

    Quantised weights count as they are packed, with their scales. The input embedding table is looked up and
    not read, so it counts only where it is tied to the output head. Of a mixture of experts the active share
    counts.
    """
    decoder = loaded.model.get_decoder()
    head = loaded.model.get_output_embeddings()
    embedding = {id(weight) for weight in _stored(loaded.model.get_input_embeddings()).values()}
    active = _active_expert_share(loaded.model.config.get_text_config(decoder=True))
    # Kept while they are told apart by identity: packed parts are made anew each time they are asked for.
    layers, output = _stored(decoder), _stored(head)
    sizes: dict[int, float] = {}
    for name, weight in layers.items():
        if id(weight) not in embedding:
            sizes[id(weight)] = weight.nbytes * (active if ".experts." in f".{name}" else 1)
    sizes |= {id(weight): weight.nbytes for weight in output.values()}
    return round(sum(sizes.values()))


def model_bytes(loaded: LoadedModel) -> int:
    """Bytes of all weights and buffers, as stored; quantised ones as they are packed, with their scales."""
    # Shared weights are one object, but not where accelerate keeps them elsewhere; the model knows which.
    shared = getattr(loaded.model, "all_tied_weights_keys", None) or {}
    stored = {name: tensor for name, tensor in _stored(loaded.model).items() if name not in shared}
    held = [*stored.values(), *loaded.model.buffers()]
    return sum({id(tensor): tensor.nbytes for tensor in held}.values())


def _stored(module: Any) -> dict[str, Any]:
    """A module's weights by name, as they would be saved: shared ones are the same object."""
    import torch

    if module is None:
        return {}
    kept = module.state_dict(keep_vars=True)
    return {name: value for name, value in kept.items() if isinstance(value, torch.Tensor)}


def _active_expert_share(text_config: Any) -> float:
    used = getattr(text_config, "num_experts_per_tok", None)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    total = next((value for name in names if (value := getattr(text_config, name, None))), None)
    return used / total if used and total else 1.0
