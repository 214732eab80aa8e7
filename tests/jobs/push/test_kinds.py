"""Adapters and merged models on the Hub: what is sent, and what their cards say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import RepoCard

import irq_convert
from irq_convert.artifact.manifest import MANIFEST_NAME, SEAL, manifest_sha256
from irq_convert.core.spec import QuantSpec
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.export.export import export
from irq_convert.jobs.export.options import ExportOptions
from irq_convert.jobs.merge.merge import merge
from irq_convert.jobs.merge.options import Check, MergeOptions, MergeTo
from irq_convert.jobs.push.local_paths import is_local
from irq_convert.jobs.push.push import PushOptions, push
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from irq_convert.progress import Progress
from tests.jobs.merge.make import change_weights, write_adapter
from tests.paths import DEMO

from .conftest import BASE, base_files
from .state import World

WEIGHTS = (".safetensors", ".gguf")
pytestmark = pytest.mark.usefixtures("clock")


@pytest.fixture
def adapter(artifact: Path, tmp_path: Path) -> Path:
    """Block-pooled, with the note that finetune writes, and files that are not to be sent."""
    folder = write_adapter(tmp_path / "tales", artifact, kind="block", size=0.001)
    source = json.loads((artifact / MANIFEST_NAME).read_text())["source"]
    settings = json.loads((folder / "adapter_config.json").read_text())
    note = {
        "format": "irq-adapter",
        "format_version": 1,
        "producer": "irq-convert 0",
        "base": {"sha256": settings["base_sha256"], "model": "base-irq", "source": source},
        "lora": "block",
        "training": {
            "recipe": {"steps": 7, "learning_rate": 2e-4},
            "losses": {"heldout_after": {"value": 1.25, "se": 0.125}},
        },
    }
    (folder / "irq_adapter.json").write_text(json.dumps(note))
    (folder / "loss.png").write_bytes(b"png")
    (folder / "optimizer.pt").write_bytes(b"pickle")
    (folder / ".training").mkdir()
    (folder / ".training" / "run.json").write_text("{}")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "adapter_model.safetensors").write_bytes(b"older")
    return folder


def merged(artifact: Path, adapter: Path, out: Path, to: MergeTo) -> Path:
    merge(artifact, adapter, out, MergeOptions(to=to, check=Check.NONE, threads=1))
    return out


def pushed(world: World, folder: Path, **options: object) -> tuple[dict[str, object], str]:
    """Push twice, the second time for nothing; metadata and text of the card."""
    report = push(folder, "org/x", PushOptions(**options))  # type: ignore[arg-type]
    assert push(folder, "org/x", PushOptions(**options)).uploaded == ()  # type: ignore[arg-type]
    assert world.repos["org/x"].main["README.md"].decode() == report.card
    return dict(RepoCard(report.card).data.to_dict()), report.card


def test_an_adapter(world: World, adapter: Path) -> None:
    world.add(BASE, base_files())
    found, text = pushed(world, adapter, base_model=BASE)
    assert set(world.repos["org/x"].main) == {
        *("adapter_config.json", "adapter_model.safetensors", "irq_adapter.json", "loss.png"),
        *(".gitattributes", "README.md"),
    }
    assert (found["base_model"], found["base_model_relation"]) == (BASE, "adapter")
    assert found["library_name"] == "peft"
    assert found["tags"] == ["irq-convert", "lora", "iec-lora"]
    assert found["license_name"] == "tales"  # from the base's card, on the Hub
    for words in ("block-pooled", "1.2500 ± 0.1250", "| steps | 7 |", "![loss](loss.png)"):
        assert words in text
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert f"identity (sha256) is `{settings['base_sha256']}`" in text


def test_an_adapter_that_a_script_of_the_user_saved(world: World, adapter: Path) -> None:
    """There is no note; the settings tell how it is loaded."""
    (adapter / "irq_adapter.json").unlink()
    found, text = pushed(world, adapter)
    assert found["tags"] == ["irq-convert", "lora", "iec-lora"]
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert "A block-pooled IEC-LoRA adapter for a model." in text
    assert "import irq_convert.adapters" in text
    assert f"on the artifact, whose identity (sha256) is `{settings['base_sha256']}`" in text


def test_an_adapter_of_an_artifact_on_the_hub_names_it(world: World, adapter: Path) -> None:
    note = json.loads((adapter / "irq_adapter.json").read_text())
    note["base"]["model"] = "org/base-irq"
    (adapter / "irq_adapter.json").write_text(json.dumps(note))
    found, text = pushed(world, adapter)
    assert found["base_model"] == "org/base-irq"
    assert 'irq_convert.load("org/base-irq")' in text


@pytest.mark.parametrize(("base", "told"), [("/home/me/base-irq", True), ("org/base-irq", False)])
def test_a_path_in_an_adapter_is_told(world: World, adapter: Path, base: str, told: bool) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": base})
    )
    notes: list[str] = []
    progress = Progress()
    progress.note = notes.append  # type: ignore[method-assign]
    push(adapter, "org/x", progress=progress)
    assert [base in note for note in notes] == [True] * told
    sent = json.loads(world.repos["org/x"].main["adapter_config.json"])
    assert sent["base_model_name_or_path"] == ("base-irq" if told else base)


def test_an_adapter_with_nan_or_damage_is_not_pushed(world: World, adapter: Path) -> None:
    change_weights(adapter, lambda tensors: next(iter(tensors.values())).fill_(float("nan")))
    with pytest.raises(IrqError, match="NaN"):
        push(adapter, "org/x")
    (adapter / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(IrqError, match=r"adapter_model\.safetensors"):
        push(adapter, "org/x")
    assert world.repos == {}


def test_a_folded_adapter(world: World, artifact: Path, adapter: Path, tmp_path: Path) -> None:
    folder = merged(artifact, adapter, tmp_path / "plain", MergeTo.ADAPTER)
    found, text = pushed(world, folder)
    assert (found["base_model"], found["base_model_relation"]) == (BASE, "adapter")
    assert found["tags"] == ["irq-convert", "lora"]
    assert "import irq_convert.adapters" not in text


def test_a_merged_artifact(world: World, artifact: Path, adapter: Path, tmp_path: Path) -> None:
    folder = merged(artifact, adapter, tmp_path / "merged", MergeTo.IRQ)
    found, text = pushed(world, folder)
    assert (found["base_model"], found["base_model_relation"]) == (BASE, "finetune")
    assert "irq" in found["tags"]  # type: ignore[operator]
    assert found["license_name"] == "tales"
    assert "irq-convert merge base-irq tales OUT --to irq" in text
    assert "the adapter `tales` merged in" in text
    assert "of the weights' energy; of merged tensors to base plus adapter |" in text
    assert "recomputes these figures" not in text


def test_a_dense_merge(world: World, artifact: Path, adapter: Path, tmp_path: Path) -> None:
    folder = merged(artifact, adapter, tmp_path / "dense", MergeTo.DENSE)
    found, text = pushed(world, folder)
    assert (found["base_model"], found["base_model_relation"]) == (BASE, "finetune")
    assert found["library_name"] == "transformers"
    assert "irq" not in found["tags"]  # type: ignore[operator]
    assert "irq-convert merge base-irq tales OUT --to dense" in text
    assert "import irq_convert" not in text
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"too long")
    with pytest.raises(IrqError, match=r"model\.safetensors"):
        push(folder, "org/x")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "library", "tag", "line"),
    [
        ("dense", "transformers", None, 'AutoModelForCausalLM.from_pretrained("org/x"'),
        ("mlx", "mlx", "mlx", "from mlx_lm import load  # pip install mlx-lm\n\nmodel, tokenizer"),
        ("gguf", "gguf", "gguf", "llama-cli --hf-repo org/x --hf-file "),
        ("compressed-tensors", "transformers", "compressed-tensors", "pip install compressed"),
    ],
)
def test_an_export(
    world: World, tmp_path: Path, to: str, library: str, tag: str | None, line: str
) -> None:
    if to == "gguf":
        pytest.importorskip("gguf")
    spec = QuantSpec("int4", 32, "mse", zero_point="integer")
    quantize(str(DEMO), tmp_path / "int4", QuantizeOptions(spec, threads=1))
    export(tmp_path / "int4", tmp_path / "x", ExportOptions(to, threads=1))
    found, text = pushed(world, tmp_path / "x", base_model=BASE)
    assert (found["base_model"], found["base_model_relation"]) == (BASE, "quantized")
    assert (found["library_name"], found["tags"]) == (library, ["irq-convert", *[tag] * bool(tag)])
    assert line in text
    assert f"irq-convert export int4 OUT --to {to}" in text
    assert "import irq_convert" not in text
    with pytest.raises(UsageError, match="--overwrite"):  # not over results of another kind
        push(tmp_path / "int4", "org/x")
    weights = next(path for path in (tmp_path / "x").iterdir() if path.suffix in WEIGHTS)
    weights.write_bytes(b"short")
    with pytest.raises(IrqError, match=weights.name):
        push(tmp_path / "x", "org/x")


def test_a_base_that_is_not_on_the_hub_is_not_invented(world: World, artifact: Path) -> None:
    path = artifact / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    manifest["source"] |= {"model": "org/looks-like-an-id", "revision": None}
    path.write_text(json.dumps(manifest | {SEAL: manifest_sha256(manifest)}))
    found, text = pushed(world, artifact)
    assert "base_model" not in found
    assert "base_model_relation" not in found
    assert "org/looks-like-an-id, its linear layers" in text
    again = push(artifact, "org/x", PushOptions(base_model=BASE))
    assert again.uploaded == ("README.md",)
    assert RepoCard(again.card).data["base_model"] == BASE


def test_an_adapter_that_peft_saved_says_nothing_of_the_machine(
    world: World, artifact: Path, tmp_path: Path
) -> None:
    """PEFT's own files and card, Trainer's state: the base is a local folder."""
    from peft import LoraConfig, get_peft_model

    model = irq_convert.load(artifact)
    folder = tmp_path / "by-peft"
    model.config._name_or_path = str(artifact)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    card = (folder / "README.md").read_text()
    assert f"base_model: {artifact}" in card
    assert f"base_model:adapter:{artifact}" in card
    (folder / "README.md").write_text(card + f"\nTuned from [{artifact}](https://hf/{artifact}).\n")
    (folder / "trainer_state.json").write_text(
        json.dumps({"best_model_checkpoint": str(tmp_path / "run" / "checkpoint-5"), "epoch": 1.5})
    )
    found, text = pushed(world, folder)
    assert "base_model" not in found
    assert "lora" in found["tags"]
    assert f"Tuned from [{artifact.name}]" in text
    sent = world.repos["org/x"].main
    for name, content in sent.items():
        assert str(tmp_path).encode() not in content, name
        assert str(artifact).encode() not in content, name
    assert json.loads(sent["trainer_state.json"])["epoch"] == 1.5
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(artifact)  # the folder is untouched
    assert json.loads(sent["adapter_config.json"]) == settings | {
        "base_model_name_or_path": artifact.name
    }


def test_an_adapter_that_peft_saved_names_its_base_on_the_hub(world: World, adapter: Path) -> None:
    (adapter / "irq_adapter.json").unlink()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": "org/base-irq"})
    )
    found, _ = pushed(world, adapter)
    assert found["base_model"] == "org/base-irq"


@pytest.mark.parametrize(
    ("name", "local"),
    [
        *(("org/model", False), ("gpt2", False), ("", False), (None, False)),
        *(("/home/me/x", True), ("./x", True), ("~/x", True), ("a/b/c", True)),
        *((r"C:\models\x", True), (r"models\x", True), (str(DEMO), True)),
    ],
)
def test_what_is_a_path(name: str | None, local: bool) -> None:
    assert is_local(name) is local
