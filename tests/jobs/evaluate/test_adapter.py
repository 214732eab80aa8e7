"""Adapters on models that are evaluated: applied whole, and only where they belong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from irq_convert.adapters.put_on import check_adapter, put_on
from irq_convert.artifact.identity import artifact_identity
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.common.text import cut_windows, encode_stream
from irq_convert.jobs.evaluate.evaluate import evaluate
from irq_convert.jobs.evaluate.options import EvalOptions
from irq_convert.jobs.evaluate.windows import evaluate_windows

from .conftest import make_model, make_tokenizer, story


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A plain LoRA far from zero, as stock PEFT saves it: its base is recorded nowhere."""
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(make_model(0), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def record_base(adapter: Path, sha256: str) -> None:
    (adapter / "irq_adapter.json").write_text(json.dumps({"base": {"sha256": sha256}}))


def change(adapter: Path, drop: str | None = None, add: str | None = None) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    kept = {name: tensor for name, tensor in tensors.items() if not (drop and drop in name)}
    for name in list(kept):
        if add:
            kept[name.replace("layers.0", add)] = kept[name].clone()
    save_file(kept, path)


def test_the_model_is_measured_with_its_adapter(
    model_folder: Path, adapter: Path, text_file: Path
) -> None:
    options = EvalOptions(context=24)
    windows = cut_windows(encode_stream(make_tokenizer(), story(7)), 24)
    adapted = PeftModel.from_pretrained(make_model(0), str(adapter))
    expected = evaluate_windows(adapted, windows, options, make_model(0))  # type: ignore[arg-type]
    found = evaluate(
        model_folder, text_file, adapter=adapter, against=model_folder, options=options
    )
    assert found == expected
    assert found.kl is not None
    assert found.kl > 0.01  # the reference carries no adapter
    assert found.nll != evaluate(model_folder, text_file, options=options).nll


def test_whose_adapter_it_is(model_folder: Path, other_folder: Path, adapter: Path) -> None:
    unknown = check_adapter(adapter, model_folder)
    assert (unknown.kind, unknown.base_matches) == ("plain", None)
    assert unknown.doubt is not None
    record_base(adapter, artifact_identity(model_folder))
    found = check_adapter(adapter, model_folder)
    assert (found.base_matches, found.doubt) == (True, None)
    with pytest.raises(UsageError, match=r"was trained on the artifact .*--any-base") as caught:
        check_adapter(adapter, other_folder)
    assert "\n" not in str(caught.value)
    assert check_adapter(adapter, other_folder, any_base=True).base_matches is False


def test_the_base_in_the_settings_comes_first(model_folder: Path, adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_sha256"] = artifact_identity(model_folder)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    record_base(adapter, "0" * 64)
    assert check_adapter(adapter, model_folder).base_matches is True


@pytest.mark.parametrize(
    ("drop", "add", "says"),
    [
        ("layers.1.mlp", None, "lacks base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"),
        (None, "layers.7", "has the unknown base_model.model.model.layers.7"),
    ],
)
def test_every_tensor_has_its_place(
    model_folder: Path, adapter: Path, drop: str | None, add: str | None, says: str
) -> None:
    change(adapter, drop, add)
    with pytest.raises(IrqError, match=says):
        put_on(make_model(0), check_adapter(adapter, model_folder))


def test_an_adapter_of_another_shape(model_folder: Path, adapter: Path, text_file: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: t[:, :-1].clone() if "lora_A" in n else t for n, t in tensors.items()}, path)
    with pytest.raises(IrqError, match="does not fit the model") as caught:
        evaluate(model_folder, text_file, adapter=adapter)
    assert "\n" not in str(caught.value)


def test_no_weights_are_read_for_a_wrong_adapter(tmp_path: Path, text_file: Path) -> None:
    with pytest.raises(UsageError, match="no such folder; give the folder of an adapter"):
        evaluate(tmp_path / "no-model", text_file, adapter=tmp_path / "none")
    with pytest.raises(UsageError, match="not an adapter"):
        evaluate(tmp_path / "no-model", text_file, adapter=tmp_path)
