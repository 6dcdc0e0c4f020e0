"""The errors a user can meet. Each carries the exit status of the command that it ends.

    ToolkitError
      UsageError        2   a flag or a combination of flags
      InputError        3   a model, a checkpoint or a text was refused
        CheckpointError     a file of a checkpoint, with the tensor where there is one
      ResourceError     4   disk, memory, permission, device
      BusyError        75   another process is writing here

A message says what (file, tensor, flag), what was found, what was expected and what to do.
"""


class ToolkitError(Exception):
    """Base of every error that is the user's to mend; `exit_code` is the status a command ends with."""

    exit_code = 1


class UsageError(ToolkitError):
    """A flag, or a combination of flags, that cannot be meant."""

    exit_code = 2


class InputError(ToolkitError):
    """A model or a text that was refused."""

    exit_code = 3


class CheckpointError(InputError):
    """A file of a checkpoint that is damaged, incomplete or not what its index says."""


class ResourceError(ToolkitError):
    """The machine lacks disk, memory, permission or a device."""

    exit_code = 4


class BusyError(ToolkitError):
    """Another process holds what this one needs."""

    exit_code = 75
