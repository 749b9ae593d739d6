"""What `plphp run` does with a model before its first prompt, in each of its forms."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from plphp_cli.models.options import LoadOptions
from plphp_cli.results import GenerationRecord

if TYPE_CHECKING:
    from plphp_cli.models import LoadedModel
    from plphp_cli.sampling import Settings


def load_model(
    name: str, options: LoadOptions, say: Callable[[str], None], check: Callable[[], None]
) -> "LoadedModel":
    """Load a model, and say so before, since it may take minutes.

    Args:
        name: as the user typed it.
        options: how to load it.
        say: takes notes for the user.
        check: raises `KeyboardInterrupt` when the user wants to stop.

    Raises what `models.load` raises.
    """
    say(f"loading {name}")
    # What takes seconds to import is imported when it is needed.
    from plphp_cli.models import load

    check()
    loaded = load(name, options)
    check()
    return loaded


def identity(loaded: "LoadedModel") -> str:
    """A model, and how it runs: `builtin (float32, cpu, sdpa)`."""
    dtype = str(loaded.dtype).removeprefix("torch.")
    return f"{loaded.name} ({dtype}, {loaded.device}, {loaded.attn})"


def model_notes(loaded: "LoadedModel") -> list[str]:
    """What a reader must know of how a model is run, and what its own generation config asks for in vain."""
    return list(loaded.warnings)


def settings_of(wanted: GenerationRecord, max_new_tokens: int | None = None) -> "Settings":
    """How to generate what the user asked for, or so many tokens of it."""
    from plphp_cli.sampling import Settings

    length = wanted.max_new_tokens if max_new_tokens is None else max_new_tokens
    return Settings(length, wanted.temperature, wanted.top_p, wanted.seed, stop=wanted.stop)
