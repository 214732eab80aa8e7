"""Options of a run: refused when they are made, and never half applied."""

from __future__ import annotations

import pytest

from irq_convert.core.spec import QuantSpec
from irq_convert.errors import UsageError
from irq_convert.jobs.quantize.options import QuantizeOptions, codebook_name


@pytest.mark.parametrize(
    ("family", "bits", "name"),
    [("nf", 2, "nf2"), ("nf", 4, "nf4"), ("int", 3, "int3"), ("int4", 4, "int4")],
)
def test_codebook_name(family: str, bits: int, name: str) -> None:
    assert codebook_name(family, bits) == name


@pytest.mark.parametrize(
    ("family", "bits", "words"),
    [
        ("nf", 5, ["--bits 5", "2, 3 or 4"]),
        ("nf", 1, ["--bits 1"]),
        ("foo", 4, ["--codebook foo", "nf", "int"]),
        ("", 4, ["--codebook"]),
        ("nf3", 4, ["nf3", "3 bits", "--bits 3"]),
        ("int4", 2, ["int4", "--bits 4"]),
    ],
)
def test_codebook_name_refuses(family: str, bits: int, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        codebook_name(family, bits)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": ("[",)}, ["--keep", "'['"]),
        ({"keep": ("a{9999999999999}",)}, ["--keep"]),
        ({"bits_for": (("(", 4),)}, ["--bits-for", "'('"]),
        ({"bits_for": (("down", 8),)}, ["--bits-for", "'down'", "8", "2, 3 or 4"]),
        ({"threads": 0}, ["--threads 0"]),
        ({"threads": -1}, ["--threads -1"]),
        ({"max_shard_bytes": 0}, ["shard"]),
        ({"tile_weights": 0}, ["tile"]),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        QuantizeOptions(**options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_to_dict_has_what_decides_the_bytes_and_nothing_else() -> None:
    spec = QuantSpec("int3", 32, "mse", 2)
    options = QuantizeOptions(spec, ("a",), (("b", 4),), max_shard_bytes=7)
    assert options.to_dict() == {
        "codebook": "int3",
        "block_size": 32,
        "objective": "mse",
        "refine": 2,
        "zero_point": "float",
        "keep": ["a"],
        "bits_for": [["b", 4]],
        "include_towers": False,
        "max_shard_bytes": 7,
    }
    same = QuantizeOptions(
        spec, ("a",), (("b", 4),), threads=3, tile_weights=1, overwrite=True, max_shard_bytes=7
    )
    assert same.to_dict() == options.to_dict()
