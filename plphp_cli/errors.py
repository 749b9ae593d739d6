"""The errors that a user is meant to read: one line, what to do about it, and the exit code that goes with it."""


class PLPHPError(Exception):
    """Base of every expected failure. The command line prints `message`, then `hint`, and exits with `exit_code`."""

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
    """A model or a generation feature under which pruning would not be right: refused by name, never silently wrong."""


class NestedPruneError(PLPHPError):
    """A second `prune` on a model that is already being pruned, or two generate calls at once inside one `prune`."""


class DeviceMemoryError(PLPHPError):
    """The device ran out of memory."""
