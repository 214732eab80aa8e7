"""Putting a finished folder in the place of an older one, so that a kill loses neither.

The older folder is moved aside first, as `<name>.replaced-<pid>`, and deleted last.
"""

import os
import re
import shutil
from pathlib import Path

from irq_convert.checkpoint.files import fsync_folder
from irq_convert.checkpoint.system import os_errors


def put_in_place(finished: Path, real: Path) -> None:
    """Give the folder `finished` the name `real`, flushed to the disk; `IrqError` if it fails.

    A folder that has that name is deleted once it is replaced, and keeps it when that fails.
    """
    aside = real.with_name(f"{real.name}.replaced-{os.getpid()}")
    with os_errors("put the finished folder there", real):
        for folder, _, _ in os.walk(finished):
            fsync_folder(Path(folder))
        old = real.is_dir() and any(real.iterdir())
        try:
            if old:
                real.rename(aside)
            finished.rename(real)
        except BaseException:
            if aside.exists() and not real.exists():
                aside.rename(real)
            raise
        fsync_folder(real.parent)
    if old:
        shutil.rmtree(aside, ignore_errors=True)


def restore_replaced(real: Path) -> None:
    """Put back, or delete, what a killed `put_in_place` has moved aside; `IrqError` on failure."""
    with os_errors("recover it", real):
        for aside in _replaced(real):
            if real.is_dir() and not any(real.iterdir()):
                real.rmdir()  # made by hand since: no reason to lose what was there
            if real.exists():
                shutil.rmtree(aside)
            else:
                aside.rename(real)


def _replaced(real: Path) -> list[Path]:
    pattern = re.compile(re.escape(real.name) + r"\.replaced-\d+")
    return sorted(path for path in real.parent.iterdir() if pattern.fullmatch(path.name))
