"""Placeholder."""


def inspect_command(folder: str) -> None:
    """Not yet."""
