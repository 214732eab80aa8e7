"""What --dtype of a dense checkpoint may be: a name alone, so that help costs no numerics."""

from __future__ import annotations

from enum import StrEnum


class Dtype(StrEnum):
    """Of a dense checkpoint; "auto" is what each tensor had at the source."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"
