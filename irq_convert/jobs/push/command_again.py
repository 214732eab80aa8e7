"""The command that makes an artifact again, from its manifest."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from irq_convert.core.codebook import get_codebook
from irq_convert.jobs.push.pushed_folder import PushedFolder


def command_again(subject: PushedFolder) -> str:
    """The command that makes this artifact again, with all that decides its bytes."""
    options = dict(subject.note["options"])
    words = ["irq-convert", "quantize", str(subject.source.get("model"))]
    if subject.source.get("revision"):
        words += ["--revision", str(subject.source["revision"])]
    book = get_codebook(str(options.pop("codebook", "")))
    target = options.pop("target", None)
    if target is None:
        words += ["--bits", str(book.bits), "--codebook", book.kind]
    else:
        options.pop("block_size", None)
        words += _target_flags(subject, target)
    size = options.pop("max_shard_bytes", None)
    for pattern, bits in options.pop("bits_for", ()):
        words += ["--bits-for", f"{pattern}={bits}"]
    words += _data_flags(subject, options)
    words += option_flags(options)
    if isinstance(size, int):
        words += ["--max-shard-size", repr(size / 1e9)]
    return shlex.join(words)


def _data_flags(subject: PushedFolder, options: dict[str, Any]) -> list[str]:
    """The flags of what the weights were fitted to, by the names of files; taken from `options`."""
    own = {key: options.pop(key) for key in list(options) if key.startswith(_CALIBRATION)}
    fitted, weighed = (subject.note.get(key) or {} for key in ("calibration", "importance"))
    words = ["--importance", str(weighed["file"])] if weighed.get("file") else []
    if not own or not fitted:
        return words
    words += ["--calibrate", str(fitted["text"])]
    asked = {f"{_CALIBRATION}{key}": own[f"{_CALIBRATION}{key}"] for key in ("tokens", "window")}
    words += option_flags(asked)
    return [*words, *option_flags({key: fitted[key] for key in ("seed", "correction", "damping")})]


def _target_flags(subject: PushedFolder, target: Mapping[str, Any]) -> list[str]:
    """The flags of a size that was asked for, by the name of its text."""
    found: dict[str, Any] = {"target-bits": target["bits"], "target-tokens": target["tokens"]}
    if target["size"] is not None:
        found = {"target-size": f"{target['size']}B", **found}
    text = (subject.note.get("target") or {}).get("text")
    if text not in (None, "self"):
        found["target-text"] = text
    found |= {"codebook": target["families"], "block-size": target["blocks"]}
    rules = [("uniform-within", target["within"])]
    for name in ("at_least", "at_most"):
        rules.append((name, [f"{pattern}={bits}" for pattern, bits in target[name]]))
    return list(option_flags(found | dict(rules)))


_CALIBRATION = "calibration_"


def option_flags(options: Mapping[str, Any]) -> Iterable[str]:
    """Options by their fields' names as a command line has them; None and False are left out."""
    for key, value in options.items():
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            yield from [flag] if value else []
        elif isinstance(value, list):
            for item in value:
                yield from (flag, str(item))
        elif value is not None:
            yield from (flag, str(value))
