"""What a conversion tells the one who waits: see `irq_convert.jobs.progress`."""

from irq_convert.jobs.progress import Progress

__all__ = ["Progress"]
