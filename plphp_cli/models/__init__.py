"""Models by name, and prompts as a model reads them. Importing it does not import torch or transformers."""

from plphp_cli.models.conversation import Turn
from plphp_cli.models.loaded import LoadedModel, decoder_weight_bytes, default_config
from plphp_cli.models.loading import is_out_of_memory, load
from plphp_cli.models.preparing import prepare, prepare_turns
from plphp_cli.models.sources import BUILTIN

__all__ = [
    "BUILTIN",
    "LoadedModel",
    "Turn",
    "decoder_weight_bytes",
    "default_config",
    "is_out_of_memory",
    "load",
    "prepare",
    "prepare_turns",
]
