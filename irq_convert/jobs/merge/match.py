"""Adapter and artifact laid side by side: every key used, every target found, every shape right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from irq_convert.artifact.adapter import StoredAdapter
from irq_convert.artifact.adapter_statistics import StoredStatistics
from irq_convert.artifact.adapter_tokens import StoredTokens
from irq_convert.artifact.contents import Artifact
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.errors import IrqError, UsageError
from irq_convert.hf.model_names import ModelNames, model_names
from irq_convert.jobs.merge.beside import Vocabulary, match_whole
from irq_convert.jobs.merge.match_layers import Adapted, match_layer, match_tokens
from irq_convert.jobs.merge.match_statistics import match_statistics
from irq_convert.jobs.merge.ties import Tie, find_ties, stays_one

SHORT = 12
"""Letters of a hash that a message shows."""


@dataclass(frozen=True)
class Match:
    """By tensor of the artifact: layers that change it, and saved tensors that take its place.

    `every` are all layers of the adapter, those for a second name of a tied tensor too, whether or
    not the result has it. `bases` are what layers are added to instead of the artifact's tensor,
    where `vocabulary` has another size than the artifact's. `tokens` are rows that take the place
    of a tensor's. `untied` are ties of which the result writes each tensor, `added` those that the
    artifact does not have, by the name of the one that they were. `statistics` move scale and tau
    of packed tensors. `inside` is the module that the
    adapter's names begin in, "" for the model itself; None where names are otherwise.
    """

    layers: Mapping[str, Adapted]
    saved: Mapping[str, TensorInfo]
    every: Mapping[str, Adapted] = field(default_factory=dict)
    bases: Mapping[str, TensorInfo] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None
    tokens: Mapping[str, StoredTokens] = field(default_factory=dict)
    untied: tuple[Tie, ...] = ()
    added: Mapping[str, str] = field(default_factory=dict)
    inside: str | None = ""
    statistics: Mapping[str, StoredStatistics] = field(default_factory=dict)

    @property
    def rows(self) -> int | None:
        """Size of the vocabulary, where it is another than the artifact's."""
        return None if self.vocabulary is None else self.vocabulary.new


def check_base(
    adapter: StoredAdapter, identity: str, manifest: Mapping[str, Any] | None, any_base: bool
) -> None:
    """Refuse an adapter that belongs to another artifact, or that has been merged already.

    Raises `UsageError`; with `any_base` only for an adapter that this artifact already holds.
    """
    source = {} if manifest is None else manifest["source"]
    merged = source.get("adapters")
    for entry in merged if isinstance(merged, list) else ():
        if isinstance(entry, dict) and entry.get("sha256") == adapter.sha256:
            raise UsageError(
                f"{adapter.folder}: merged already: the artifact {identity[:SHORT]} is the result "
                f"of merging the adapter {adapter.sha256[:SHORT]}"
            )
    recorded = adapter.config.base_sha256
    if any_base or recorded == identity:
        return
    if recorded is None:
        raise UsageError(
            f"{adapter.folder}: does not say which base it was trained on; if it is the artifact "
            f"{identity[:SHORT]}, add --any-base"
        )
    raise UsageError(
        f"{adapter.folder}: trained on the artifact {recorded[:SHORT]}, this one is "
        f"{identity[:SHORT]}; give the one it was trained on (--any-base merges all the same)"
    )


def match(artifact: Artifact, adapter: StoredAdapter) -> Match:
    """Find what every tensor of `adapter` changes.

    Raises `IrqError`, naming module, tensor and shapes, for a module that the artifact lacks, one
    of the wrong shape, two for one tensor, a layer of another kind, and a layer that the adapter's
    settings target and its file leaves out.
    """
    modules = {*adapter.layers, *adapter.tokens}
    asked = sorted({f"{module}.weight" for module in modules} | {*adapter.statistics})
    asked += [*adapter.saved, *adapter.bases]
    names = model_names(artifact, asked)
    quantized = {tensor.name: tensor for tensor in artifact.quantized}
    copied = {info.name: info for info in artifact.copied}
    files: dict[str, Any] = {**quantized, **copied}
    ties = find_ties(names, asked, files)
    virtual = {n: tie.base for tie in ties for n in tie.names.values() if n not in files}
    files |= {name: files[base] for name, base in virtual.items()}
    whole = match_whole(artifact, adapter, names, files, ties)
    files |= whole.bases
    layers: dict[str, Adapted] = {}
    for layer in adapter.layers.values():
        found = match_layer(adapter, layer, names, files)
        if found.tensor in layers:
            raise _twice(adapter, layer.module, layers[found.tensor].layer.module, found.tensor)
        layers[found.tensor] = found
    tokens = {match_tokens(adapter, t, names, files): t for t in adapter.tokens.values()}
    for name in {*layers} & {*whole.saved} | {*tokens} & {*whole.saved, *layers}:
        raise IrqError(f"{adapter.folder}: {name} is changed in two ways: damaged")
    statistics = match_statistics(adapter, layers, names, files)
    _check_complete(adapter, names)
    found_all = Match(
        layers,
        whole.saved,
        layers,
        whole.bases,
        whole.vocabulary,
        tokens,
        statistics=statistics,
    )
    return _settled(adapter, names, ties, virtual, found_all)


def _twice(adapter: StoredAdapter, module: str, other: str, tensor: str) -> IrqError:
    return IrqError(
        f"{adapter.folder}: {module} and {other} both stand for {tensor}: the adapter is damaged"
    )


def _settled(
    adapter: StoredAdapter,
    names: ModelNames,
    ties: Sequence[Tie],
    virtual: Mapping[str, str],
    found: Match,
) -> Match:
    """`found` with the names of tied tensors that the result will have, and no others."""
    layers, saved, bases = dict(found.layers), dict(found.saved), dict(found.bases)
    tokens = dict(found.tokens)
    for tie in ties:
        shared = tokens.get(tie.embedding or "")
        if shared is not None and names.says_tied:  # PEFT ties such rows, and they alone
            for name in {*tie.names.values()} - {*layers, *saved, *tokens}:
                tokens[name] = shared
    untouched = {*bases} - {*layers, *saved, *tokens}
    saved |= {name: bases[name] for name in untouched}
    untied = []
    for tie in ties:
        changes = {n: layer.layer for n, layer in layers.items()} | saved | tokens
        if stays_one(adapter, tie, changes):
            for name in {*tie.names.values()} & {*virtual}:
                for each in (layers, saved, tokens, bases):
                    each.pop(name, None)
        else:
            untied.append(tie)
    there = {name for tie in untied for name in tie.names.values()}
    return replace(
        found,
        layers=layers,
        saved=saved,
        bases={name: info for name, info in bases.items() if name not in untouched},
        tokens=tokens,
        untied=tuple(untied),
        added={name: base for name, base in virtual.items() if name in there},
        inside=names.inside,
    )


def _check_complete(adapter: StoredAdapter, names: ModelNames) -> None:
    """Refuse an adapter whose settings name what the model has and the file has not."""
    matrices = {f"{module}.weight" for module in adapter.layers}
    there = {
        names.key(weight) for weight in (matrices if adapter.config.rank else adapter.statistics)
    }
    weights = {f"{module}.weight" for module in names.linears | names.embeddings}
    missing = [
        asked
        for weight in sorted((weights | names.stacks) - there)
        if adapter.config.targets(asked := names.as_asked(weight.rpartition(".")[0]))
    ]
    what = "target_modules"
    if not missing:
        what = "modules_to_save"
        missing = [
            wanted
            for wanted in adapter.config.modules_to_save
            if any(f".{module}".endswith(f".{wanted}") for module in names.kinds)
            and not any(adapter.config.is_saved(key, wanted) for key in adapter.saved)
        ]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise IrqError(
            f"{adapter.folder}: {what} names {missing[0]}{more}, but its file holds "
            "nothing for it: the adapter is incomplete: save or download it again"
        )


def check_folded_targets(artifact: Artifact, adapter: StoredAdapter, match: Match) -> None:
    """Refuse what stock PEFT would load as something else: it rewrites targets of some mixtures.

    Raises `UsageError` for a layer that it would take for a stack of experts, by its name.
    """
    from types import SimpleNamespace

    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config: Any = artifact.checkpoint.config or {}
    model: Any = SimpleNamespace(config=SimpleNamespace(model_type=config.get("model_type")))

    def rewritten(modules: list[str]) -> bool:
        plain = LoraConfig(target_modules=modules)
        try:
            convert_peft_config_for_transformers(plain, model=model, conversions=None)
        except ValueError:  # half of what it would stack
            return True
        return bool(plain.target_parameters)

    modules = [found.layer.module for found in match.every.values()]
    if rewritten(modules):
        taken = next((name for name in modules if rewritten([name])), modules[0])
        raise UsageError(
            f"{adapter.folder}: adapts {taken}, which PEFT would take for a part of stacked "
            "experts when it loads a plain LoRA: merge --to dense"
        )
