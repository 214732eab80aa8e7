"""What quantizing is asked to do: one frozen object, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from irq_convert.checkpoint.meta_params import VERSIONS
from irq_convert.core.codebook import (
    CODEBOOKS,
    FAMILIES,
    FAMILIES_IN_WORDS,
    WIDTHS,
    WIDTHS_IN_WORDS,
    in_words,
)
from irq_convert.core.objective import Objective
from irq_convert.core.spec import QuantSpec
from irq_convert.errors import UsageError
from irq_convert.jobs.calibration.options import CalibrationOptions
from irq_convert.jobs.common.expressions import check_expression
from irq_convert.jobs.common.options import MAX_SHARD_BYTES, check_sizes, fix_choices
from irq_convert.jobs.common.resume import Resume
from irq_convert.jobs.sizing.options import TargetOptions, parse_size

TILE_WEIGHTS = 1 << 21


def codebook_name(family: str, bits: int, option: str = "--bits") -> str:
    """`("nf", 3)` to `"nf3"`; a full name such as `"int4"` has to agree with `bits`.

    Raises `UsageError` for bits that no codebook has, naming the `option` that gave them, and for
    an unknown family.
    """
    if bits not in WIDTHS:
        raise UsageError(f"{option} {bits}: weights are stored in {WIDTHS_IN_WORDS} bits")
    name = family if family in CODEBOOKS else f"{family}{bits}"
    if name not in CODEBOOKS:
        raise UsageError(f"--codebook {family}: choose {FAMILIES_IN_WORDS}")
    if CODEBOOKS[name].bits != bits:
        own = CODEBOOKS[name].bits
        raise UsageError(f"--codebook {family} has {own} bits, not {bits}: add --bits {own}")
    return name


@dataclass(frozen=True)
class QuantizeOptions:
    """Options of one run.

    `keep` are regular expressions of tensors to copy, `bits_for` pairs of an expression and a
    number of bits, the last match winning; both are searched for in the tensor's name. `threads`
    is for the search, None for all cores. `tile_weights` bounds memory and never changes a byte,
    `stream` the room that a Hub model takes: its files are deleted when they were read.
    `include_towers` quantizes the linear layers of vision and audio towers, too,
    `include_embeddings` the input embeddings and the output head. `llama_version` is
    asked for where Meta's own files do not tell it. `resume` says whether shards that an earlier
    run has left are used. `calibrate` fits the weights to a text, layer by layer; `importance` is
    a file that says how much each input column counts. `target` asks for a size: codebook and block
    size of `spec` then give way to the mix that damages least, and `bits_for` fixes bits.
    """

    spec: QuantSpec = field(default_factory=QuantSpec)
    keep: tuple[str, ...] = ()
    bits_for: tuple[tuple[str, int], ...] = ()
    include_towers: bool = False
    include_embeddings: bool = False
    device: str = "cpu"
    threads: int | None = None
    overwrite: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES
    tile_weights: int = TILE_WEIGHTS
    stream: bool = False
    llama_version: str | None = None
    resume: Resume = Resume.AUTO
    calibrate: CalibrationOptions | None = None
    importance: Path | None = None
    target: TargetOptions | None = None

    @classmethod
    def of(
        cls,
        *,
        bits: int | None = None,
        codebook: str | None = None,
        block_size: int | None = None,
        objective: str | None = None,
        refine: int = 0,
        zero_point: str = "float",
        calibrate: CalibrationOptions | str | Path | None = None,
        importance: Path | str | None = None,
        target: TargetOptions | str | float | None = None,
        **others: Any,
    ) -> QuantizeOptions:
        """Options with their spec in a person's words: `bits=3, codebook="nf"`.

        `codebook` is a family, or a full name, which says the bits itself; "nf" and 4 bits by
        default. With a `target`, a size such as "3.5GB" or a number of bits, there are no `bits`,
        and codebook and block size limit its choices.
        `objective` None is what is best for the codebook, and squared error where inputs weigh it.
        `calibrate` may be the name of a text alone. `others` are the fields of this class.
        Raises `UsageError` as `codebook_name`, `QuantSpec` and this class do.
        """
        if isinstance(calibrate, str | Path):
            calibrate = CalibrationOptions(str(calibrate))
        others["calibrate"] = calibrate
        others["importance"] = None if importance is None else Path(importance)
        if isinstance(target, str):
            target = TargetOptions(size=parse_size(target))
        elif isinstance(target, int | float):
            target = TargetOptions(bits=target)
        others["target"] = target
        if "spec" in others:
            return cls(**others)
        if target is not None:
            others["target"] = _limited(target, bits, codebook, block_size)
        if codebook is None:
            codebook = "int" if target is not None and zero_point == "integer" else "nf"
        if bits is None:
            bits = CODEBOOKS[codebook].bits if codebook in CODEBOOKS else 4
        name = codebook_name(codebook, bits)
        plain = calibrate is None and importance is None and target is None
        best = "auto" if plain else Objective.MSE
        spec = QuantSpec(name, block_size or 64, objective or best, refine, zero_point)
        return cls(spec=spec, **others)

    def __post_init__(self) -> None:
        fix_choices(self, resume=Resume)
        for pattern in self.keep:
            check_expression("--keep", pattern)
        for pattern, bits in self.bits_for:
            check_expression("--bits-for", pattern)
            codebook_name(self.spec.book.kind, bits, f"--bits-for {pattern!r} =")
        check_sizes(self.threads, self.max_shard_bytes, self.tile_weights)
        if self.llama_version not in (None, *VERSIONS):
            raise UsageError(f"--llama-version {self.llama_version}: choose {in_words(VERSIONS)}")
        if self.calibrate is not None and self.importance is not None:
            raise UsageError(
                "--calibrate measures the importance of columns itself: leave out --importance"
            )
        weighs = self.spec.objective != Objective.NONE or self.spec.refine > 0
        if self.importance is not None and not weighs:
            raise UsageError(
                "--objective none without --refine looks at no error that --importance could "
                "weigh: leave out one of them"
            )

    @property
    def computes_first(self) -> bool:
        """Whether a run computes for long before its first shard."""
        return self.calibrate is not None or self.target is not None

    def to_dict(self) -> dict[str, object]:
        """What decides the bytes of the artifact, for the manifest."""
        own = {} if self.calibrate is None else self.calibrate.to_dict()
        calibration = {f"calibration_{name}": value for name, value in own.items()}
        target = {} if self.target is None else {"target": self.target.to_dict()}
        return {
            **calibration,
            **target,
            "codebook": self.spec.codebook,
            "block_size": self.spec.block_size,
            "objective": self.spec.objective,
            "refine": self.spec.refine,
            "zero_point": self.spec.zero_point,
            "keep": list(self.keep),
            "bits_for": [list(pair) for pair in self.bits_for],
            "include_towers": self.include_towers,
            **({"include_embeddings": True} if self.include_embeddings else {}),
            **({"llama_version": self.llama_version} if self.llama_version else {}),
            "max_shard_bytes": self.max_shard_bytes,
        }


def _limited(
    target: TargetOptions, bits: int | None, codebook: str | None, block_size: int | None
) -> TargetOptions:
    """`target` with what else is asked of its choices."""
    if bits is not None:
        raise UsageError(
            f"--bits {bits} and a target: the target chooses the bits; fix single weights by "
            "--bits-for, --at-least or --at-most"
        )
    if codebook is not None and codebook not in FAMILIES:
        raise UsageError(f"--codebook {codebook}: with a target, choose {FAMILIES_IN_WORDS}")
    return replace(
        target,
        families=target.families if codebook is None else (codebook,),
        blocks=target.blocks if block_size is None else (block_size,),
    )
