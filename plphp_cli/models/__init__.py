"""Models by name, and prompts as a model reads them. Importing it does not import torch or transformers."""

from plphp_cli.models.conversation import Turn
from plphp_cli.models.failures import is_out_of_memory
from plphp_cli.models.loaded import LoadedModel, decoder_weight_bytes, default_config, model_bytes
from plphp_cli.models.loading import fetch, load
from plphp_cli.models.options import LoadOptions
from plphp_cli.models.preparing import prepare, prepare_turns
from plphp_cli.models.sources import BUILTIN

__all__ = [
    "BUILTIN",
    "LoadOptions",
    "LoadedModel",
    "Turn",
    "decoder_weight_bytes",
    "default_config",
    "fetch",
    "is_out_of_memory",
    "load",
    "model_bytes",
    "prepare",
    "prepare_turns",
]
