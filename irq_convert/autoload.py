"""Registering with transformers and PEFT at the moment they themselves are imported.

Neither has a discovery of plugins, but torch has: `install` is an entry point of the group
`torch.backends`, which `import torch` calls, so that a program that knows nothing of this package
loads artifacts (`TORCH_DEVICE_BACKEND_AUTOLOAD=0` turns that off). A finder on `sys.meta_path` lets
the module that holds transformers' quantizers, and PEFT, load as usual and registers the
quantization method "irq" and the adapter type "IEC_LORA" right after, so that no package has to be
imported before the other and importing this one stays cheap.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

QUANT_METHOD = "irq"
TARGET = "transformers.quantizers.auto"
PEFT = "peft"


class _Finder:
    """Finds nothing itself: wraps the loaders that the other finders give for the targets."""

    irq_convert = True  # known by a mark: a reloaded module has another class of this name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        register_it = _REGISTER.get(fullname)
        if register_it is None:
            return None
        for finder in list(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            if _is_ours(finder) or find is None:
                continue
            spec = find(fullname, path, target)
            if spec is not None:
                _register_after(spec, register_it)
                return spec
        return None


class _Late(ModuleType):
    """A target that was already on its way when this came, as where it is what imports torch.

    No loader can be wrapped any more, so the first look at the module after its import registers.
    """

    def __getattribute__(self, name: str) -> Any:
        spec = ModuleType.__getattribute__(self, "__spec__")
        if not getattr(spec, "_initializing", False):
            self.__class__ = ModuleType  # type: ignore[assignment]
            _REGISTER[spec.name](self)
        return ModuleType.__getattribute__(self, name)  # no super(): it may be a _Late no more


def _is_ours(finder: object) -> bool:
    return getattr(finder, "irq_convert", False) is True


def _register_after(spec: ModuleSpec, register_it: Callable[[ModuleType], None]) -> None:
    loader = spec.loader
    execute = getattr(loader, "exec_module", None)
    if execute is None:
        return

    def exec_module(module: ModuleType) -> None:
        execute(module)
        register_it(module)

    try:
        loader.exec_module = exec_module  # type: ignore[union-attr, method-assign]
    except AttributeError:  # a loader without instance attributes: left as it is
        return


def register_quantizer(module: ModuleType) -> None:
    """Add the quantizer and its configuration to `module`, `transformers.quantizers.auto`.

    Doing it again changes nothing. Never raises: whoever imports transformers for something else
    must not suffer, and loading an artifact without a quantizer fails by itself.
    """
    try:
        if _half_imported():
            return
        ours = import_module("irq_convert.hf.quantizer")
        module.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, ours.IrqConfig)
        module.AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, ours.IrqQuantizer)
    except Exception as error:  # any failure of a foreign import
        import logging

        logging.getLogger("irq_convert").warning(
            "this version of transformers cannot load irq artifacts: %s: %s",
            type(error).__name__,
            error,
        )


def register_peft(module: ModuleType) -> None:
    """Add the type "IEC_LORA" to `module`, PEFT. Never raises, as `register_quantizer`."""
    try:
        if not _half_imported():
            import_module("irq_convert.adapters.register").register()
    except Exception as error:  # any failure of a foreign import, or of its private parts
        import logging

        logging.getLogger("irq_convert").warning(
            "this version of PEFT cannot load IEC-LoRA adapters: %s: %s",
            type(error).__name__,
            error,
        )


_OURS = {
    "irq_convert.hf.quantizer": "IrqQuantizer",
    "irq_convert.adapters.config": "IecLoraConfig",
    "irq_convert.adapters.layer": "IecLoraLinear",
    "irq_convert.adapters.model": "IecLoraModel",
    "irq_convert.adapters.peft_type": "iec_lora",
    "irq_convert.adapters.register": "register",
}
"""Modules that registering needs, and what each has when it is complete.

Where importing one of them is what first imported transformers or PEFT, it is half imported at that
moment; then registering is done when it is complete.
"""


def _half_imported() -> bool:
    found = ((sys.modules.get(name), what) for name, what in _OURS.items())
    return any(module is not None and not hasattr(module, what) for module, what in found)


_REGISTER = {TARGET: register_quantizer, PEFT: register_peft} | dict.fromkeys(
    _OURS, lambda module: install()
)


def install() -> None:
    """Register now with what is loaded, otherwise once it is; idempotent."""
    for name in (TARGET, PEFT):
        module = sys.modules.get(name)
        if module is None:
            continue
        if not getattr(module.__spec__, "_initializing", False):
            _REGISTER[name](module)
        elif type(module) is ModuleType:
            module.__class__ = _Late
    if not any(_is_ours(finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
