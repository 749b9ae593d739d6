"""A model with its processor, ready to run, and what can be read off it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plphp_cli.config import PLPHPConfig

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


def default_config(loaded: LoadedModel) -> PLPHPConfig:
    """The setting a model is run with unless the user names one.

    The built-in model ships its own calibrated setting; every other model has the defaults of `PLPHPConfig`.
    """
    if loaded.builtin and loaded.folder is not None and (loaded.folder / CONFIG_NAME).is_file():
        return PLPHPConfig.from_file(loaded.folder / CONFIG_NAME)
    return PLPHPConfig()


def decoder_weight_bytes(loaded: LoadedModel) -> int:
    """Weight bytes that one decoding step reads: decoder layers, final norm and output head, as stored.

    The input embedding table is looked up and not read, so it counts only where it is tied to the output
    head. Of a mixture of experts the active share counts.
    """
    decoder = loaded.model.get_decoder()
    head = loaded.model.get_output_embeddings()
    embedding = {id(weight) for weight in loaded.model.get_input_embeddings().parameters()}
    active = _active_expert_share(loaded.model.config.get_text_config(decoder=True))
    sizes: dict[int, float] = {}
    for name, weight in decoder.named_parameters():
        if id(weight) not in embedding:
            sizes[id(weight)] = weight.nbytes * (active if ".experts." in f".{name}" else 1)
    if head is not None:
        sizes |= {id(weight): weight.nbytes for weight in head.parameters()}
    return round(sum(sizes.values()))


def _active_expert_share(text_config: Any) -> float:
    used = getattr(text_config, "num_experts_per_tok", None)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    total = next((value for name in names if (value := getattr(text_config, name, None))), None)
    return used / total if used and total else 1.0
