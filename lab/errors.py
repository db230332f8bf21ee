"""Every error the lab raises on purpose. Torch-free; each message says what is wrong and what to do next.

All of them are `LabError`, so the command line turns any of them into one line and an exit code.
"""


class LabError(Exception):
    """Base class. `exit_code` is what `vlab` returns when this error ends a command."""

    exit_code = 1


class UsageError(LabError):
    """The caller asked for something that does not exist or does not fit together."""

    exit_code = 2


class ConfigError(LabError):
    """A recipe, policy or other file does not say what it must."""

    exit_code = 3


class TooBig(LabError):
    """The request needs more memory than there is; the message gives both numbers in bytes."""

    exit_code = 4


class VideoError(LabError):
    """A video cannot be read: missing, empty, truncated, no picture stream, unknown container."""

    exit_code = 5


class ModelError(LabError):
    """A checkpoint cannot be loaded, wrapped or verified."""

    exit_code = 6


class PromptError(LabError):
    """A prompt cannot be rendered or its tokens cannot be given roles."""

    exit_code = 7


class RunError(LabError):
    """A run was asked for something the model, its hooks or its cache cannot do."""

    exit_code = 8


class LabWarning(UserWarning):
    """Something ran, but the result may not mean what the caller thinks (e.g. no effect at all)."""
