"""How a scale or a tau may be stored: every dtype of the format by its one name.

`quantization_config` and torch call them alike; safetensors has a name of its own. Nothing heavy is
imported before a dtype of torch is asked for. A new dtype is a row here, and a line in formats/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StoredDtype:
    """A dtype by torch's name and by that of safetensors.

    `grid`: a statistic stored so is a code on a grid that 256 blocks share, not the number itself.
    """

    name: str
    safetensors: str
    grid: bool = False

    @property
    def torch(self) -> torch.dtype:
        """The dtype itself."""
        import torch

        found: torch.dtype = getattr(torch, self.name)
        return found


UINT8 = StoredDtype("uint8", "U8", grid=True)
"""Of packed codes, too."""
FLOAT32 = StoredDtype("float32", "F32")
"""Of grids, too."""
STATISTIC_DTYPES: dict[str, StoredDtype] = {
    each.name: each
    for each in (
        UINT8,
        StoredDtype("float16", "F16"),
        FLOAT32,
    )
}
