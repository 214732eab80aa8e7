"""The one place of codebooks: what it refuses, and that a new one needs nothing else."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from irq_convert.core.codebook import (
    CODEBOOKS,
    FAMILIES,
    LEAST_BITS,
    MOST_BITS,
    MOST_LEVELS,
    WIDTHS,
    Codebook,
    Family,
)
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.kernels import jit
from irq_convert.core.objective import Objective
from irq_convert.core.quantize import quantize_tensor, quantize_with_stats
from irq_convert.core.spec import QuantSpec
from irq_convert.errors import UsageError

OTHER_3 = (-1.0, -0.5, -0.25, -0.05, 0.05, 0.25, 0.5, 1.0)
RISING_32 = tuple(float(x) for x in np.linspace(-1, 1, 32))


def test_levels_are_those_of_numpy() -> None:
    for name, book in CODEBOOKS.items():
        assert book.name == name
        levels = np.array(book.levels)
        assert (levels == levels.astype(np.float32)).all()
        assert len(levels) == 2**book.bits <= MOST_LEVELS
        if book.uniform:
            last = 2**book.bits - 1
            steps = (2 * np.arange(last + 1) - last) / last
            assert (levels == steps.astype(np.float32)).all()


def test_widths_and_families_follow_from_the_codebooks() -> None:
    assert WIDTHS == (2, 3, 4)
    assert {book.kind for book in CODEBOOKS.values()} == set(FAMILIES)
    said = {name: (each.uniform, each.objective) for name, each in FAMILIES.items()}
    assert said == {"nf": (False, Objective.ENTROPY), "int": (True, Objective.MSE)}


@pytest.mark.parametrize("objective", ["auto", *Objective])
def test_a_row_is_all_that_a_codebook_needs(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CODEBOOKS, "xf3", Codebook("xf3", 3, "nf", OTHER_3))
    weight = torch.randn(24, 200, generator=torch.Generator().manual_seed(3))
    spec = QuantSpec("xf3", 64, objective)
    q, stats = quantize_with_stats(weight, spec, backend="numba")
    again = quantize_tensor(weight, spec, backend="torch").parts()
    assert all(torch.equal(part, again[suffix]) for suffix, part in q.parts().items())
    dense = dequantize_tensor(q, backend="numba")
    assert torch.equal(dense, dequantize_tensor(q, backend="torch"))
    assert stats.squared_error == pytest.approx(float((dense - weight).square().sum()), rel=1e-4)


def test_a_family_says_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family("xf", "for this test", uniform=False, objective=Objective.MSE)
    monkeypatch.setitem(FAMILIES, "xf", family)
    monkeypatch.setitem(CODEBOOKS, "xf3", Codebook("xf3", 3, "xf", OTHER_3))
    assert QuantSpec("xf3").objective == "mse"
    with pytest.raises(UsageError, match="integer zero points are for uniform levels, not xf3"):
        QuantSpec("xf3", zero_point="integer")


@pytest.mark.parametrize(
    ("book", "message"),
    [
        (("nf5", 5, "nf", RISING_32), "nf5 has 5-bit codes: kernels look up 2 to 4 bits"),
        (("nf1", 1, "nf", (-1.0, 1.0)), "nf1 has 1-bit codes: kernels look up 2 to 4 bits"),
        (("x", 3, "xf", OTHER_3), "no family 'xf', only nf, int"),
        (("x", 3, "nf", OTHER_3[1:]), "x needs 8 levels that rise from -1 to 1"),
        (("x", 2, "nf", (-1.0, 0.5, 0.5, 1.0)), "x needs 4 levels that rise"),
        (("x", 2, "nf", (-1.0, 0.5, 0.5 + 1e-12, 1.0)), "x needs 4 levels that rise"),
        (("x", 2, "nf", (-0.9, -0.5, 0.5, 1.0)), "x needs 4 levels that rise"),
        (("x", 2, "nf", ()), "x needs 4 levels that rise"),
        (("x", 3, "int", OTHER_3), "x of family int needs uniform levels"),
    ],
)
def test_what_no_kernel_serves_is_refused(book: tuple, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        Codebook(*book)
    assert "\n" not in str(error.value)


def test_levels_are_rounded_to_float32() -> None:
    assert Codebook("x", 3, "nf", OTHER_3).levels[3] == float(np.float32(-0.05)) != -0.05


def test_kernels_are_compiled_anew_for_other_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (LEAST_BITS, MOST_BITS) == (2, 4)
    before = jit._source_digest()
    monkeypatch.setattr(jit, "MOST_LEVELS", 32)
    assert jit._source_digest() != before


def test_names_cost_no_numerics() -> None:
    """Help reads codebooks, objectives and dtypes: that must not import numpy or torch."""
    names = ("codebook", "objective", "statistic_dtypes", "parts", "spec")
    code = "import sys\n" + "".join(f"import irq_convert.core.{name}\n" for name in names)
    code += "print([m for m in ('numpy', 'torch', 'numba') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
