"""Scales and taus that another program has widened: saved as the format says, or said otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import prepare_model_for_kbit_training

import irq_convert
from irq_convert.artifact.config import ModuleFormat
from irq_convert.jobs.export.export import export
from tests.folders import read_json, read_tensors
from tests.jobs.merge.make import make_artifact, write_adapter
from tests.tiny import VOCABULARY

IDS = torch.arange(24).reshape(2, 12) % VOCABULARY


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose taus are float16, as a merge with `--tau float16` leaves them."""
    folder = tmp_path_factory.mktemp("half")
    artifact = make_artifact(folder / "art")
    adapter = write_adapter(folder / "adapter", artifact, kind="block", rank=4)
    irq_convert.merge(artifact, adapter, folder / "half", to="irq", tau="float16")
    tensors = read_tensors(folder / "half")
    assert tensors["model.layers.0.self_attn.q_proj.weight_tau"].dtype == torch.float16
    return folder / "half"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def test_prepared_for_training_a_model_is_saved_as_it_was(half: Path, tmp_path: Path) -> None:
    model = prepare_model_for_kbit_training(irq_convert.load(half))
    wanted = logits(model)
    model.save_pretrained(tmp_path / "saved")
    before, after = read_tensors(half), read_tensors(tmp_path / "saved")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name
    assert torch.equal(logits(irq_convert.load(tmp_path / "saved")), wanted)
    export(tmp_path / "saved", tmp_path / "dense", to="dense", dtype="float32")
    from transformers import AutoModelForCausalLM

    twin = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    torch.testing.assert_close(wanted, twin, atol=1e-5, rtol=1e-5)


def test_statistics_that_no_longer_fit_are_described_as_they_are(
    half: Path, tmp_path: Path
) -> None:
    model = prepare_model_for_kbit_training(irq_convert.load(half))
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.weight_tau.data += 1e-9
    wanted = logits(model)
    model.save_pretrained(tmp_path / "saved")
    stored = read_tensors(tmp_path / "saved")
    assert stored["model.layers.0.self_attn.q_proj.weight_tau"].dtype == torch.float32
    assert stored["model.layers.0.self_attn.v_proj.weight_tau"].dtype == torch.float16
    again = irq_convert.load(tmp_path / "saved")
    assert torch.equal(logits(again), wanted)
    found: ModuleFormat = again.get_submodule("model.layers.0.self_attn.q_proj").fmt
    assert found.tau_dtype == "float32"
    raw = read_json(tmp_path / "saved" / "config.json")["quantization_config"]
    assert raw["overrides"]
