"""The version, here once: the package's metadata reads it from this file."""

__version__ = "0.1.0"

PRODUCER = f"irq-convert {__version__}"
"""How this program signs what it writes."""
