"""Sources of which no artifact could be made, at the command line: one line, nothing left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.folders import change_json, change_tensors
from tests.tiny import write_source

from .process import Commands, assert_fails, nothing_left

FAILURE = 1
EMBEDDING = "model.embed_tokens.weight"
CARD = "---\nbase_model: org/original\n---\n"
Tensors = dict[str, torch.Tensor]


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_model_type(folder: Path) -> None:
    change_json(folder / "config.json", lambda config: config.pop("model_type"))


def no_norm(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))


def fp8_embedding(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[EMBEDDING] = tensors[EMBEDDING].to(torch.float8_e4m3fn)

    change_tensors(folder, change)


def gptq(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if "proj" in name]:
            stem = name.removesuffix(".weight")
            del tensors[name]
            tensors[f"{stem}.qweight"] = torch.ones(4, 4, dtype=torch.int32)
            tensors[f"{stem}.qzeros"] = torch.ones(4, 4, dtype=torch.int32)

    change_tensors(folder, change)
    (folder / "README.md").write_text(CARD)


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry-run"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_config, ["no config.json"]),
        (no_model_type, ["model_type"]),
        (no_norm, ["not a whole model", "LlamaForCausalLM needs model.norm.weight"]),
        (fp8_embedding, ["already quantized", EMBEDDING, "[80, 96]", "F8_E4M3"]),
        (gptq, ["already quantized", "qweight", "AWQ or GPTQ", "org/original by its card"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_source_is_blamed_before_any_work(
    irq: Commands,
    tmp_path: Path,
    damage: Callable[[Path], None],
    words: list[str],
    dry: tuple[str, ...],
) -> None:
    source = write_source(tmp_path / "source")
    damage(source)
    with nothing_left(tmp_path):
        result = irq("quantize", source, tmp_path / "out", *dry)
    assert_fails(result, FAILURE, str(source), *words)


def test_eval_names_a_class_that_predicts_nothing(irq: Commands, tmp_path: Path) -> None:
    tensors = {"lm_head.weight"}
    source = write_source(tmp_path / "source")
    change_json(source / "config.json", lambda config: config.update(architectures=["LlamaModel"]))
    change_tensors(source, lambda found: [found.pop(name) for name in tensors])
    assert irq("quantize", source, tmp_path / "out").code == 0
    (tmp_path / "text.txt").write_text("once upon a time " * 50)
    result = irq("eval", tmp_path / "out", "--text", tmp_path / "text.txt")
    assert_fails(result, 2, "LlamaModel", "no causal language model")
