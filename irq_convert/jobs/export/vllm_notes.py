"""What vLLM 0.32 was seen not to load of a compressed-tensors folder: a line for each.

The folder is sound, and other readers take it, so nothing is refused; docs/export.md has the table
that tests/bench/compressed_tensors_vllm.py prints. The artifact itself vLLM takes in any case.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from irq_convert.artifact.structure import StoredTensor
from irq_convert.jobs.export.compressed_tensors_config import Kept

SERVED_BITS = 4
MULTIPLE = 32
"""Of rows and columns, for vLLM's kernel on CPUs."""
MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Matrices that vLLM makes one layer of."""
WAY_OUT = "serve the artifact itself (docs/serve.md)"


def vllm_notes(
    tensors: Sequence[StoredTensor], kept: Mapping[str, Kept], dense: Collection[str]
) -> tuple[str, ...]:
    """Lines for people; none where vLLM was seen to load such a folder.

    `tensors` are those that are packed, `kept` how, by module; `dense` are modules that are not.
    """
    return tuple(_lines(tensors, kept, dense))


def _lines(
    tensors: Sequence[StoredTensor], kept: Mapping[str, Kept], dense: Collection[str]
) -> Iterator[str]:
    widths = sorted({own.bits for own in kept.values()} - {SERVED_BITS})
    if widths:
        bits = " and ".join(map(str, widths))
        yield f"vLLM 0.32 does not load {bits} bits on CPUs, only 4: {WAY_OUT}"
    for tensor in tensors:
        rows, cols = tensor.shape.rows, tensor.shape.cols
        if rows % MULTIPLE or cols % MULTIPLE:
            yield (
                f"vLLM 0.32 does not load {tensor.name} {[rows, cols]} on CPUs: rows and columns "
                f"must be multiples of {MULTIPLE} there; {WAY_OUT}"
            )
            break
    for module in kept:
        unlike = _unlike(module, kept, dense)
        if unlike is not None:
            yield (
                f"vLLM 0.32 makes one layer of {module} and {unlike}, which are stored in "
                f"different ways, and does not load them: {WAY_OUT}"
            )
            break


def _unlike(module: str, kept: Mapping[str, Kept], dense: Collection[str]) -> str | None:
    """Another matrix of the layer that `module` is merged into, if it is not stored alike."""
    parent, dot, child = module.rpartition(".")
    for group in MERGED:
        if child not in group:
            continue
        for other in (parent + dot + name for name in group):
            if other in dense or kept.get(other, kept[module]) != kept[module]:
                return other
    return None
