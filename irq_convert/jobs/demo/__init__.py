"""A small trained language model that ships with the package, and the scripts that made it.

`MODEL_DIR` is an ordinary Hugging Face folder; `corpus` generates the text it was trained on and is
measured on, `train` makes the folder again. Nothing heavy is imported here.
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
