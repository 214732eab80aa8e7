"""Sources of which no artifact could be made that loads right are refused, and no others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import irq_convert
from irq_convert.artifact.contents import open_artifact
from irq_convert.artifact.manifest import SEAL, manifest_sha256
from irq_convert.checkpoint.files import sha256_file
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.errors import IrqError
from irq_convert.hf.whole import ask_wholeness
from irq_convert.jobs.export.export import export
from irq_convert.jobs.quantize.estimate import estimate_quantize
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from irq_convert.jobs.verify import verify
from tests.architectures.zoo import KINDS, Kind, write_checkpoint
from tests.folders import SHARD, assert_one_line, change_json, change_tensors, listing
from tests.tiny import LLAMA, UNKNOWN, llama_tensors, tiny_model, write_source

Q0 = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
OPTIONS: dict[str, Any] = {"threads": 1, "block_size": 32}
Tensors = dict[str, torch.Tensor]


def refused(source: Path, *words: str, **options: Any) -> None:
    """Running and a dry run both end in one line, and nothing is written."""
    before = listing(source.parent)
    jobs: tuple[Callable[..., Any], ...] = (quantize, estimate_quantize)
    for work in jobs:
        with pytest.raises(IrqError) as caught:
            work(source, source.parent / "out", **OPTIONS, **options)
        assert type(caught.value) is IrqError
        assert_one_line(str(caught.value), str(source), *words)
    assert listing(source.parent) == before


def assert_loads_right(source: Path, **options: Any) -> None:
    """The artifact computes what its dense twin does, loaded by transformers alone."""
    out, twin = source.parent / "out", source.parent / "twin"
    quantize(source, out, **OPTIONS, **options)
    assert verify(out, source).failures == ()
    export(out, twin, to="dense", dtype="float32")
    cls = getattr(
        transformers, json.loads((source / "config.json").read_text())["architectures"][0]
    )
    dense, info = cls.from_pretrained(twin, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    model = irq_convert.load(out, dtype=torch.float32)
    assert type(model) is cls
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        wanted, found = dense.eval()(input_ids=ids)[0], model.eval()(input_ids=ids)[0]
    assert torch.allclose(found, wanted, atol=1e-5, rtol=1e-5)


# --- what is missing ------------------------------------------------------------------------------


def test_a_whole_source_loads_right(tmp_path: Path) -> None:
    assert_loads_right(write_source(tmp_path / "m"))


def test_without_a_config_nothing_says_the_class(tmp_path: Path) -> None:
    source = write_source(tmp_path / "m")
    (source / "config.json").unlink()
    refused(source, "no config.json", "copy the model's own config.json")


@pytest.mark.parametrize(
    "config", [{}, {"architectures": LLAMA["architectures"]}, {"model_type": ""}]
)
def test_without_a_model_type_nothing_can_be_loaded(tmp_path: Path, config: Any) -> None:
    refused(write_source(tmp_path / "m", None, config), "config.json has no model_type")


@pytest.mark.parametrize("name", sorted(llama_tensors()))
def test_every_tensor_of_the_class_is_needed(tmp_path: Path, name: str) -> None:
    tensors = llama_tensors()
    del tensors[name]
    refused(write_source(tmp_path / "m", tensors), "LlamaForCausalLM needs", name, "architectures")


def test_tensors_of_other_shapes_are_named_with_both(tmp_path: Path) -> None:
    tensors = llama_tensors() | {Q0: torch.zeros(96, 90)}
    refused(write_source(tmp_path / "m", tensors), Q0, "[96, 96]", "[96, 90]")


def test_layers_that_config_has_and_the_files_have_not(tmp_path: Path) -> None:
    source = write_source(tmp_path / "m", None, LLAMA | {"num_hidden_layers": 3})
    refused(source, "LlamaForCausalLM needs model.layers.2.", "8 more")


def test_the_files_of_a_base_model_are_whole_under_the_name_of_its_class(tmp_path: Path) -> None:
    tensors = llama_tensors()
    del tensors["lm_head.weight"]
    refused(write_source(tmp_path / "head" / "m", tensors), "lm_head.weight", "architectures")
    base = LLAMA | {"architectures": ["LlamaModel"]}
    assert_loads_right(write_source(tmp_path / "base" / "m", tensors, base))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_architecture_is_whole_and_without_any_tensor_is_not(
    tmp_path: Path, kind: Kind
) -> None:
    checkpoint = open_checkpoint(write_checkpoint(kind, tmp_path / "m"))
    found = ask_wholeness(checkpoint.config, checkpoint.tensors)
    assert (found.known, found.why) == (True, None)
    names = sorted(checkpoint.tensors)
    for name in {re.sub(r"\.\d+\.", ".0.", name): name for name in names}.values():
        rest = {key: info for key, info in checkpoint.tensors.items() if key != name}
        lacks = ask_wholeness(checkpoint.config, rest).lacks
        assert lacks is not None, name
        assert_one_line(lacks, kind.model, "needs")


# --- what must not be refused ---------------------------------------------------------------------


def add(**more: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({n.replace("__", "."): t for n, t in more.items()})


def without_prefix(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


@pytest.mark.parametrize(
    "change",
    [
        add(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8)),
        add(model__layers__9__mlp__up_proj__weight=torch.ones(172, 96)),
        add(value_head__weight=torch.ones(1, 96), steps=torch.tensor(7)),
        add(mask=torch.zeros(3, 5, dtype=torch.bool), table=torch.ones(3, dtype=torch.int64)),
        add(x_blocks=torch.zeros(4, 4, dtype=torch.uint8), x_scales=torch.zeros(4)),
        without_prefix,
    ],
    ids=["inv_freq", "layer", "head", "integers", "blocks", "prefix"],
)
def test_tensors_that_the_class_does_not_want_are_no_fault(
    tmp_path: Path, change: Callable[[Tensors], object]
) -> None:
    source = write_source(tmp_path / "m")
    change_tensors(source, change)
    assert_loads_right(source)


@pytest.mark.parametrize("both", [False, True])
def test_tied_weights_may_be_there_once_or_twice(tmp_path: Path, both: bool) -> None:
    tensors = llama_tensors()
    del tensors["lm_head.weight"]
    if both:
        tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
    config = LLAMA | {"tie_word_embeddings": True}
    assert_loads_right(write_source(tmp_path / "m", tensors, config))


def test_classes_that_nobody_knows_are_not_judged(tmp_path: Path) -> None:
    linear = {"model.layers.0.mlp.up_proj.weight": torch.ones(32, 64)}
    own_code = {"auto_map": {"AutoModelForCausalLM": "mine.Mine"}}
    configs: list[dict[str, Any]] = [UNKNOWN, {"model_type": "llama"}, LLAMA | own_code]
    for number, config in enumerate([*configs, UNKNOWN | {"architectures": ["Mine"]}]):
        source = write_source(tmp_path / str(number) / "m", linear, config)
        assert quantize(source, source.parent / "out", **OPTIONS).quantized_weights == 32 * 64
        assert verify(source.parent / "out", source).failures == ()


def test_code_that_tells_its_own_configuration_needs_no_model_type(tmp_path: Path) -> None:
    linear = {"h.0.fc.weight": torch.ones(32, 64)}
    config = {"auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Mine"}}
    source = write_source(tmp_path / "m", linear, config)
    assert quantize(source, tmp_path / "out", **OPTIONS).quantized_weights == 32 * 64


def test_transformers_stays_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = open_checkpoint(write_source(tmp_path / "m"))
    assert ask_wholeness(checkpoint.config, checkpoint.tensors).known
    assert capfd.readouterr() == ("", "")


# --- quantized already ----------------------------------------------------------------------------


def replace_linears(*parts: tuple[str, Callable[[torch.Tensor], torch.Tensor]]) -> Tensors:
    """The tensors of a LLaMA whose linear layers another method has packed into `parts`."""
    tensors = llama_tensors()
    for name in [name for name in tensors if "proj" in name]:
        weight = tensors.pop(name)
        for suffix, make in parts:
            tensors[name.removesuffix(".weight") + suffix] = make(weight)
    return tensors


def integers(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda weight: torch.ones(weight.shape, dtype=dtype)


def scales(weight: torch.Tensor) -> torch.Tensor:
    return torch.ones(weight.shape[0], 1)


F8 = integers(torch.float8_e4m3fn)
PACKED = {
    "AWQ or GPTQ": [(".qweight", integers(torch.int32)), (".qzeros", integers(torch.int32))],
    "GPTQ": [(".qweight", integers(torch.int32)), (".g_idx", integers(torch.int32))],
    "MXFP4": [("_blocks", integers(torch.uint8)), ("_scales", integers(torch.uint8))],
    "FP8": [(".weight", F8), (".weight_scale_inv", scales)],
    "compressed-tensors": [(".weight_packed", integers(torch.int32)), (".weight_scale", scales)],
    "NVFP4": [(".weight", integers(torch.uint8)), (".weight_scale_2", scales)],
    "bitsandbytes in 8 bits": [(".weight", integers(torch.int8)), (".SCB", scales)],
    "bitsandbytes in 4 bits": [(".weight", integers(torch.uint8)), (".weight.absmax", scales)],
    "HQQ": [(".W_q", integers(torch.uint8)), (".scale", scales)],
    "quanto": [(".weight._data", integers(torch.int8)), (".weight._scale", scales)],
    "integers": [(".weight", integers(torch.int8)), (".weight_scale", scales)],
}


@pytest.mark.parametrize("config", [LLAMA, UNKNOWN, None], ids=["llama", "unknown", "no config"])
@pytest.mark.parametrize("method", sorted(PACKED))
def test_what_packed_a_source_is_named(tmp_path: Path, method: str, config: Any) -> None:
    source = write_source(tmp_path / "m", replace_linears(*PACKED[method]), config or {})
    if config is None:
        (source / "config.json").unlink()
    refused(source, "already quantized", f"packed by {method};", "the original model,", SHARD)


def test_mlx_is_named(tmp_path: Path) -> None:
    parts = [(".weight", integers(torch.uint32)), (".scales", scales), (".biases", scales)]
    source = write_source(tmp_path / "m", replace_linears(*parts), LLAMA)
    refused(source, "already quantized", "packed by MLX")


@pytest.mark.parametrize(
    "card",
    [
        "---\nlicense: mit\nbase_model: org/the-model\n---\n# x\n",
        "---\r\nbase_model:\r\n- org/the-model\r\ntags: [a]\r\n---\r\n",
        '---\nbase_model:\n  - "org/the-model"\n---\n',
    ],
)
def test_the_card_tells_the_original(tmp_path: Path, card: str) -> None:
    tensors = replace_linears(*PACKED["GPTQ"])
    source = write_source(tmp_path / "m", tensors, LLAMA, files={"README.md": card})
    refused(source, "give the original model (org/the-model by its card), in float32")
    change_json(source / "config.json", lambda raw: raw.update(quantization_config={"bits": 4}))
    refused(source, "quant_method 'unknown'", "org/the-model")


@pytest.mark.parametrize("scaled", [False, True])
def test_keeping_layers_of_fp8_does_not_let_them_through(tmp_path: Path, scaled: bool) -> None:
    tensors = llama_tensors()
    tensors[Q0] = tensors[Q0].to(torch.float8_e4m3fn)
    if scaled:
        tensors[f"{Q0}_scale_inv"] = torch.ones(1, 1)
    source = write_source(tmp_path / "a" / "m", tensors)
    refused(source, "already quantized", Q0, "F8_E4M3", "[96, 96]", keep=("0.self_attn.q_proj",))
    if scaled:
        source = write_source(tmp_path / "b" / "m", tensors, UNKNOWN)
        refused(source, "already quantized", Q0, "FP8", keep=("0.self_attn.q_proj",))


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.int8, torch.uint8, torch.bool])
def test_no_dense_tensor_of_the_class_is_a_copy_of_something_packed(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = llama_tensors()
    tensors[EMBEDDING] = tensors[EMBEDDING].to(dtype)
    source = write_source(tmp_path / "m", tensors)
    refused(source, "already quantized", EMBEDDING, "LlamaForCausalLM would take", SHARD)


@pytest.mark.parametrize("config", [LLAMA, None])
def test_native_names_are_told_from_a_damaged_model(tmp_path: Path, config: Any) -> None:
    tensors = {"tok_embeddings.weight": torch.ones(80, 96), "output.weight": torch.ones(80, 96)}
    tensors |= {
        f"layers.{n}.attention.w{k}.weight": torch.ones(96, 96) for n in (0, 1) for k in "qkvo"
    }
    source = write_source(tmp_path / "m", tensors, config, files={"params.json": "{}"})
    if config is None:
        (source / "config.json").unlink()
    refused(source, "Meta or Mistral", "params.json", "layers.0.attention.w", "-hf")


# --- artifacts that were made all the same --------------------------------------------------------


def reseal(folder: Path) -> None:
    """Write checksums and hashes of what is there now."""

    def seal(manifest: Any) -> None:
        for name, entry in manifest["files"].items():
            entry |= {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        manifest["totals"]["weights"] = open_artifact(folder).weights
        manifest[SEAL] = manifest_sha256(manifest)

    change_json(folder / "irq_manifest.json", seal)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    quantize(write_source(tmp_path / "m"), tmp_path / "out", **OPTIONS)
    return tmp_path / "out"


def found_wrong(folder: Path, *words: str) -> None:
    reseal(folder)
    failures = verify(folder).failures
    assert len(failures) == 1, failures
    assert_one_line(failures[0], *words)


def test_verify_finds_what_the_class_lacks(artifact: Path) -> None:
    assert verify(artifact).failures == ()
    change_tensors(artifact, lambda tensors: tensors.pop("model.norm.weight"))
    found_wrong(artifact, "LlamaForCausalLM needs model.norm.weight")


def test_verify_finds_other_shapes(artifact: Path) -> None:
    change_json(artifact / "config.json", lambda raw: raw.update(num_key_value_heads=6))
    found_wrong(artifact, "k_proj.weight", "[96, 96]", "[32, 96]")


def test_verify_finds_copies_of_packed_tensors(artifact: Path) -> None:
    def pack(tensors: Tensors) -> None:
        tensors[EMBEDDING] = tensors[EMBEDDING].to(torch.float8_e4m3fn)

    change_tensors(artifact, pack)
    found_wrong(artifact, EMBEDDING, "F8_E4M3", "quantized already")


def test_verify_finds_packed_tensors_of_unknown_classes(artifact: Path) -> None:
    more = {
        "x.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "x.weight_scale_inv": torch.ones(1),
    }
    change_tensors(artifact, lambda tensors: tensors.update(more))
    assert verify_after(artifact) == ()  # LlamaForCausalLM wants none of it
    change_json(artifact / "config.json", lambda raw: raw.update(architectures=["Mine"]))
    found_wrong(artifact, "x.weight", "FP8")


def verify_after(folder: Path) -> tuple[str, ...]:
    reseal(folder)
    return verify(folder).failures


def test_verify_finds_a_config_without_model_type(artifact: Path) -> None:
    change_json(artifact / "config.json", lambda raw: raw.pop("model_type"))
    found_wrong(artifact, "config.json", "model_type")


def test_other_classes_are_whole_for_verify(tmp_path: Path) -> None:
    for number, kind in enumerate(["gpt2", "mixtral"]):
        changes: dict[str, Any] = (
            {"n_embd": 32, "n_head": 4, "n_layer": 2} if kind == "gpt2" else {}
        )
        folder = tmp_path / str(number)
        tiny_model(kind, **changes).save_pretrained(folder / "m")
        quantize(folder / "m", folder / "out", QuantizeOptions(threads=1))
        assert verify(folder / "out", folder / "m").failures == ()
