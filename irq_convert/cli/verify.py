"""Placeholder."""


def verify_command(folder: str) -> None:
    """Not yet."""
