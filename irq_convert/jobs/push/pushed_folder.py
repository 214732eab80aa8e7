"""What a folder that is to be pushed holds: an artifact, a merged or exported model, an adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from irq_convert.artifact.adapter_config import CONFIG_FILE, NOTE_FILE, WEIGHTS_FILE
from irq_convert.artifact.adapter_kinds import AdapterKind, kind_of
from irq_convert.artifact.checksums import list_files
from irq_convert.artifact.manifest import CARD_NAME, MANIFEST_NAME, read_manifest
from irq_convert.artifact.results import EXPORT_NAME, MERGE_NAME
from irq_convert.artifact.scores import read_scores
from irq_convert.checkpoint.json_files import read_json_object
from irq_convert.checkpoint.layout import LOCK_NAME, PICKLE_SUFFIXES, SCORES_NAME
from irq_convert.checkpoint.system import os_errors
from irq_convert.core.codebook import CODEBOOKS
from irq_convert.errors import UsageError
from irq_convert.jobs.push.local_paths import FILES, is_local, without_paths

_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


class FolderKind(StrEnum):
    """What is pushed."""

    ARTIFACT = "artifact"
    MERGED = "merged artifact"
    DENSE = "merged model"
    EXPORT = "exported model"
    ADAPTER = "adapter"


RELATIONS = {
    FolderKind.ARTIFACT: "quantized",
    FolderKind.MERGED: "finetune",
    FolderKind.DENSE: "finetune",
    FolderKind.EXPORT: "quantized",
    FolderKind.ADAPTER: "adapter",
}
"""The Hub's word for how each is related to its base model."""
RECORDS = {
    FolderKind.ARTIFACT: (MANIFEST_NAME,),
    FolderKind.MERGED: (MANIFEST_NAME,),
    FolderKind.DENSE: (MERGE_NAME,),
    FolderKind.EXPORT: (EXPORT_NAME,),
    FolderKind.ADAPTER: (NOTE_FILE, CONFIG_FILE),
}
"""Files of which each says that a folder or repository is of this kind."""


@dataclass(frozen=True)
class PushedFolder:
    """A folder to push: `files` are relative paths without the card, `note` is its record.

    `note` is the manifest of an artifact, `irq_merge.json`, `irq_export.json` or
    `irq_adapter.json`; empty where there is none. `settings` is config.json or adapter_config.json.
    """

    folder: Path
    kind: FolderKind
    files: tuple[str, ...]
    note: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def relation(self) -> str:
        if self.kind == FolderKind.EXPORT and self.source.get("adapters"):
            return RELATIONS[FolderKind.MERGED]
        return RELATIONS[self.kind]

    @property
    def source(self) -> Mapping[str, Any]:
        """The original model, as the record of the artifact names it: `model`, `revision`."""
        if self.kind in (FolderKind.ARTIFACT, FolderKind.MERGED):
            return self.note.get("source") or {}
        return self.base.get("source") or {}

    @property
    def base(self) -> Mapping[str, Any]:
        """The artifact that this was made from: `model`, its folder's name, `sha256`, `source`."""
        return self.note.get("artifact" if self.kind == FolderKind.EXPORT else "base") or {}

    @property
    def target(self) -> str | None:
        """What an export is for, by the name of its target; None of other folders."""
        options = self.note.get("options") or {}
        return str(options.get("to")) if self.kind == FolderKind.EXPORT else None

    @property
    def base_model(self) -> str | None:
        """The Hub id of the base model; None where it is not known to be on the Hub."""
        if self.kind == FolderKind.ADAPTER and self.artifact_id is not None:
            return self.artifact_id
        named = self.settings.get("base_model_name_or_path")
        if self.kind == FolderKind.ADAPTER and not self.source and not is_local(named):
            return named if isinstance(named, str) and _ID.fullmatch(named) else None
        model, revision = self.source.get("model"), self.source.get("revision")
        known = isinstance(revision, str) and _COMMIT.fullmatch(revision)
        return model if known and isinstance(model, str) else None

    @property
    def artifact_id(self) -> str | None:
        """The Hub id of the artifact that an adapter was trained on, where it came from there."""
        name = self.base.get("model")
        return name if isinstance(name, str) and _ID.fullmatch(name) else None

    @property
    def adapter_kind(self) -> AdapterKind:
        """Of an adapter: as it was noted, else by its settings."""
        noted = self.note.get("lora")
        return AdapterKind(noted) if noted in set(AdapterKind) else kind_of(self.settings)

    @property
    def codebooks(self) -> list[str]:
        """Of an artifact: names of the codebooks that its tensors have."""
        return sorted({str(tensor["codebook"]) for tensor in self.note["tensors"].values()})

    @property
    def widths(self) -> list[int]:
        """Of an artifact: the bits of its codes."""
        return sorted({CODEBOOKS[book].bits for book in self.codebooks if book in CODEBOOKS})

    @property
    def base_sha256(self) -> str | None:
        """Of an adapter: the identity of the artifact that it was trained on, where it is known."""
        found = self.base.get("sha256") or self.settings.get("base_sha256")
        return found if isinstance(found, str) else None

    @cached_property
    def scores(self) -> Sequence[Mapping[str, Any]]:
        """What `eval --tasks` has measured of these weights, as it was kept beside them."""
        return read_scores(self.folder)

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """Paths of this machine that the files of an adapter name as their base, each once."""
        found = [path for _, paths in self._without_paths.values() for path in paths]
        return tuple(dict.fromkeys(found))

    @cached_property
    def _without_paths(self) -> Mapping[str, tuple[bytes, list[str]]]:
        """Only adapters: everything else has a record that names files by their checksums."""
        if self.kind != FolderKind.ADAPTER:
            return {}
        with os_errors("read it", self.folder):
            cut = {
                n: without_paths((self.folder / n).read_bytes()) for n in self.files if n in FILES
            }
        return {name: (content, paths) for name, (content, paths) in cut.items() if paths}

    def content(self, name: str) -> Path | bytes:
        """What is sent as the file `name`: that file, or its bytes without paths."""
        cut = self._without_paths.get(name)
        return self.folder / name if cut is None else cut[0]

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Bytes that are sent of each file."""
        with os_errors("look at its files", self.folder):
            return {name: content_bytes(self.content(name)) for name in self.files}

    @cached_property
    def local_card(self) -> str | None:
        """The text of the folder's own README.md."""
        path = self.folder / CARD_NAME
        with os_errors("read it", path):
            return path.read_bytes().decode("utf-8", "replace") if path.is_file() else None


def content_bytes(content: Path | bytes) -> int:
    """Length of what is sent."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def open_pushed_folder(folder: Path) -> PushedFolder:
    """Tell what `folder` is, from its small files.

    Raises `UsageError` for a folder of another kind or of an unfinished run, and `IrqError` when a
    file of it cannot be read.
    """
    folder = Path(folder)
    with os_errors("look at it", folder):
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder; give an artifact, an adapter or a model")
        _check_finished(folder)
        files = [name for name in list_files(folder) if name != CARD_NAME]
        files += [SCORES_NAME] if read_scores(folder) else []
    if MANIFEST_NAME in files:
        manifest = read_manifest(folder)
        kind = FolderKind.MERGED if manifest["source"].get("adapters") else FolderKind.ARTIFACT
        return PushedFolder(folder, kind, tuple(files), manifest, _settings(folder, "config.json"))
    if MERGE_NAME in files:
        note = read_json_object(folder / MERGE_NAME)
        return PushedFolder(
            folder, FolderKind.DENSE, tuple(files), note, _settings(folder, "config.json")
        )
    if EXPORT_NAME in files:
        note = read_json_object(folder / EXPORT_NAME)
        settings = _settings(folder, "config.json")
        return PushedFolder(folder, FolderKind.EXPORT, tuple(files), note, settings)
    if CONFIG_FILE in files and WEIGHTS_FILE in files:
        note = read_json_object(folder / NOTE_FILE) if NOTE_FILE in files else {}
        wanted = [n for n in files if "/" not in n and not n.lower().endswith(PICKLE_SUFFIXES)]
        return PushedFolder(
            folder, FolderKind.ADAPTER, tuple(wanted), note, _settings(folder, CONFIG_FILE)
        )
    raise UsageError(
        f"{folder}: no artifact ({MANIFEST_NAME}), adapter ({CONFIG_FILE}), merged ({MERGE_NAME}) "
        f"or exported model ({EXPORT_NAME}); give what quantize, finetune, merge or export has "
        "written"
    )


def _check_finished(folder: Path) -> None:
    real = folder.resolve()
    if real.name.endswith(".partial") or (real / LOCK_NAME).exists():
        raise UsageError(f"{folder}: of a run that is not finished; let it finish, then push that")
    unfinished = next(real.glob(".*.tmp-*"), None) or next(real.glob("*.partial"), None)
    if unfinished is not None:
        raise UsageError(f"{unfinished}: left by a run that was killed; remove it before pushing")


def _settings(folder: Path, name: str) -> Mapping[str, Any]:
    return read_json_object(folder / name) if (folder / name).is_file() else {}
