"""`irq-convert quantize --bits 3 meta-llama/Llama-2-13b`, on a repository of Meta's own files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from irq_convert.nn.linear import IrqLinear
from tests.checkpoint.meta_files import MetaModel, converted, whole_tensors, write_meta
from tests.folders import listing
from tests.hf.test_meta_tokenizer import train_pieces
from tests.jobs.push.server import Hub, serve
from tests.jobs.push.state import World

from .process import Commands

NAME = "meta-llama/Llama-2-13b"
MODEL = MetaModel(parts=2, dim=64, heads=8, vocab=340, ffn=192)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two parts, params.json, tokenizer.model and the papers, as Meta's repository has them."""
    folder = tmp_path / "Llama-2-13b"
    write_meta(folder, MODEL)
    train_pieces(folder / "tokenizer.model", MODEL.vocab)
    for name in ("LICENSE.txt", "USE_POLICY.md", "checklist.chk"):
        (folder / name).write_text(name)
    (folder / "README.md").write_text("---\nlicense: llama2\nlanguage: en\n---\n# LLaMA 2\n")
    return folder


@pytest.fixture
def server(source: Path) -> Iterator[Hub]:
    world = World()
    world.add(NAME, {path.name: path.read_bytes() for path in source.iterdir()})
    with serve(world) as running:
        yield running


@pytest.fixture
def own(server: Hub, hub_settings: Callable[[str], dict[str, str]]) -> dict[str, str]:
    return hub_settings(server.url)


@pytest.mark.slow
def test_the_command_of_the_readme(
    irq: Commands, server: Hub, own: dict[str, str], source: Path, work: Path
) -> None:
    """Dry run, run, verify, eval, load, push; streamed and from a folder, the same bytes."""
    command = ("quantize", "--bits", 3, NAME)
    result = irq(*command, "--dry-run", "--json", cwd=work, **own)
    assert result.code == 0, result
    parts = sum(path.stat().st_size for path in source.glob("*.pth"))
    assert json.loads(result.out)["fetched"] == parts
    result = irq(*command, cwd=work, **own)
    assert result.code == 0, result
    assert "rope.freqs is left out" in result.err
    out = work / "Llama-2-13b-irq-nf3"
    manifest = json.loads((out / "irq_manifest.json").read_text())
    assert manifest["source"]["model"] == NAME
    assert manifest["source"]["format"] == "meta"
    assert not (out / "params.json").exists()
    result = irq("verify", out, "--against", NAME, cwd=work, **own)
    assert result.code == 0, result
    (work / "text.txt").write_text("Once upon a time there was a cat. " * 40)
    text = ("--text", "text.txt", "--context", 32, "--max-tokens", 64)
    result = irq("eval", out, "--against", NAME, *text, cwd=work, **own)
    assert result.code == 0, result
    streamed = irq(*command[:3], NAME, "streamed", "--stream", cwd=work, **own)
    assert streamed.code == 0, streamed
    local = irq(*command[:3], source, "local", cwd=work, **own)
    assert local.code == 0, local
    found = [listing(work / name) for name in (out.name, "streamed", "local")]
    manifests = [each.pop("irq_manifest.json") for each in found]
    assert found[0] == found[1] == found[2]
    assert manifests[0] == manifests[1] != manifests[2]
    check_loaded(out)
    result = irq("push", out, "org/small", cwd=work, **own)
    assert result.code == 0, result
    card = server.world.repos["org/small"].main["README.md"].decode()
    assert f"base_model: {NAME}" in card
    assert "license: llama2" in card


def check_loaded(out: Path) -> None:
    """Its logits are those of the dense conversion of whole tensors with the stored weights."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    import irq_convert

    model = irq_convert.load(out, dtype=torch.float32).eval()
    config = AutoConfig.from_pretrained(out)
    del config.quantization_config
    twin = LlamaForCausalLM(config).eval()
    state = {n: t.float() for n, t in converted(whole_tensors(MODEL), MODEL).items()}
    for name, module in model.named_modules():
        if isinstance(module, IrqLinear):
            state[f"{name}.weight"] = module.dequantize().float()
    twin.load_state_dict(state)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, twin(ids).logits, atol=1e-4)
    text = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert text.shape[1] == ids.shape[1] + 4
