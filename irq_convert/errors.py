"""The two errors a person can meet: `UsageError` for a wrong request, `IrqError` for the rest.

Messages are one line and name the tensor or file, the rule broken and the way out. The command line
prints the message alone and exits with `exit_code`; anything else that escapes is a bug.
"""


class IrqError(Exception):
    """Something the user can act on went wrong: a damaged file, a full disk, a bad tensor."""

    exit_code = 1


class UsageError(IrqError):
    """The request itself cannot be served: an unknown option value, a folder that is not empty."""

    exit_code = 2
