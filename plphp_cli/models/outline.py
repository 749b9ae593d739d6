"""A model as its config describes it, without storage: whether it can be built, and what its weights take."""

import copy
from pathlib import Path
from typing import Any

from plphp_cli.errors import ModelError, PLPHPError, UnsupportedError
from plphp_cli.models.failures import SAME_MODEL, beginning, config_error, own_code_fails
from plphp_cli.models.placing import stored_quantisation
from plphp_cli.models.sources import Source, read_config_json
from plphp_cli.models.weights import stored_numbers
from plphp_cli.units import format_count

# Numbers that a config may describe per number in the files. Tied weights are counted once, so it is 1 for
# whole weights; of packed ones 32 of a bit each make one.
_SLACK, _PACKED_SLACK = 1.5, 40


def outline(source: Source, config: Any, attention: str | None = None, trusted: bool = False) -> Any:
    """The model with parameters that have a shape and nothing else.

    Args:
        source: for messages.
        config: the model's; it is left as it is.
        attention: back-end that it is built for; None for the one that suits it.
        trusted: whether code that the model brings may run.

    Raises:
        ModelError: no model can be built from that config, a package is missing, or its own code fails.
        UnsupportedError: its class does not run on that back-end.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    try:
        # A copy, since the model writes its dtype into it.
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(
                copy.deepcopy(config),
                dtype=torch.float32,
                attn_implementation=attention,
                trust_remote_code=trusted,
            )
    except PLPHPError:
        raise
    except Exception as error:
        if "attn_implementation" in str(error):
            raise UnsupportedError(
                f"{source.name} does not run on the attention back-end {attention}", hint="use --attn eager"
            ) from error
        if isinstance(error, ImportError):
            raise ModelError(
                f"{source.name} needs a package that is missing: {beginning(error)}", hint="install it"
            ) from error
        if trusted and hasattr(config, "auto_map"):
            raise own_code_fails(source, error) from error
        raise config_error(source, read_config_json(source), error) from error


def check_size(source: Source, config: Any, model: Any, files: list[Path]) -> float:
    """Refuse a config that describes far more than the weight files hold.

    transformers would fill what is missing at random, which may take more memory than there is, and tell
    only then.

    Args:
        source: for messages.
        config: the model's.
        model: its `outline`.
        files: its weights.

    Returns:
        How many times the files' numbers the config describes; 1 where it describes fewer, or packed ones.

    Raises:
        ModelError: the config describes another model.
    """
    described = sum(parameter.numel() for parameter in model.parameters())
    stored, packed = stored_numbers(files, source), stored_quantisation(config) is not None
    if described > (_PACKED_SLACK if packed else _SLACK) * stored:
        raise ModelError(
            f"the weights of {source.name} do not match its config: the files hold {format_count(stored)} "
            f"numbers, and config.json describes {format_count(described)}",
            hint=SAME_MODEL,
        )
    return 1.0 if packed else max(1.0, described / stored)
