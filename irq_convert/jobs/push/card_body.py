"""The body of a model card: how to load, how it was made, sizes, losses, checksums."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from irq_convert.artifact.adapter_kinds import IEC_LORA
from irq_convert.artifact.export_targets import TARGETS
from irq_convert.checkpoint.system import format_bytes
from irq_convert.jobs.push.card_scores import scores_part
from irq_convert.jobs.push.card_table import table
from irq_convert.jobs.push.command_again import command_again, option_flags
from irq_convert.jobs.push.pushed_folder import FolderKind, PushedFolder

WORST = 10


def card_body(
    subject: PushedFolder,
    repo_id: str,
    base_model: str | None,
    sums: Mapping[str, str],
    revision: str | None = None,
) -> str:
    """The part of the card that each push writes anew; `sums` are sha256 by file.

    `revision` is the branch that it is for, None for the main one.
    """
    parts = [f"# {repo_id.rpartition('/')[2]}", _intro(subject, base_model)]
    parts += ["## Load", _load(subject, repo_id, base_model, revision)]
    parts += _made(subject)
    if subject.kind in (FolderKind.ARTIFACT, FolderKind.MERGED):
        parts += _losses(subject)
    if subject.kind == FolderKind.ADAPTER:
        parts += _training(subject)
    parts += scores_part(subject.scores)
    parts += ["## Files", _files(subject, sums)]
    return "\n\n".join(part for part in parts if part)


def _intro(subject: PushedFolder, base_model: str | None) -> str:
    source = subject.source.get("model")
    name = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else source
    name = name or "a model"
    commit = subject.source.get("revision")
    at = f" (commit `{commit}`)" if commit and base_model == source else ""
    producer = subject.note.get("producer") or "irq-convert"
    if subject.kind == FolderKind.ARTIFACT:
        with_tables = subject.note["options"].get("include_embeddings") is True
        more = ", embeddings and head" if with_tables else ""
        return (
            f"{name}{at}, its linear layers{more} quantized to {_bits(subject)} bits by "
            f"`{producer}` (IR-QLoRA's information calibration, arXiv:2402.05445). It loads with "
            "transformers and stays trainable with LoRA."
        )
    if subject.kind == FolderKind.MERGED:
        return (
            f"{name}{at} with {_adapters(subject)} merged in by `{producer}`, its linear layers in "
            f"{_bits(subject)} bits. It loads with transformers and stays trainable with LoRA."
        )
    if subject.kind == FolderKind.DENSE:
        adapter = subject.note["adapter"].get("name", "an adapter")
        return f"{name}{at}, quantized, with the adapter `{adapter}` merged in by `{producer}`."
    if subject.kind == FolderKind.EXPORT:
        return f"{name}{at}, quantized and exported to {subject.target} by `{producer}`."
    kind = subject.adapter_kind.called
    made = f", made by `{subject.note['producer']}`" if subject.note.get("producer") else ""
    return f"A{'n' * kind.startswith('IEC')} {kind} adapter for {name}{made}."


def _bits(subject: PushedFolder) -> str:
    return " and ".join(map(str, subject.widths))


def _adapters(subject: PushedFolder) -> str:
    names = [f"`{each.get('name')}`" for each in subject.source.get("adapters") or ()]
    return f"the adapter{'s' if names[1:] else ''} " + ", ".join(names)


def _load(subject: PushedFolder, repo_id: str, base_model: str | None, revision: str | None) -> str:
    this = f'"{repo_id}"' + (f', revision="{revision}"' if revision else "")
    if subject.kind == FolderKind.ADAPTER:
        return _load_adapter(subject, this, base_model)
    target = TARGETS.get(subject.target or "")
    loaded = None if target is None else target.load(this, repo_id, subject.files)
    if loaded is not None:
        return loaded
    own = subject.kind in (FolderKind.ARTIFACT, FolderKind.MERGED)
    causal = any("ForCausalLM" in str(n) for n in subject.settings.get("architectures") or ())
    tokenizer = any(name.startswith("tokenizer") for name in subject.files)
    if own and not causal:
        return python("import irq_convert", "", f"model = irq_convert.load({this})")
    names = "AutoModelForCausalLM" if causal else "AutoModel"
    imports = f"from transformers import {names}" + (", AutoTokenizer" if tokenizer else "")
    lines = [f'model = {names}.from_pretrained({this}, dtype="auto")']
    if tokenizer:
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({this})")
    first = ["import irq_convert  # pip install irq-convert", imports] if own else [imports]
    if target is not None and target.install:
        first = [f"{imports}  # pip install {target.install}"]
    return python(*first, "", *lines)


def _load_adapter(subject: PushedFolder, this: str, base_model: str | None) -> str:
    plain = subject.settings.get("peft_type") != IEC_LORA
    base = base_model or "./the-artifact"
    text = python(
        *(() if plain else ("import irq_convert.adapters  # pip install irq-convert",)),
        "import irq_convert",
        "from peft import PeftModel",
        "",
        f'model = irq_convert.load("{base}")',
        f"model = PeftModel.from_pretrained(model, {this})",
    )
    if subject.base_sha256 and subject.artifact_id is None:
        name = f"artifact `{subject.base['model']}`" if subject.base.get("model") else "artifact"
        text = text.replace(f'"{base}"', '"./the-artifact"')
        identity = f"whose identity (sha256) is `{subject.base_sha256}`"
        text += f"\n\nIt was trained on the {name}, {identity}."
    return text


def python(*lines: str) -> str:
    """A block of Python."""
    return "\n".join(["```python", *lines, "```"])


def _made(subject: PushedFolder) -> list[str]:
    if subject.kind == FolderKind.ARTIFACT:
        return ["## How it was made", f"```\n{command_again(subject)}\n```"]
    if subject.kind in (FolderKind.MERGED, FolderKind.DENSE):
        return ["## How it was made", f"```\n{_merge_command(subject)}\n```"]
    if subject.kind == FolderKind.EXPORT:
        return ["## How it was made", f"```\n{_export_command(subject)}\n```"]
    return []


def _export_command(subject: PushedFolder) -> str:
    options = {k: v for k, v in subject.note["options"].items() if k != "max_shard_bytes"}
    words = ["irq-convert", "export", str(subject.base.get("model")), "OUT"]
    return shlex.join([*words, *option_flags(options)])


def _merge_command(subject: PushedFolder) -> str:
    options = {k: v for k, v in subject.note["options"].items() if k not in ("base", "refine")}
    options.pop("max_shard_bytes", None)
    if subject.kind == FolderKind.MERGED:
        base, adapter = subject.source.get("base") or {}, subject.source["adapters"][-1]
    else:
        base, adapter = subject.note.get("base") or {}, subject.note["adapter"]
    words = ["irq-convert", "merge", str(base.get("model")), str(adapter.get("name")), "OUT"]
    to = {"to": "irq" if subject.kind == FolderKind.MERGED else "dense"}
    known = ("to", "dtype", "tau", "objective", "min_survival")
    kept = {key: value for key, value in (to | options).items() if key in known}
    return shlex.join([*words, *option_flags(kept)])


def _losses(subject: PushedFolder) -> list[str]:
    totals, tensors = subject.note["totals"], subject.note["tensors"]
    size = sum(subject.sizes.values())
    share = totals["quantized_weights"] / max(1, totals["weights"])
    merged = subject.kind == FolderKind.MERGED
    of = "; of merged tensors to base plus adapter" if merged else ""
    facts = [
        ("size of all files", format_bytes(size)),
        ("weights", f"{totals['weights']:,}, of which {share:.1%} quantized"),
        ("bits per quantized weight", f"{totals['bits_per_weight']:.4f}"),
        ("entropy of the codes, plain", f"{totals['entropy_plain']:.4f} bits"),
        ("entropy of the codes, stored", f"{totals['entropy']:.4f} bits"),
        (f"squared error, of the weights' energy{of}", f"{totals['relative_error']:.6f}"),
        *_held_out(subject.note.get("calibration")),
    ]
    worst = sorted(tensors.items(), key=lambda item: (-item[1]["relative_error"], item[0]))
    rows = [
        (f"`{name}`", t["codebook"], f"{t['entropy']:.4f}", f"{t['relative_error']:.6f}")
        for name, t in worst[:WORST]
    ]
    return [
        "## Size and loss",
        table(("", ""), facts),
        f"Of {len(tensors)} quantized tensors, those with the largest error:",
        table(("tensor", "codebook", "entropy", "error"), rows),
        "What merged tensors had lost before stands in the manifest, under their `base`."
        if merged
        else "`irq-convert verify` recomputes these figures from the source.",
    ]


def _held_out(record: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What held-out windows said of a calibration."""
    if not record:
        return []
    tokens = record["windows"] * record["window"]
    found = [
        ("calibrated with", f"{record['text']}, {tokens:,} tokens"),
        ("KL to the source, held out", f"{record['kl']:.4f}, without data {record['plain']:.4f}"),
    ]
    return found if record["kept"] == "calibrated" else found[1:]


def _training(subject: PushedFolder) -> list[str]:
    training = subject.note.get("training") or {}
    losses = training.get("losses") or {}
    rank, alpha, moved = (subject.settings.get(key) for key in ("r", "lora_alpha", "statistics"))
    facts = [("rank, alpha", f"{rank}, {alpha}")] if rank else []
    facts += [("statistics", "scale and tau" if moved == "both" else moved)] if moved else []
    recipe = training.get("recipe") or {}
    facts += [
        (label, str(recipe[key]))
        for key, label in (
            ("steps", "steps"),
            ("batch_size", "batch size"),
            ("learning_rate", "learning rate"),
            ("sequence_length", "sequence length"),
            ("dropout", "dropout"),
            ("seed", "seed"),
            ("teacher", "teacher"),
            ("teacher_weight", "weight of KL to it"),
        )
        if recipe.get(key) is not None
    ]
    for key, label in (("heldout_before", "before"), ("heldout_after", "after")):
        found = losses.get(key)
        if found:
            value = f"{found['value']:.4f}" + (f" ± {found['se']:.4f}" if found.get("se") else "")
            measure = losses.get("measure", "loss")
            facts.append((f"held-out {measure} {label}", f"{value} nats a token"))
    curve = ["![loss](loss.png)"] if "loss.png" in subject.files else []
    return ["## Training", table(("", ""), facts), *curve]


def _files(subject: PushedFolder, sums: Mapping[str, str]) -> str:
    rows = [(f"`{name}`", f"{subject.sizes[name]:,}", f"`{sums[name]}`") for name in sorted(sums)]
    lines = ["<details><summary>sha256 of each file</summary>", "", table(_COLUMNS, rows), ""]
    return "\n".join([*lines, "</details>"])


_COLUMNS = ("file", "bytes", "sha256")
