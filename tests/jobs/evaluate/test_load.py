"""Loading models and tokenizers, and every way that fails."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from irq_convert.errors import IrqError, UsageError
from irq_convert.hf import causal_lm
from irq_convert.hf.causal_lm import check_device, load_causal_lm, load_tokenizer

from .conftest import make_model, save


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model folder that a test may damage."""
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_loads_as_it_was_saved(model_folder: Path, dtype: torch.dtype) -> None:
    model = load_causal_lm(model_folder, dtype)
    assert not model.training
    expected = make_model(0).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name].to(dtype)), name


def test_automatic_placement(model_folder: Path) -> None:
    assert load_causal_lm(model_folder, device="auto").device.type in ("cpu", "cuda", "mps")


def test_the_quantized_loader_is_used_for_our_artifacts(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own loader gets the folder, the dtype and the device, and transformers gets nothing."""
    edit_config(copy, quantization_config={"quant_method": "irq", "format_version": 1})
    calls: list[tuple[Path, dict[str, object]]] = []

    def loader(path: Path, **kwargs: object) -> PreTrainedModel:
        calls.append((path, kwargs))
        return make_model(3).train()

    monkeypatch.setattr(causal_lm, "load", loader)
    model = load_causal_lm(copy, torch.bfloat16, "cpu")
    assert calls == [(copy, {"dtype": torch.bfloat16, "device_map": "cpu"})]
    assert torch.equal(model.lm_head.weight, make_model(3).lm_head.weight)
    assert not model.training


def remove_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_a_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(7, 32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def a_pickle_with_code(folder: Path) -> None:
    path = folder / "model.safetensors"
    torch.save(load_file(path) | {"run": os.getcwd}, folder / "pytorch_model.bin")
    path.unlink()


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (remove_a_weight, "lacks 1 weights .* first is model.layers.1.mlp.up_proj.weight"),
        (change_a_shape, "cannot be loaded as a causal language model"),
        (cut_short, "cannot be loaded as a causal language model"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded as a causal language"),
        (a_pickle_with_code, "its pickle asks for posix.getcwd that is no weight"),
        (lambda f: (f / "config.json").unlink(), "cannot be loaded as a model"),
        (no_json, "not a valid JSON"),
        (lambda f: edit_config(f, vocab_size="many"), "vocab_size"),
        (lambda f: edit_config(f, num_attention_heads=0), "cannot be loaded"),
        (lambda f: edit_config(f, model_type="nonesuch"), "nonesuch"),
        (lambda f: edit_config(f, model_type="t5"), "AutoModelForCausalLM"),
    ],
)
def test_a_damaged_model_is_one_line(
    copy: Path, damage: Callable[[Path], object], says: str
) -> None:
    damage(copy)
    with pytest.raises(IrqError, match=says) as caught:
        load_causal_lm(copy)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_code_in_the_folder_is_not_run(copy: Path) -> None:
    edit_config(
        copy,
        model_type="own",
        auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    )
    (copy / "code.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(IrqError, match="cannot be loaded as a model"):
        load_causal_lm(copy)


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "a/b/c"])
@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
def test_a_missing_folder(load: Callable[[str], object], name: str) -> None:
    with pytest.raises(IrqError, match="no such folder") as caught:
        load(name)
    assert name in str(caught.value)


def test_a_missing_tokenizer_names_the_way_out(tmp_path: Path) -> None:
    folder = save(tmp_path / "bare", make_model(0), tokenizer=False)
    with pytest.raises(IrqError, match=r"no usable tokenizer.*--tokenizer PATH") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["nonesuch", "meta", "cuda:99"])
def test_devices_that_cannot_compute(device: str) -> None:
    with pytest.raises(UsageError, match=f"device '{device}' cannot be used") as caught:
        check_device(device)
    assert "\n" not in str(caught.value)
