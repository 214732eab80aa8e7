"""Adapters that start from the error: nearer to the source, the same each time, and only they."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import irq_convert
from irq_convert.adapters.attach import attach
from irq_convert.adapters.kinds import adapter_config
from irq_convert.artifact.adapter_kinds import AdapterKind
from irq_convert.artifact.contents import open_artifact
from irq_convert.artifact.importance import Importance, write_importance
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.errors import IrqError, UsageError
from irq_convert.hf.layered import LayeredModel
from irq_convert.jobs.calibration.importance_file import ImportanceFile, read_importance_file
from irq_convert.jobs.calibration.text import Windows
from irq_convert.jobs.demo.corpus import corpus
from irq_convert.jobs.finetune.start_error import StartReport, start_from_error
from irq_convert.jobs.finetune.start_layers import adapted_layers
from irq_convert.jobs.measure.measure import measure
from irq_convert.jobs.quantize.quantize import quantize
from irq_convert.progress import Progress
from tests.architectures.zoo import BY_NAME, write_checkpoint
from tests.artifact.imatrix_files import llama_cpp_values, write_gguf
from tests.folders import change_tensors
from tests.jobs.calibration.windows import text_windows
from tests.paths import DEMO

KINDS = ("plain", "iec", "block")
WAYS = ("identity", "importance", "text")
Q0 = "model.layers.0.self_attn.q_proj.weight"


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `start_from_error` is given, by way."""
    folder = tmp_path_factory.mktemp("inputs")
    text, file = folder / "tales.txt", folder / "importance.safetensors"
    text.write_text(corpus(3, 40))
    measure(DEMO, file, text=text, tokens=1024, window=64, threads=1)
    windows = text_windows(open_checkpoint(DEMO), text, 1024, 64)
    return {"identity": None, "importance": read_importance_file(file), "text": windows}


def _attached(folder: Path, kind: str = "plain", rank: int = 8, **lora: Any) -> Any:
    torch.manual_seed(0)
    model = irq_convert.load(folder, dtype=torch.float32)
    return attach(model, adapter_config(AdapterKind(kind), r=rank, **lora)).eval()


def _start(model: Any, folder: Path, source: Path, **how: Any) -> StartReport:
    return start_from_error(model, open_artifact(folder), open_checkpoint(source), **how)


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def _kl(source: torch.Tensor, other: torch.Tensor) -> float:
    one, two = source.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((one.exp() * (one - two)).sum(-1).mean())


def _parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def held_out() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that no start has seen, and what the source makes of them."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    ids = torch.tensor(tokenizer(corpus(9, 40))["input_ids"][: 32 * 64]).view(32, 64)
    return ids, _logits(AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32), ids)


def test_the_start_is_nearer_to_the_source_and_more_so_with_moments(
    artifact: Path, inputs: dict[str, Any], held_out: tuple[torch.Tensor, torch.Tensor]
) -> None:
    ids, wanted = held_out
    model = _attached(artifact)
    kl = {"none": _kl(wanted, _logits(model, ids))}
    for way in WAYS:
        report = _start(model, artifact, DEMO, inputs=inputs[way])
        assert 0 < report.left < 1
        assert not report.unweighed
        kl[way] = _kl(wanted, _logits(model, ids))
    assert max(kl["text"], kl["importance"]) < kl["identity"] < kl["none"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_each_kind_starts_the_same_each_time_and_is_an_adapter(
    artifact: Path, inputs: dict[str, Any], kind: str, way: str
) -> None:
    plain, ids = _attached(artifact, kind), torch.arange(40)[None]
    fresh, before = _logits(plain, ids), _parameters(plain)
    one, other = _attached(artifact, kind), _attached(artifact, kind)
    reports = [_start(model, artifact, DEMO, inputs=inputs[way]) for model in (one, other)]
    assert reports[0] == reports[1]
    found, again = _parameters(one), _parameters(other)
    assert all(torch.equal(found[name], again[name]) for name in found)
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert {name.split(".")[-3] for name in changed} == {"lora_A", "lora_B"}
    assert not torch.equal(_logits(one, ids), fresh)
    with one.disable_adapter():
        assert torch.equal(_logits(one, ids), fresh)


def test_the_scaling_of_an_adapter_does_not_matter(artifact: Path) -> None:
    found = []
    for lora in ({}, {"use_rslora": True}, {"lora_alpha": 128}):
        model = _attached(artifact, "iec", **lora)
        _start(model, artifact, DEMO)
        found.append(_logits(model, torch.arange(40)[None]))
    for other in found[1:]:
        assert torch.allclose(found[0], other, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "iec"])
@pytest.mark.parametrize("way", WAYS)
def test_a_full_rank_restores_the_source(
    artifact: Path, inputs: dict[str, Any], kind: str, way: str
) -> None:
    model = _attached(artifact, kind, rank=512)
    report = _start(model, artifact, DEMO, inputs=inputs[way])
    assert report.left < 1e-4
    if way != "text":  # which corrects for what the layers before have rounded
        _assert_restored(model, DEMO)


def _assert_restored(model: Any, folder: Path) -> None:
    source = open_checkpoint(folder)
    with TileReader() as reader:
        for tensor, each in adapted_layers(model, "default").items():
            wanted = reader.read_tensor(source.tensors[tensor]).float()
            base = each.layer.base_layer
            change = each.layer.get_delta_weight("default")
            turned = base.fmt.transposed
            found = base.dequantize() + (change.T if each.layer.fan_in_fan_out else change)
            assert torch.allclose(found.T if turned else found, wanted, atol=1e-5)


def _zoo(name: str, folder: Path, **options: Any) -> tuple[Path, Path]:
    """A model of the zoo and its artifact at 2 bits."""
    source = write_checkpoint(BY_NAME[name], folder / "source")
    settings = {"codebook": "int2", "block_size": 16, "threads": 1, **options}
    quantize(str(source), folder / "artifact", **settings)
    return source, folder / "artifact"


def _windows(seed: int = 0) -> Windows:
    ids = torch.randint(3, 96, (16, 24), generator=torch.Generator().manual_seed(seed))
    return Windows(ids, 0, "noise")


@pytest.mark.parametrize("kind", ["plain", "iec"])
def test_inputs_in_the_rows_of_the_file(tmp_path: Path, kind: str) -> None:
    source, folder = _zoo("GPT-2", tmp_path)
    model = _attached(folder, kind, rank=256)
    _start(model, folder, source)
    _assert_restored(model, source)
    few = _attached(folder, kind, rank=4)
    assert 0 < _start(few, folder, source, inputs=_windows()).left < 1


def test_the_artifact_begins_with_its_own_embeddings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = _zoo("Llama 3", tmp_path, include_embeddings=True)
    seen: list[torch.Tensor] = []
    stock = LayeredModel.begin
    monkeypatch.setattr(
        LayeredModel, "begin", lambda model, ids: seen.append(stock(model, ids)) or seen[-1]
    )
    windows, model = _windows(), _attached(folder, rank=4)
    assert 0 < _start(model, folder, source, inputs=windows).left < 1
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for states, each in zip(seen, (dense, model), strict=True):
        assert torch.equal(states, each.get_input_embeddings()(windows.ids))


@pytest.mark.parametrize("name", ["Mixtral", "Mixtral, fused"])
def test_experts_start_where_they_have_adapters(tmp_path: Path, name: str) -> None:
    source, folder = _zoo(name, tmp_path)
    model, notes = _attached(folder, "iec", rank=4), Notes()
    every = _start(model, folder, source, inputs=_windows(), progress=notes)
    assert all("attn" in tensor for tensor in every.layers)
    assert not notes.lines
    if "fused" in name:
        return
    named = _attached(folder, "iec", rank=4, target_modules=r".*(w1|w2|w3|_proj)")
    found = _start(named, folder, source, inputs=_windows())
    experts = [tensor for tensor in found.layers if "expert" in tensor]
    assert experts
    assert all(0 < found.layers[tensor].part < 1 for tensor in experts)


def test_dense_layers_keep_the_start_they_have(tmp_path: Path) -> None:
    source, folder = _zoo("Llama 2", tmp_path, keep=("q_proj",))
    model = _attached(folder, "iec", rank=4)
    before = _parameters(model)
    _start(model, folder, source)
    kept = {name for name, value in _parameters(model).items() if torch.equal(value, before[name])}
    assert any("q_proj.lora_A" in name for name in kept)
    assert any("q_proj.lora_B" in name for name in kept)
    assert not any("k_proj.lora_B" in name for name in kept)


def test_what_importance_does_not_have_starts_from_its_weights(
    artifact: Path, inputs: dict[str, Any], tmp_path: Path
) -> None:
    values = dict(inputs["importance"].found.values)
    del values[Q0]
    model, notes = _attached(artifact), Notes()
    fewer = _importance(tmp_path / "fewer", values)
    report = _start(model, artifact, DEMO, inputs=fewer, progress=notes)
    assert report.unweighed == (Q0,)
    assert Q0 in notes.lines[0]
    plain = _start(_attached(artifact), artifact, DEMO)
    assert report.layers[Q0] == plain.layers[Q0]
    values[Q0] = values["model.layers.0.mlp.down_proj.weight"]
    with pytest.raises(UsageError, match=r"q_proj.* of another model"):
        _start(model, artifact, DEMO, inputs=_importance(tmp_path / "other", values))
    nothing = _importance(tmp_path / "nothing", {"x.weight": values[Q0]})
    with pytest.raises(
        UsageError, match=r"nothing of the 28 adapted weights, the first is .*mlp\.down"
    ):
        _start(model, artifact, DEMO, inputs=nothing)


def _importance(path: Path, values: dict[str, Any]) -> ImportanceFile:
    told = {"model": "m", "revision": None, "tensors_sha256": ""}
    write_importance(path, Importance(values, "text", 1, 1, "", told))
    return read_importance_file(path)


def test_an_imatrix_counts_as_a_file_of_ours(
    artifact: Path, inputs: dict[str, Any], tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "imatrix", llama_cpp_values(inputs["importance"].found.values))
    one, other = (
        _start(_attached(artifact), artifact, DEMO, inputs=each)
        for each in (inputs["importance"], read_importance_file(file))
    )
    assert other.how == "importance"
    assert not other.unweighed
    assert other.left == pytest.approx(one.left, rel=1e-5)
    assert other.left != pytest.approx(_start(_attached(artifact), artifact, DEMO).left, rel=1e-2)


def test_a_source_that_is_another_model_is_refused(artifact: Path, tmp_path: Path) -> None:
    source, other = _zoo("Llama 2", tmp_path, keep=("q_proj",))
    model = _attached(artifact)
    with pytest.raises(UsageError, match="the model has it quantized, and the artifact has not"):
        _start(model, other, DEMO)
    with pytest.raises(UsageError, match="give the source that the artifact was made from"):
        _start(model, artifact, source)
    with pytest.raises(UsageError, match="give the source that the artifact was made from"):
        _start(model, artifact, artifact)
    with pytest.raises(UsageError, match="no adapter called 'other'"):
        _start(model, artifact, DEMO, adapter="other")


def test_broken_weights_are_named(tmp_path: Path) -> None:
    source, folder = _zoo("Llama 2", tmp_path)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q0][1, 1] = float("nan")

    change_tensors(source, spoil)
    for inputs in (None, _windows()):
        with pytest.raises(IrqError, match=r"layers\.0\.self_attn"):
            _start(_attached(folder), folder, source, inputs=inputs)
