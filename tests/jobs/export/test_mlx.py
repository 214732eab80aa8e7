"""`--to mlx`, read and run by mlx-lm itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from irq_convert.core.spec import QuantSpec
from irq_convert.errors import UsageError
from irq_convert.jobs.export.export import export
from irq_convert.jobs.export.mlx_config import mlx_config, with_rope
from irq_convert.jobs.export.options import ExportOptions
from irq_convert.jobs.export.report import ExportReport
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from tests.folders import read_tensors
from tests.paths import DEMO

from .compare import decoded, our_logits, tokens
from .make import quantized, save_model

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
ROUNDING = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def export_mlx(artifact: Path, out: Path, dtype: str = "auto", **more: Any) -> ExportReport:
    return export(artifact, out, ExportOptions("mlx", dtype=dtype, **more))


def mlx_logits(folder: Path) -> torch.Tensor:
    """As mlx-lm loads and computes them, `[tokens, vocabulary]`."""
    import numpy as np
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    logits = model(mx.array(tokens().numpy())).astype(mx.float32)
    return torch.from_numpy(np.array(logits)[0])


def mlx_weights(folder: Path, bits: int, group: int) -> dict[str, torch.Tensor]:
    """Every quantized tensor as `mx.dequantize` gives it, in float32."""
    import numpy as np

    found = {}
    for path in folder.glob("model*.safetensors"):
        tensors = mx.load(str(path))
        for name in [name for name in tensors if name.endswith(".scales")]:
            stem = name.removesuffix(".scales")
            scales, biases = (
                tensors[f"{stem}.{n}"].astype(mx.float32) for n in ("scales", "biases")
            )
            dense = mx.dequantize(
                tensors[f"{stem}.weight"], scales, biases, group_size=group, bits=bits
            )
            found[f"{stem}.weight"] = torch.from_numpy(np.array(dense))
    return found


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
def test_weights_are_one_rounding_away(
    by_bits: dict[int, Path], tmp_path: Path, bits: int, dtype: str
) -> None:
    artifact = by_bits[bits]
    report = export_mlx(artifact, tmp_path / "out", dtype)
    found, wanted = mlx_weights(tmp_path / "out", bits, 32), decoded(artifact)
    assert set(found) == set(wanted)
    largest = max(float((found[n].double() - wanted[n].double()).abs().max()) for n in wanted)
    peak = max(float(weight.abs().max()) for weight in wanted.values())
    # Half a step of the scale, times the code, and half a step of the bias.
    assert largest <= 3 * peak * ROUNDING["bfloat16" if dtype == "auto" else dtype]
    assert report.largest == pytest.approx(largest, rel=0.01, abs=2e-7 * peak)
    assert report.changed_codes == 0


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_demo_model_computes_the_same(tmp_path: Path, bits: int) -> None:
    artifact = quantized(DEMO, tmp_path / "irq", f"int{bits}")
    export_mlx(artifact, tmp_path / "out", "float32")
    ours = our_logits(artifact)
    assert float((mlx_logits(tmp_path / "out") - ours).abs().max()) < 1e-4 * float(ours.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 32}),
    ],
)
def test_families(tmp_path: Path, family: str, more: dict[str, Any]) -> None:
    source = save_model(tmp_path / "source", family, **more)
    artifact = quantized(source, tmp_path / "irq")
    report = export_mlx(artifact, tmp_path / "out", "float32")
    ours = our_logits(artifact)
    assert float((mlx_logits(tmp_path / "out") - ours).abs().max()) < 1e-4 * float(ours.abs().max())
    assert report.notes == ()


def test_widths_and_tails(tmp_path: Path) -> None:
    """Two widths, blocks cut into smaller groups, and columns that no group divides."""
    source = save_model(tmp_path / "source", intermediate_size=344, dtype="float32")
    options = QuantizeOptions(
        QuantSpec("int4", 256), threads=1, bits_for=(("q_proj", 2), ("v_proj", 3))
    )
    quantize(str(source), tmp_path / "irq", options)
    report = export_mlx(tmp_path / "irq", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config["quantization"]
    assert (quantization["group_size"], quantization["bits"]) == (128, 4)
    assert quantization["model.layers.0.self_attn.q_proj"]["bits"] == 2
    assert quantization["model.layers.1.mlp.down_proj"] is False
    assert "quantization_config" in config
    stored = {found.stored: found.tensors for found in report.storages}
    assert stored == {
        "affine 4 bit, group 128, float32": 8,
        "affine 2 bit, group 128, float32": 2,
        "affine 3 bit, group 128, float32": 2,
        "dense float32": 2,
    }
    ours = our_logits(tmp_path / "irq")
    assert float((mlx_logits(tmp_path / "out") - ours).abs().max()) < 1e-4 * float(ours.abs().max())


def test_shards_and_metadata(int4: Path, tmp_path: Path) -> None:
    export_mlx(int4, tmp_path / "one", "float32")
    export_mlx(int4, tmp_path / "many", "float32", max_shard_bytes=100_000, tile_weights=2000)
    paths = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(paths) > 2
    for path in paths:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "mlx"}
    one, many = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "many")
    assert set(one) == set(many)
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert torch.equal(mlx_logits(tmp_path / "one"), mlx_logits(tmp_path / "many"))


def test_greedy_text_is_ours(tmp_path: Path) -> None:
    from mlx_lm import load
    from mlx_lm.generate import stream_generate
    from transformers import AutoTokenizer

    import irq_convert

    artifact = quantized(DEMO, tmp_path / "irq")
    export_mlx(artifact, tmp_path / "out", "float32")
    model, tokenizer = load(str(tmp_path / "out"))
    prompt = AutoTokenizer.from_pretrained(DEMO)("Once upon a time")["input_ids"]
    theirs = [step.token for step in stream_generate(model, tokenizer, prompt, max_tokens=24)]
    ours = irq_convert.load(artifact, dtype=torch.float32)
    found = ours.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0].tolist()
    wanted = found[len(prompt) :][: len(theirs)]
    assert theirs[: len(wanted)] == wanted


def test_nf_is_refused(nf4: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"codebook nf4.*--to dense, or quantize with --codebook"):
        export_mlx(nf4, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_blocks_too_small_for_any_group(llama: Path, tmp_path: Path) -> None:
    artifact = quantized(llama, tmp_path / "irq", block_size=16)
    with pytest.raises(UsageError, match=r"blocks of 16 cannot be cut.*--block-size 32"):
        export_mlx(artifact, tmp_path / "out")


def test_an_unknown_family_is_noted(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "gemma", head_dim=32)
    report = export_mlx(quantized(source, tmp_path / "irq"), tmp_path / "out")
    assert "model_type 'gemma' was not tried" in report.notes[0]


def test_rope_settings_go_where_mlx_lm_looks() -> None:
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert with_rope(plain)["rope_theta"] == 1e6
    assert "rope_scaling" not in with_rope(plain)
    scaled = {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}}
    assert with_rope(scaled)["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    old = {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert with_rope(old)["rope_theta"] == 7.0
    nested = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}
    assert with_rope(nested) == nested


def test_the_most_frequent_width_is_the_default() -> None:
    config = mlx_config({}, {"a": (4, 64), "b": (3, 64), "c": (3, 64), "d": None})
    assert config["quantization"] == {
        "group_size": 64,
        "bits": 3,
        "mode": "affine",
        "a": {"group_size": 64, "bits": 4, "mode": "affine"},
        "d": False,
    }
