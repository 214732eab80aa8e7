"""From names of models and a text file to numbers, and the `eval` command on top."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, MambaConfig
from typer.testing import CliRunner

from irq_convert.cli.eval import eval_command
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.common.text import cut_windows, encode_stream
from irq_convert.jobs.evaluate.evaluate import choose_context, evaluate
from irq_convert.jobs.evaluate.options import EvalOptions
from irq_convert.jobs.evaluate.windows import evaluate_windows
from tests.paths import ABSENT, SHARED

from .conftest import NOISE, POSITIONS, make_model, make_tokenizer, save, story

STORIES = SHARED / "models" / "stories15M"
TEXT = SHARED / "text" / "tinystories.txt"

app = typer.Typer()
app.command("eval")(eval_command)


def run(*arguments: object) -> str:
    """Standard output of the command; an error of ours comes out as the exception it is."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_job_is_its_parts_put_together(
    model_folder: Path, other_folder: Path, text_file: Path
) -> None:
    options = EvalOptions(from_fraction=0.5, max_tokens=200, context=24, batch_size=3)
    found = evaluate(model_folder, text_file, against=other_folder, options=options)
    text = story(7)
    tail = text[text.index("\n", len(text) // 2) + 1 :]
    ids = encode_stream(make_tokenizer(), tail)[:200]
    windows = cut_windows(ids, 24)
    expected = evaluate_windows(make_model(0), windows, options, make_model(0, noise=NOISE))
    assert found == expected
    assert found.context == 24


def test_the_context_is_the_models_own(model_folder: Path, text_file: Path) -> None:
    assert evaluate(model_folder, text_file).context == POSITIONS


def test_the_context_fits_every_model() -> None:
    models = [make_model(0).config for _ in range(2)]
    models[0].max_position_embeddings = 64
    assert choose_context(models, None) == POSITIONS
    assert choose_context(models, 8) == 8
    with pytest.raises(UsageError, match="33 tokens is more than the model's 32 positions"):
        choose_context(models, 33)
    for config in models:
        config.max_position_embeddings = 10_000
    assert choose_context(models, None) == 2048
    assert choose_context(models, 4096) == 4096
    assert choose_context([MambaConfig()], None) == 2048  # no limit of its own
    assert choose_context([MambaConfig()], 4096) == 4096
    assert choose_context([MambaConfig(), GPT2Config(n_positions=512)], None) == 512


def test_lower_precision_is_really_used(model_folder: Path, text_file: Path) -> None:
    full = evaluate(model_folder, text_file)
    half = evaluate(model_folder, text_file, options=EvalOptions(dtype="bfloat16"))
    assert half.nll != full.nll
    assert half.nll == pytest.approx(full.nll, rel=0.02)


def test_a_tokenizer_from_elsewhere(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    bare = save(tmp_path / "bare", make_model(0), tokenizer=False)
    with pytest.raises(IrqError, match="--tokenizer PATH"):
        evaluate(bare, text_file)
    with pytest.raises(IrqError, match="--tokenizer PATH"):
        evaluate(model_folder, text_file, against=bare)
    found = evaluate(bare, text_file, against=bare, tokenizer=model_folder)
    assert found.nll == evaluate(model_folder, text_file).nll


def test_tokenizers_must_be_one(
    model_folder: Path, other_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    other = save(tmp_path / "other", make_model(1))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {
        {"a": "b", "b": "a"}.get(token, token): number
        for token, number in tokenizer["model"]["vocab"].items()
    }
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    size = len(make_tokenizer())
    says = f"{size} tokens for the model, {size} for the reference, 4 entries unlike"
    with pytest.raises(UsageError, match=says):
        evaluate(model_folder, text_file, against=other)
    assert evaluate(model_folder, text_file, against=other, tokenizer=other_folder).compared


def test_a_text_too_short_for_a_window(model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("the cat")
    with pytest.raises(UsageError, match="less than one window of 32"):
        evaluate(model_folder, path)
    assert evaluate(model_folder, path, options=EvalOptions(context=2)).windows >= 1


def test_no_weights_are_read_for_a_wrong_text(model_folder: Path, tmp_path: Path) -> None:
    """The folder has no weights at all, and still it is the text that is complained of."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((model_folder / name).read_bytes())
    with pytest.raises(UsageError, match="no such text file"):
        evaluate(bare, tmp_path / "none.txt")
    (tmp_path / "short.txt").write_text("the cat")
    with pytest.raises(UsageError, match="less than one window"):
        evaluate(bare, tmp_path / "short.txt")


def test_the_command_prints_json(model_folder: Path, other_folder: Path, text_file: Path) -> None:
    arguments = ("--against", other_folder, "--context", 16, "--max-tokens", 300, "--batch-size", 5)
    report = json.loads(run(model_folder, "--text", text_file, *arguments, "--json"))
    options = EvalOptions(context=16, max_tokens=300, batch_size=5)
    expected = evaluate(model_folder, text_file, against=other_folder, options=options)
    assert report.items() >= expected.to_dict().items()
    assert report["model"] == str(model_folder)
    assert report["against"] == str(other_folder)
    assert report["dtype"] == "float32"
    assert report["max_tokens"] == 300


def test_the_table_fits_a_terminal(
    model_folder: Path, other_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    output = run(model_folder, "--text", text_file, "--against", other_folder)
    expected = evaluate(model_folder, text_file, against=other_folder)
    cells = {
        name.strip(): (float(value), float(error))
        for _, name, value, error, _ in (
            line.split("│") for line in output.splitlines() if line.startswith("│")
        )
    }
    scale = {"same top token, %": 100}
    fields = {
        "perplexity": "perplexity",
        "NLL, nats a token": "nll",
        "reference perplexity": "reference_perplexity",
        "NLL minus reference's": "nll_difference",
        "KL(reference || model), nats": "kl",
        "same top token, %": "top1",
    }
    assert set(cells) == set(fields) | {"bits a token"}
    for name, field in fields.items():
        value = getattr(expected, field) * scale.get(name, 1)
        error = getattr(expected, f"{field}_se") * scale.get(name, 1)
        assert cells[name][1] == pytest.approx(error, rel=0.06), name  # two digits
        assert abs(cells[name][0] - value) <= cells[name][1] / 10, name
    lines = [line for line in output.splitlines() if not line.startswith(("model", "reference"))]
    assert max(map(len, lines)) <= 80


def test_one_window_says_why_there_is_no_error(model_folder: Path, text_file: Path) -> None:
    output = run(model_folder, "--text", text_file, "--max-tokens", 32)
    assert "no standard error" in output
    assert "31 tokens in 1 window of 32" in output


@pytest.mark.slow
def test_threads_are_set(model_folder: Path, text_file: Path) -> None:
    before = torch.get_num_threads()
    try:
        run(model_folder, "--text", text_file, "--threads", 2, "--json")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_importing_the_command_imports_nothing_heavy() -> None:
    code = "import sys, irq_convert.cli.eval; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
@pytest.mark.skipif(not (STORIES.is_dir() and TEXT.is_file()), reason=ABSENT)
def test_stories15m_on_the_end_of_tinystories() -> None:
    """Against the losses transformers returns on windows that are cut here by plain slices."""
    options = EvalOptions(from_fraction=0.96, context=256)
    found = evaluate(STORIES, TEXT, options=options)
    text = TEXT.read_text(encoding="utf-8")
    tail = text[text.index("\n", int(0.96 * len(text))) + 1 :]
    ids = torch.tensor(AutoTokenizer.from_pretrained(STORIES)(tail)["input_ids"])
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    total = tokens = 0.0
    with torch.no_grad():
        for start in range(0, len(ids), 256):
            window = ids[None, start : start + 256]
            predicted = window.shape[1] - 1
            total += float(model(input_ids=window, labels=window).loss) * predicted
            tokens += predicted
    assert found.tokens == tokens
    assert found.nll == pytest.approx(total / tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert 4.2 < found.perplexity < 4.7  # a trained model on its own kind of text: 4.44
    assert found.perplexity_se is not None
    assert 0.05 < found.perplexity_se < 0.2
