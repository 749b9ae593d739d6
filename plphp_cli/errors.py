"""The errors that a user is meant to read: one line, what to do about it, and an exit code."""


class PLPHPError(Exception):
    """Base of every expected failure: a message, a hint, and the exit code of the command that met it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(PLPHPError):
    """Something the user typed or passed cannot be used as it is."""

    exit_code = 2


class ConfigError(UsageError):
    """A knob of `PLPHPConfig` is out of its range, or a config file cannot be read."""


class ImageError(UsageError):
    """An image is missing, broken, or does not fit its prompt."""


class ModelError(UsageError):
    """A model is unknown, broken, or not a vision-language model that PLPHP can prune."""


class UnsupportedError(PLPHPError):
    """A model or generation feature under which pruning would not be right: refused by name."""


class RefusedModelError(UnsupportedError):
    """A model on which an assumption of the method fails; `assumption` is its name in `families`."""

    exit_code = 2

    def __init__(self, message: str, *, assumption: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.assumption = assumption


class NestedPruneError(PLPHPError):
    """A second `prune`, or a second generate call at the same time, on a model that is being pruned."""


class DeviceMemoryError(PLPHPError):
    """The device ran out of memory."""
