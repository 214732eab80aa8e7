"""What is advised for a source of GGUF alone works with the transformers that is installed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.errors import IrqError
from irq_convert.jobs.export.export import export
from irq_convert.jobs.quantize.quantize import quantize
from irq_convert.jobs.verify import verify


def test_the_way_from_gguf_to_a_source(tmp_path: Path, demo_nf3: Path) -> None:
    from transformers import AutoModelForCausalLM

    export(demo_nf3, tmp_path / "gguf", to="gguf")
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(file, alone)
    with pytest.raises(IrqError) as caught:
        open_checkpoint(alone)
    advice = str(caught.value)
    assert "\n" not in advice

    model = AutoModelForCausalLM.from_pretrained(alone, gguf_file=file.name)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "saved")
    steps = ("model.hf_quantizer = None", "del model.config.quantization_config")
    for step in steps:
        assert step in advice
        exec(step, {"model": model})  # the words of the advice
    model.save_pretrained(tmp_path / "saved")

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    quantize(tmp_path / "saved", tmp_path / "out", bits=4, threads=1)
    assert verify(tmp_path / "out", tmp_path / "saved").failures == ()
