"""The entry point `vllm.general_plugins`: teaching vLLM the quantization method "irq"."""

from __future__ import annotations

import logging

TRIED = ("0.32",)
"""Versions of vLLM, by major and minor number, that tests/bench/serve_check.py has passed with."""


def register() -> None:
    """Add the quantization method "irq" to vLLM; doing it again changes nothing.

    Every process of vLLM calls it. Never raises: a server of another model must not suffer, and
    another version of vLLM is told in one line which ones were tried.
    """
    log = logging.getLogger("irq_convert")
    try:
        from irq_convert.vllm.config import add_method

        version = add_method()
    except Exception as error:  # any failure of a foreign import, or of its private parts
        log.warning(
            "this vLLM cannot serve irq artifacts (%s: %s): tried was vLLM %s",
            type(error).__name__,
            str(error).partition("\n")[0],
            ", ".join(TRIED),
        )
        return
    if not version.startswith(tuple(f"{each}." for each in TRIED)):
        log.info("irq artifacts were tried with vLLM %s, this is %s", ", ".join(TRIED), version)
