"""The floating dtypes that weights come in, by the names of safetensors and of torch."""

from __future__ import annotations

SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
WORDS = {short: long for long, short in SAFETENSORS_NAMES.items()}
FLOATS = tuple(WORDS)
"""Names of safetensors: F32, BF16, F16, F64."""
