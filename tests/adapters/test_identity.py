"""Which artifact an adapter belongs to: the hash, and where it is recorded."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import pytest
from peft import PeftModel, get_peft_model

import irq_convert
from irq_convert import IecLoraConfig
from irq_convert.artifact.identity import artifact_identity
from irq_convert.errors import IrqError
from irq_convert.hf.identity import artifact_folder, model_identity
from irq_convert.jobs.quantize.quantize import quantize
from tests.hf.artifact import NF4, write_artifact
from tests.tiny import tiny_model

from .helpers import adapted_model, artifact, iec_config


def by_hand(folder: Path) -> str:
    lines = [
        f"{file.name}\t{hashlib.sha256(file.read_bytes()).hexdigest()}\n"
        for file in sorted(folder.glob("*.safetensors"))
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real artifact with its manifest, made by the converter."""
    folder = tmp_path_factory.mktemp("converted")
    tiny_model().save_pretrained(folder / "source")
    quantize(str(folder / "source"), folder / "out")
    return folder / "out"


@pytest.mark.parametrize("shards", [1, 3])
def test_hash_of_names_and_checksums(tmp_path: Path, shards: int) -> None:
    write_artifact(tmp_path, tiny_model(), shards=shards)
    assert artifact_identity(tmp_path) == by_hand(tmp_path)


def test_it_changes_with_the_weights_and_with_nothing_else(tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("a", "b", "c"))
    for folder, seed in ((first, 0), (second, 0), (other, 1)):
        write_artifact(folder, tiny_model(seed=seed))
    (second / "README.md").write_text("another file")
    assert artifact_identity(first) == artifact_identity(second)
    assert artifact_identity(first) != artifact_identity(other)


def test_the_manifest_saves_reading_the_weights(
    converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = by_hand(converted)

    def read(path: Path) -> str:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr("irq_convert.artifact.identity.sha256_file", read)
    assert artifact_identity(converted) == wanted


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(IrqError):
        artifact_identity(tmp_path / "nothing")


def test_identity_of_a_model(tmp_path: Path) -> None:
    model = irq_convert.load(artifact(tmp_path))
    assert artifact_folder(model) == tmp_path
    assert model_identity(model) == artifact_identity(tmp_path)
    assert model_identity(tiny_model()) is None
    assert model_identity(object()) is None


def test_a_folder_that_has_gone(tmp_path: Path) -> None:
    model = irq_convert.load(artifact(tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    assert model_identity(model) is None
    (tmp_path / "here").mkdir()
    assert model_identity(model) is None
    (tmp_path / "here" / "irq_manifest.json").write_text("{")
    assert model_identity(model) is None


def test_a_hub_id_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = irq_convert.load(artifact(tmp_path))
    model.name_or_path = "nobody/nothing-like-this"
    assert artifact_folder(model) is None
    assert model_identity(model) is None


@pytest.mark.parametrize("how", ["attach", "get_peft_model"])
def test_the_base_is_recorded(tmp_path: Path, how: str) -> None:
    model = irq_convert.load(artifact(tmp_path))
    peft_model = (
        irq_convert.attach(model, iec_config())
        if how == "attach"
        else get_peft_model(model, iec_config())
    )
    peft_model.save_pretrained(tmp_path / "adapter")
    raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert raw["base_sha256"] == artifact_identity(tmp_path)


def test_one_configuration_for_several_bases(tmp_path: Path) -> None:
    config = IecLoraConfig(r=4)
    for seed in (0, 1):
        folder = artifact(tmp_path / str(seed), seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model = irq_convert.attach(irq_convert.load(folder), config)
        assert model.peft_config["default"].base_sha256 == artifact_identity(folder)
    assert config.base_sha256 is None
    assert config.target_modules is None


def test_an_adapter_on_its_own_base_does_not_warn(tmp_path: Path) -> None:
    adapted_model(artifact(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "moved")  # the place does not matter
    model = irq_convert.load(tmp_path / "moved")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(model, tmp_path / "adapter")


def test_an_adapter_for_another_base_warns(tmp_path: Path) -> None:
    adapted_model(artifact(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    other = irq_convert.load(artifact(tmp_path / "other", seed=1))
    known = artifact_identity(tmp_path / "base")[:12]
    with pytest.warns(UserWarning, match=f"trained on the artifact {known}, .* will differ"):
        model = PeftModel.from_pretrained(other, tmp_path / "adapter")
    assert model.peft_config["default"].base_sha256 == artifact_identity(tmp_path / "base")


@pytest.mark.parametrize("pool", [None, "block"])
def test_a_merged_model_is_no_longer_the_artifact(tmp_path: Path, pool: str | None) -> None:
    model = adapted_model(artifact(tmp_path / "base", default=NF4), pool=pool).merge_and_unload()
    assert model_identity(model) is None
    again = irq_convert.attach(model, IecLoraConfig(r=4, target_modules=["q_proj"]))
    assert again.peft_config["default"].base_sha256 is None
    model.save_pretrained(tmp_path / "merged")


def test_an_unloaded_model_still_is(tmp_path: Path) -> None:
    peft_model = adapted_model(artifact(tmp_path / "base"))
    peft_model.merge_adapter()
    peft_model.unmerge_adapter()
    model = peft_model.unload()
    assert model_identity(model) == artifact_identity(tmp_path / "base")
    peft_model = get_peft_model(model, iec_config())
    peft_model.merge_adapter()
    assert model_identity(peft_model.unload()) is None
