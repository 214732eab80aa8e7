"""Where sensitivities are kept, and whether those that are there are of this run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irq_convert.artifact.sensitivity import Sensitivity, is_sensitivity, read_sensitivity
from irq_convert.checkpoint.system import expand_home, os_errors
from irq_convert.errors import UsageError
from irq_convert.jobs.sizing.choices import Choice
from irq_convert.progress import Progress

_SAME = ("tensors_sha256", "revision", "sample_sha256")
"""What tells a model from another of its shapes, one finetuned from it, too."""


@dataclass(frozen=True)
class SensitivityFile:
    """The file `path`; `named` by the user, else beside the output. What it has to hold for."""

    path: Path
    named: bool
    settings: Mapping[str, Any]
    source: Mapping[str, Any]
    choices: tuple[str, ...]

    @classmethod
    def of(
        cls,
        file: Path | None,
        out: Path,
        settings: Mapping[str, Any],
        source: Mapping[str, Any],
        choices: Sequence[Choice],
    ) -> SensitivityFile:
        """`file`, or the one beside `out`. Raises `UsageError` for one that cannot be written."""
        real = out.resolve()
        path = expand_home(file) if file else real.with_name(f"{real.name}.sensitivity.safetensors")
        with os_errors("look at it", path):
            if path.is_dir() or not path.resolve().parent.is_dir():
                what = "a folder" if path.is_dir() else f"{path.parent} is no folder"
                raise UsageError(f"--sensitivity {path}: {what}; name a file")
            if path.exists() and not is_sensitivity(path):
                raise UsageError(
                    f"--sensitivity {path}: exists and holds no sensitivities; choose another"
                )
        return cls(path, file is not None, settings, source, tuple(map(str, choices)))

    def read(self, tensors: Collection[str], progress: Progress) -> Sensitivity | None:
        """What is there, where it is of this run; None where it has to be measured.

        Raises `UsageError` for a file that the user named and that is of another model, or was made
        with other settings; `IrqError` for a damaged one.
        """
        if not self.path.exists():
            return None
        found = read_sensitivity(self.path)
        why = self._differs(found, tensors)
        if why is None:
            progress.note(f"sensitivities are read from {self.path}")
            return found
        if not self.named:
            return None
        raise UsageError(f"--sensitivity {self.path}: {why}; name another file, or remove this one")

    def _differs(self, found: Sensitivity, tensors: Collection[str]) -> str | None:
        """Half a sentence about the first thing that is not as it has to be."""
        if any(found.source.get(key) != self.source.get(key) for key in _SAME):
            return f"measured on {found.source['model']}, whose files are not those of this model"
        missing = sorted(set(tensors) - set(found.damages))
        if missing:
            return f"lacks {len(missing)} of the weights, the first is {missing[0]}"
        # What was seen of widths is seen with one of the choices, so others give other factors:
        # a file that nobody named must not make the same command give other bytes.
        same = set(self.choices) == set(found.choices)
        if not (same or (self.named and set(self.choices) <= set(found.choices))):
            return "made for other codebooks or block sizes"
        for key in sorted({*self.settings, *found.settings}):
            made, wanted = found.settings.get(key), self.settings.get(key)
            if made != wanted:
                return f"made with {key} {made!r}, and this run has {wanted!r}"
        return None
