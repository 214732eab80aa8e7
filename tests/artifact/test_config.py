"""The configuration: round trips, refusals, and agreement with the published JSON Schema."""

from __future__ import annotations

import copy
import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from irq_convert.artifact.config import ModuleFormat, QuantizationConfig, module_name
from irq_convert.core.blocks import BlockShape
from irq_convert.errors import IrqError
from tests.folders import assert_one_line
from tests.paths import ROOT

SCHEMA_FILE = ROOT / "formats" / "irq-config.schema.json"
SCHEMA = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text()))

CODEBOOKS = ("nf2", "nf3", "nf4", "int2", "int3", "int4")
BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024)
DTYPES = ("uint8", "float16", "float32")
MINIMAL: dict[str, Any] = {
    "quant_method": "irq",
    "format_version": 1,
    "codebook": "nf3",
    "bits": 3,
    "block_size": 64,
    "group_size": 256,
    "scale_dtype": "uint8",
    "tau_dtype": "float16",
}


def formats(columns: bool) -> st.SearchStrategy[ModuleFormat]:
    return st.builds(
        ModuleFormat,
        codebook=st.sampled_from(CODEBOOKS),
        block_size=st.sampled_from(BLOCK_SIZES),
        scale_dtype=st.sampled_from(DTYPES),
        tau_dtype=st.sampled_from(DTYPES),
        columns=st.none() | st.integers(1, 10**6) if columns else st.none(),
    )


names = st.text(max_size=8) | st.sampled_from(["lm_head", "model.layers.0.mlp.down_proj"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@st.composite
def configs(draw: st.DrawFn) -> QuantizationConfig:
    """Configurations whose overrides all differ from the default, as `to_dict` keeps only those."""
    default = draw(formats(columns=False))
    overrides = draw(st.dictionaries(names, formats(columns=True), max_size=3))
    return QuantizationConfig(
        default,
        tuple(draw(st.lists(names, max_size=3))),
        {name: own for name, own in overrides.items() if own != default},
        draw(st.dictionaries(st.text(max_size=5), json_values, max_size=2)),
    )


@given(configs())
def test_what_is_written_is_valid_and_reads_back(config: QuantizationConfig) -> None:
    written = json.loads(json.dumps(config.to_dict()))
    SCHEMA.validate(written)
    assert QuantizationConfig.from_dict(written) == config


@given(configs(), names)
def test_a_module_has_its_override_or_the_default(config: QuantizationConfig, name: str) -> None:
    again = QuantizationConfig.from_dict(config.to_dict())
    assert again.module(name) == config.overrides.get(name, config.default)
    for own in config.overrides:
        assert again.module(own) == config.overrides[own]
        assert again.module(f"x.{own}") == config.overrides.get(f"x.{own}", config.default)


@given(st.integers(1, 5000), st.sampled_from(CODEBOOKS))
def test_columns_follow_from_multiples_of_eight(columns: int, codebook: str) -> None:
    fmt = ModuleFormat(codebook, 64)
    row_bytes = BlockShape(1, columns, 64, fmt.bits).row_bytes
    implied = fmt.columns_of(row_bytes)
    assert columns <= implied < columns + 8
    if columns % 8 == 0:
        assert implied == columns
    assert ModuleFormat(codebook, 64, columns=columns).columns_of(row_bytes) == columns


def test_only_what_differs_is_an_override() -> None:
    raw = MINIMAL | {
        "overrides": {
            "a": {"codebook": "nf3", "bits": 3, "block_size": 64},
            "b": {"codebook": "int2", "bits": 2, "tau_dtype": "float16"},
            "c": {"columns": 1023, "scale_dtype": "float32"},
        }
    }
    config = QuantizationConfig.from_dict(raw)
    assert config.module("b") == ModuleFormat("int2", 64, "uint8", "float16")
    assert config.to_dict()["overrides"] == {
        "b": {"codebook": "int2", "bits": 2},
        "c": {"columns": 1023, "scale_dtype": "float32"},
    }


def test_optional_keys_may_be_left_out() -> None:
    config = QuantizationConfig.from_dict(MINIMAL)
    assert config == QuantizationConfig(ModuleFormat("nf3", 64, "uint8", "float16"))
    SCHEMA.validate(MINIMAL)


@pytest.mark.parametrize("key", sorted(MINIMAL))
def test_every_other_key_is_needed(key: str) -> None:
    raw = {name: value for name, value in MINIMAL.items() if name != key}
    assert not SCHEMA.is_valid(raw)
    with pytest.raises(IrqError) as error:
        QuantizationConfig.from_dict(raw)
    assert_one_line(str(error.value), key)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "gptq"}, "quant_method"),
    ({"format_version": 2}, "upgrade"),
    ({"format_version": "1"}, "version"),
    ({"codebook": "nf5", "bits": 5}, "nf5"),
    ({"codebook": None}, "codebook"),
    ({"bits": 4}, "bits 4"),
    ({"bits": None}, "bits"),
    ({"block_size": 63}, "63"),
    ({"block_size": "64"}, "64"),
    ({"group_size": 128}, "group_size"),
    ({"scale_dtype": "bfloat16"}, "bfloat16"),
    ({"tau_dtype": ["uint8"]}, "uint8"),
    ({"columns": 8}, "columns"),
    ({"desc_act": False}, "desc_act"),
    ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
    ({"modules_to_not_convert": [1]}, "modules_to_not_convert"),
    ({"overrides": ["a"]}, "overrides"),
    ({"overrides": {"a": 3}}, "a"),
    ({"overrides": {"a": {"bits": 4}}}, "overrides[a]"),
    ({"overrides": {"a": {"codebook": "nf4"}}}, "overrides[a]"),
    ({"overrides": {"a": {"codebook": "nf4", "bits": 3}}}, "overrides[a]"),
    ({"overrides": {"a": {"group_size": 256}}}, "group_size"),
    ({"overrides": {"a": {"columns": 0}}}, "columns"),
    ({"overrides": {"a": {"columns": True}}}, "columns"),
    ({"overrides": {"a": {"columns": "64"}}}, "columns"),
    ({"overrides": {"a": {"block_size": 7}}}, "7"),
]
ODD: list[dict[str, Any]] = [
    {"format_version": True},
    {"codebook": ["nf3"]},
    {"codebook": {}},
    {"modules_to_not_convert": None},
    {"modules_to_not_convert": ""},
    {"overrides": None},
    {"overrides": []},
    {"overrides": {"a": {"bits": None}}},
    {"overrides": {"a": {"columns": None}}},
    {"overrides": {"a": {"scale_dtype": {}}}},
]


@pytest.mark.parametrize(("change", "word"), REFUSED)
def test_refusals_name_the_key_as_the_schema_refuses(change: dict[str, Any], word: str) -> None:
    raw = MINIMAL | change
    assert not SCHEMA.is_valid(raw)
    with pytest.raises(IrqError) as error:
        QuantizationConfig.from_dict(raw)
    assert_one_line(str(error.value), word)


@pytest.mark.parametrize("change", ODD)
def test_values_of_odd_types_are_refused_too(change: dict[str, Any]) -> None:
    assert not SCHEMA.is_valid(MINIMAL | change)
    with pytest.raises(IrqError):
        QuantizationConfig.from_dict(MINIMAL | change)


@pytest.mark.parametrize("meta", [{}, {"a": [1]}, None, "text", 3, ["a"]])
def test_meta_may_be_anything(meta: object) -> None:
    raw = MINIMAL | {"meta": meta}
    SCHEMA.validate(raw)
    assert QuantizationConfig.from_dict(raw).default.codebook == "nf3"


values: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(*CODEBOOKS, *BLOCK_SIZES, *DTYPES, 0, 1, 2, 3, 4, -1, 63, 2048),
        *("", "irq", "IRQ", "nf8", "lm_head"),
        *([], {}, None, True, False, ["lm_head"], {"a": {}}),
    ]
)
override_keys = ("codebook", "bits", "block_size", "scale_dtype", "tau_dtype", "columns", "odd")


@given(
    config=configs(),
    changes=st.dictionaries(
        st.sampled_from([*MINIMAL, "modules_to_not_convert", "overrides", "meta", "odd"]),
        values,
        max_size=2,
    ),
    override=st.none() | st.dictionaries(st.sampled_from(override_keys), values, max_size=3),
)
def test_parser_and_schema_agree(
    config: QuantizationConfig, changes: dict[str, Any], override: dict[str, Any] | None
) -> None:
    raw = copy.deepcopy(config.to_dict()) | changes
    if override is not None and isinstance(raw["overrides"], dict):
        raw["overrides"] = {**raw["overrides"], "x": override}
    if SCHEMA.is_valid(raw):
        QuantizationConfig.from_dict(raw)
    else:
        with pytest.raises(IrqError) as error:
            QuantizationConfig.from_dict(raw)
        assert_one_line(str(error.value))


@pytest.mark.parametrize(
    ("tensor", "module"),
    [
        ("a.b.weight", "a.b"),
        ("a.weight.weight", "a.weight"),
        ("experts.gate_up_proj", "experts.gate_up_proj"),
        ("a.bias", "a.bias"),
        ("weight", "weight"),
    ],
)
def test_module_names(tensor: str, module: str) -> None:
    assert module_name(tensor) == module
