"""Putting a finished folder in the place of an older one, so that a kill loses neither.

The older folder is moved aside first, as `<name>.replaced-<pid>`, and deleted last, under the name
`<name>.deleted-<pid>`: so what is called replaced is always whole, and what is called deleted never
needed.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path

from irq_convert.checkpoint.files import fsync_folder
from irq_convert.checkpoint.system import os_errors

_ASIDE, _TRASH = "replaced", "deleted"


def put_in_place(finished: Path, real: Path) -> None:
    """Give the folder `finished` the name `real`, flushed to the disk; `IrqError` if it fails.

    A folder that has that name is deleted once it is replaced, and keeps it when that fails.
    """
    aside = real.with_name(f"{real.name}.{_ASIDE}-{os.getpid()}")
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
        with contextlib.suppress(OSError):
            _delete(aside, real)


def restore_replaced(real: Path, finished: Path) -> None:
    """Put back, or delete, what a killed `put_in_place` has moved aside; `IrqError` on failure.

    `finished` is what was to take the name `real`. As long as it is there, whatever has that name
    was not put there by the run, and what lies aside may be the only whole copy: it stays.
    """
    with os_errors("recover it", real):
        for trash in _beside(real, _TRASH):
            shutil.rmtree(trash)
        for aside in _beside(real, _ASIDE):
            if real.is_dir() and not any(real.iterdir()):
                real.rmdir()  # made by hand since: no reason to lose what was there
            if not real.exists():
                aside.rename(real)
            elif not finished.exists():
                _delete(aside, real)


def _delete(aside: Path, real: Path) -> None:
    trash = real.with_name(f"{real.name}.{_TRASH}-{os.getpid()}")
    aside.rename(trash)
    shutil.rmtree(trash)


def _beside(real: Path, kind: str) -> list[Path]:
    """Folders of a kind beside `real`, the newest first."""
    pattern = re.compile(re.escape(real.name) + rf"\.{kind}-\d+")
    if not real.parent.is_dir():
        return []
    found = [path for path in real.parent.iterdir() if pattern.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
