"""KL over buckets against its definition written down, values and gradients, and what it holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from irq_convert.jobs.finetune import teacher_loss
from irq_convert.jobs.finetune.encode import IGNORED
from irq_convert.jobs.finetune.teacher_loss import Taught, taught_sums

LENGTHS = (9, 2, 6)


def make(vocabulary: int, k: int, seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor, Any]:
    """A student's logits, a teacher's, and what is kept of these."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), max(LENGTHS), vocabulary)
    student, teacher = scale * torch.randn(2, *shape, generator=generator)
    log_p = teacher[:, :-1].log_softmax(-1)
    top, ids = log_p.topk(k, -1)
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    labels = torch.randint(vocabulary, shape[:2], generator=generator)
    labels[:, :2] = IGNORED
    for row, length in enumerate(LENGTHS):
        labels[row, length:] = IGNORED
    kept = torch.cat([top, rest.clamp_min(-65504.0)], -1)
    counts = tuple(length - 1 for length in LENGTHS)
    return student, teacher, Taught(ids.int(), kept, labels, counts)


def naive(student: Tensor, teacher: Tensor, taught: Taught, k: int) -> tuple[Tensor, Tensor]:
    """The same in float64, all of it at once: masses of the buckets, and their KL."""
    p, q = (logits[:, :-1].double().softmax(-1) for logits in (teacher, student))
    ids = taught.ids.long()

    def buckets(mass: Tensor) -> Tensor:
        top = mass.gather(-1, ids)
        if k == mass.shape[-1]:
            return top
        others = mass.scatter(-1, ids, 0.0).sum(-1, keepdim=True)
        return torch.cat([top, others], -1)

    one, other = buckets(p), buckets(q)
    real = torch.arange(one.shape[1])[None] < torch.tensor(taught.counts)[:, None]
    kl = ((one * (one.log() - other.log())).sum(-1) * real).sum(1)
    labels = taught.labels[:, 1:]
    nll = -q.log().gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return kl, (nll * (labels != IGNORED)).sum(1)


@settings(max_examples=25)
@given(st.sampled_from([2, 7, 40, 300]), st.integers(0, 1000), st.floats(0.1, 8), st.data())
def test_values_and_gradients(vocabulary: int, seed: int, scale: float, data: Any) -> None:
    """k = vocabulary is KL of the whole distributions."""
    k = data.draw(st.one_of(st.just(vocabulary), st.integers(1, vocabulary)))
    student, teacher, taught = make(vocabulary, k, seed, scale)
    weights = torch.tensor([[0.3, 1.5, -0.2], [0.7, 0.1, 2.0]], dtype=torch.float64)
    gradients, values = [], []
    for function in (taught_sums, lambda s, t: naive(s, teacher, t, k)):
        leaf = student.clone().requires_grad_()
        found = torch.stack(function(leaf, taught))
        (found * weights).sum().backward()
        assert leaf.grad is not None
        values.append(found.detach())
        gradients.append(leaf.grad)
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=2e-5)


def test_padding_and_the_last_token_have_no_gradient() -> None:
    student, _, taught = make(40, 5)
    leaf = student.clone().requires_grad_()
    torch.stack(taught_sums(leaf, taught)).sum().backward()
    assert leaf.grad is not None
    for row, length in enumerate(LENGTHS):
        assert not leaf.grad[row, length - 1 :].any()
        assert leaf.grad[row, : length - 1].any(-1).all()


def test_a_student_that_is_the_teacher_has_none() -> None:
    _, teacher, taught = make(300, 64)
    kl, _ = taught_sums(teacher, taught)
    assert bool((kl.abs() < 1e-5).all())
    rounded = Taught(taught.ids, taught.log_p.half(), taught.labels, taught.counts)
    kl, _ = taught_sums(teacher, rounded)  # as it is kept in a file
    assert bool((kl >= -1e-6).all())
    assert bool((kl < 1e-4).all())


@pytest.mark.parametrize("scale", [100.0, 3000.0])
def test_masses_that_vanish(scale: float) -> None:
    """The rest has no mass on one side, or on both, and everything stays finite."""
    student, teacher, taught = make(300, 4, scale=scale)
    leaf = student.clone().requires_grad_()
    kl, nll = taught_sums(leaf, taught)
    (kl.sum() + nll.sum()).backward()
    assert leaf.grad is not None
    assert bool(kl.isfinite().all())
    assert bool(leaf.grad.isfinite().all())
    kl, _ = taught_sums(teacher, taught)
    assert bool((kl.abs() < 1e-3).all())


def test_bfloat16_is_computed_in_float32() -> None:
    student, _, taught = make(300, 64)
    half = student.bfloat16()
    for found, expected in zip(
        taught_sums(half, taught), taught_sums(half.float(), taught), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_not_finite_is_seen() -> None:
    student, _, taught = make(40, 5)
    student[0, 0, 0] = float("nan")
    kl, _ = taught_sums(student, taught)
    assert [bool(each.isfinite()) for each in kl] == [False, True, True]


class Largest(TorchDispatchMode):
    """Counts the tensors made that have as many elements as the logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self._size, self._own = logits.numel(), logits.untyped_storage().data_ptr()
        self.made: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.numel() >= self._size:
            at = found.untyped_storage().data_ptr()
            if at != self._own:
                self.made.setdefault(at, str(func))
        return found


def test_one_tensor_is_made_beside_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_loss, "CHUNK_ELEMENTS", 600)
    student, _, taught = make(300, 8)
    leaf = student.requires_grad_()
    with Largest(leaf) as seen:
        kl, nll = taught_sums(leaf, taught)
        assert not seen.made
        torch.autograd.grad(kl.sum() + nll.sum(), leaf)
    assert list(seen.made.values()) == ["aten.zeros_like.default"]
