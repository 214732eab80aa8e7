"""transformers' rules of loading and saving, adjusted to packed tensors.

Its converters merge or rearrange tensors that are packed here, and its renamings go by whole names,
so that `x.weight` moves and `x.weight_scale` stays. transformers keeps the rules that it loaded
with and turns them round to save, so these do both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.core_model_loading import Transpose, WeightConverter, WeightRenaming


@dataclass(frozen=True)
class Adjusted:
    """What differs from stock rules.

    `spared`: names in the model that nothing may merge or rearrange. `parts`: names in the files of
    parts that stock renamings would leave behind, with their names in the model. `prefix` is the
    base model's.
    """

    spared: frozenset[str]
    prefix: str
    parts: Mapping[str, str] = field(default_factory=dict)


def adjust(transforms: list[Any], adjusted: Adjusted | None) -> list[Any]:
    """`transforms` with what `adjusted` says."""
    if adjusted is None:
        return transforms
    for transform in transforms:
        if isinstance(transform, WeightConverter):
            transform.operations = [_remembering(each) for each in transform.operations]
    if adjusted.spared:
        names, prefix = Names(adjusted.spared), adjusted.prefix
        transforms = [
            SparingConverter.of(t, names, prefix) if type(t) is WeightConverter else t
            for t in transforms
        ]
    return [PartRenaming.of(adjusted.parts), *transforms] if adjusted.parts else transforms


class Names(frozenset[str]):
    """Many names that copies of a converter share."""

    def __deepcopy__(self, memo: Any) -> Names:
        return self


def _remembering(operation: Any) -> Any:
    """A transposition that depends on the file's layout, so that saving goes back to it."""
    depends = type(operation) is Transpose and operation.check_dims
    return RememberedTranspose.of(operation, Turned()) if depends else operation


class Turned(set[str]):
    """Names of parameters that were transposed while loading, shared by copies of a rule."""

    def __deepcopy__(self, memo: Any) -> Turned:
        return self


class RememberedTranspose(Transpose):
    """transformers' `Transpose` that checks dimensions, both ways.

    Stock, it transposes what a file has the other way round than the class, and leaves it so when
    saving, since by then nothing differs.
    """

    turned: Turned
    back: bool

    @classmethod
    def of(cls, stock: Any, turned: Turned, back: bool = False) -> RememberedTranspose:
        """`stock` with `turned` noted, or gone by on the way `back`."""
        made = cls(stock.dim0, stock.dim1, check_dims=not back)
        made.turned, made.back = turned, back
        return made

    def convert(  # type: ignore[override]
        self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any
    ) -> Any:
        """The tensor as the class has it, or on the way back as the file had it."""
        name = kwargs["full_layer_name"]
        tensors = next(iter(input_dict.values()))
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        if self.back and name not in self.turned:
            return {self.get_target_pattern(input_dict, source_patterns, target_patterns): tensor}
        stock: Any = super().convert
        found = stock(input_dict, source_patterns, target_patterns, **kwargs)
        if not self.back and next(iter(found.values())) is not tensor:
            self.turned.add(name)
        return found

    @property
    def reverse_op(self) -> RememberedTranspose:
        """The way back, for saving."""
        return RememberedTranspose.of(self, self.turned, not self.back)


class SparingConverter(WeightConverter):
    """A converter of transformers that leaves some tensors as they are: packed ones.

    transformers copies it for each parameter and reverses it to save, so `spared` speaks of the
    names in the model, which are the same both ways.
    """

    __slots__ = ("prefix", "spared")
    prefix: str
    spared: Names

    @classmethod
    def of(cls, converter: WeightConverter, spared: Names, prefix: str) -> SparingConverter:
        """`converter` with another rule of what it takes; `prefix` is the base model's."""
        sources, targets = converter._original_source_patterns, converter._original_target_patterns
        made = cls(list(sources), list(targets), list(converter.operations), converter.force_cpu)
        made.scope_prefix = converter.scope_prefix
        made.base_model_prefix = converter.base_model_prefix
        made.spared, made.prefix = spared, f"{prefix}."
        return made

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The key unchanged where it, with the base model's prefix or without, is spared."""
        prefix = self.prefix
        names = (source_key, prefix + source_key, source_key.removeprefix(prefix))
        if any(name in self.spared for name in names):
            return source_key, None
        found: tuple[str, str | None] = super().rename_source_key(source_key)
        return found

    def copy(self, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> SparingConverter:
        """Also what reversing makes."""
        made = super().copy(source_patterns, target_patterns, **kwargs)
        assert isinstance(made, SparingConverter)
        made.spared, made.prefix = self.spared, self.prefix
        return made


class PartRenaming(WeightRenaming):
    """Gives single tensors their names, and back: `back` is filled in once a model is loaded."""

    __slots__ = ("back", "names")
    back: Mapping[str, str]
    names: Mapping[str, str]

    @classmethod
    def of(cls, names: Mapping[str, str], back: Mapping[str, str] | None = None) -> PartRenaming:
        """A renaming by `names`; turned round, by `back`."""
        made = cls(["irq parts"], ["irq parts"])
        made.names, made.back = names, back or {}
        return made

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The name of a tensor that is listed, any other as it is."""
        if source_key not in self.names:
            return source_key, None
        self._was_used = True
        return self.names[source_key], source_key

    def reverse_transform(self) -> PartRenaming:
        """The way back, for saving."""
        return PartRenaming.of(self.back, self.names)
