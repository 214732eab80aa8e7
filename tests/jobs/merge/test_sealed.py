"""A merged artifact's manifest holds the hash of itself, like that of a new one."""

from __future__ import annotations

from pathlib import Path

from irq_convert.artifact.manifest import SEAL, manifest_sha256
from irq_convert.artifact.verify import verify_artifact
from irq_convert.jobs.merge.merge import merge
from irq_convert.jobs.merge.options import Check, MergeOptions, MergeTo
from irq_convert.jobs.verify import verify
from tests.folders import assert_one_line, change_json, read_json

from .make import make_artifact, write_adapter

MANIFEST = "irq_manifest.json"


def test_a_merged_manifest_is_sealed_anew(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "art", "nf3")
    adapter = write_adapter(tmp_path / "adapter", artifact, kind="block")
    merge(artifact, adapter, tmp_path / "out", MergeOptions(to=MergeTo.IRQ, check=Check.LAYERS))
    base, merged = read_json(artifact / MANIFEST), read_json(tmp_path / "out" / MANIFEST)
    assert merged[SEAL] == manifest_sha256(merged) != base[SEAL]
    assert verify(tmp_path / "out").failures == ()
    change_json(
        tmp_path / "out" / MANIFEST, lambda m: m["source"]["adapters"][0].update(name="another")
    )
    assert_one_line(*verify_artifact(tmp_path / "out").failures, MANIFEST, SEAL)
