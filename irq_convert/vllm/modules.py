"""The modules of an artifact's files under the names that vLLM has for them: formats, merged names.

vLLM builds a model before it reads a tensor, so what is packed has to be known by name: from the
configuration, and from the headers of the files where those could be read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from irq_convert.artifact.config import ModuleFormat, QuantizationConfig, module_name
from irq_convert.artifact.head import EMBEDDINGS
from irq_convert.core.statistic_dtypes import UINT8
from irq_convert.errors import IrqError


@dataclass(frozen=True)
class StoredModules:
    """An artifact's configuration, and the modules that its files hold, `packed` those quantized.

    Both sets are None where no header could be read. Names are vLLM's once `renamed`.
    """

    config: QuantizationConfig
    stored: frozenset[str] | None = None
    packed: frozenset[str] | None = None

    def with_tensors(self, dtypes: Mapping[str, str]) -> StoredModules:
        """With the tensors of the files, by name the dtype as safetensors spells it.

        A tensor is quantized by formats/irq-v1.md, section 3: U8, beside a scale and a tau.
        """
        packed = {
            module_name(name)
            for name, dtype in dtypes.items()
            if dtype == UINT8.safetensors and {f"{name}_scale", f"{name}_tau"} <= dtypes.keys()
        }
        return replace(self, stored=frozenset(map(module_name, dtypes)), packed=frozenset(packed))

    def renamed(self, rename: Callable[[str], str | None]) -> StoredModules:
        """With every module's name given by `rename`, which returns None for what vLLM drops."""

        def names(old: frozenset[str] | tuple[str, ...]) -> list[str]:
            return [new for name in old if (new := rename(name)) is not None]

        overrides = {rename(name): own for name, own in self.config.overrides.items()}
        config = QuantizationConfig(
            self.config.default,
            tuple(names(self.config.modules_to_not_convert)),
            {name: own for name, own in overrides.items() if name is not None},
            self.config.meta,
        )
        stored, packed = (
            None if old is None else frozenset(names(old)) for old in (self.stored, self.packed)
        )
        return StoredModules(config, stored, packed)

    def format_of(self, name: str) -> ModuleFormat | None:
        """How the weight of linear module `name` is packed; None where it is dense.

        Raises `IrqError` for one that is stored transposed: vLLM's models turn such weights as they
        load them.
        """
        if self.packed is None:
            dense = name in self.config.dense_modules
        else:
            dense = name not in self.packed
        if dense:
            return None
        own = self.config.module(name)
        if own.transposed:
            raise IrqError(
                f"{name} is stored transposed, which vLLM's models turn as they load: serve this "
                "model with transformers, or convert it with this layer left dense (--keep)"
            )
        return own

    def matrices(self, prefix: str, merged: Mapping[str, list[str]]) -> tuple[str, ...]:
        """Modules of the files that vLLM's layer `prefix` is made of, in their order.

        `merged` has the last parts of their names by that of the layer, as a model's
        `packed_modules_mapping`. A layer that the files have under its own name is one of theirs.
        """
        parent, dot, child = prefix.rpartition(".")
        if child not in merged or (self.stored is not None and prefix in self.stored):
            return (prefix,)
        return tuple(parent + dot + each for each in merged[child])

    def table(self, prefix: str, head: bool) -> tuple[str, ModuleFormat] | None:
        """Name and format of an embedding's or a `head`'s packed weight; None where it is dense.

        Some models build their embeddings without a name, and a tied head has no tensor: it is the
        embedding's.
        """
        if self.packed is None or self.stored is None:
            return None
        name: str | None = prefix
        if prefix not in self.stored:
            found = [each for each in self.packed if each.rpartition(".")[2] in EMBEDDINGS]
            name = found[0] if len(found) == 1 and (head or not prefix) else None
        fmt = None if name is None else self.format_of(name)
        return None if name is None or fmt is None else (name, fmt)
