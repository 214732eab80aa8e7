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


def one_line(error: BaseException, most: int = 200) -> str:
    """The first line of an error's message, at most `most` characters, or the error's type."""
    lines = (line.strip() for line in str(error).splitlines())
    line = next((line for line in lines if line), type(error).__name__)
    return line if len(line) <= most else f"{line[: most - 3]}..."
