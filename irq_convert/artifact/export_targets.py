"""The targets of `export` as everyone but their writers sees them: by name, and how each is loaded.

A further target is a row here, and a module of its name beside the other exporters that sets
`TARGET`. Cards ask this page how a result is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TargetPage:
    """`library` and `tags` are the Hub's words for a target.

    `install` is the package that loading needs beside transformers, and `code` the lines that load
    it, where that is not done as with any checkpoint: `{this}` stands for the repository in quotes
    with its revision, `{repo}` for its bare id, `{file}` for the first file of the `suffix`.
    `module` writes it, where that is not the exporter of its name.
    """

    library: str = "transformers"
    tags: tuple[str, ...] = ()
    install: str | None = None
    language: str = "python"
    code: str | None = None
    suffix: str = ""
    module: str | None = None

    def load(self, this: str, repo: str, files: Sequence[str]) -> str | None:
        """A block of Markdown that loads the result; None where any checkpoint's way does."""
        if self.code is None:
            return None
        file = next((name for name in files if self.suffix and name.endswith(self.suffix)), "")
        text = self.code.format(this=this, repo=repo, file=file or f"model{self.suffix}")
        return f"```{self.language}\n{text}\n```"


_MLX = "from mlx_lm import load  # pip install mlx-lm\n\nmodel, tokenizer = load({this})"
_GGUF = "llama-cli --hf-repo {repo} --hf-file {file}"

TARGETS = {
    "dense": TargetPage(),
    "mlx": TargetPage("mlx", ("mlx",), code=_MLX),
    "gguf": TargetPage("gguf", ("gguf",), language="", code=_GGUF, suffix=".gguf"),
    "compressed-tensors": TargetPage(tags=("compressed-tensors",), install="compressed-tensors"),
}
"""By their names on the command line."""
