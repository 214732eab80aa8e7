"""Generating: what a model writes, in pieces, beside another, stopped, and with every adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import irq_convert
from irq_convert.adapters.kinds import adapter_config
from irq_convert.adapters.runnable import check_runnable
from irq_convert.artifact.adapter_kinds import AdapterKind
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.generate.generate import begin, generate, in_turns
from irq_convert.jobs.generate.models import Writer, load_writers
from irq_convert.jobs.generate.options import GenerateOptions
from irq_convert.jobs.generate.pieces import Pieces
from irq_convert.jobs.generate.report import Ended
from tests.folders import assert_one_line
from tests.paths import DEMO

PROMPT = "Once upon a time"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def writer() -> Writer:
    return load_writers(DEMO, options=GenerateOptions(dtype="float32"))[0]  # bfloat16 has ties


def expected(model: Any, tokenizer: Any, tokens: int, **how: Any) -> str:
    """What transformers alone makes of the prompt, up to its end."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **how)[0].tolist()
    before = len(inputs["input_ids"][0])
    ends = [i for i, token in enumerate(ids) if i >= before and token in (1, 348)]
    whole: str = tokenizer.decode(ids[: ends[0]] if ends else ids, skip_special_tokens=True)
    return whole.removeprefix(PROMPT)


def test_it_writes_what_transformers_writes(
    demo_nf3: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    heard: list[tuple[int, str]] = []
    found = generate(demo_nf3, PROMPT, max_tokens=30, on_text=lambda *each: heard.append(each))
    told = found.generated
    assert told.text == expected(irq_convert.load(demo_nf3), tokenizer, 30)
    assert len(told.text) > 40
    assert "".join(piece for _, piece in heard) == told.text
    assert len(heard) > 15  # as it comes, not in the end
    assert {number for number, _ in heard} == {0}
    assert (told.tokens, told.ended, found.reference) == (30, Ended.LENGTH, None)
    assert told.first_seconds is not None
    assert 0 < told.first_seconds < told.seconds
    speed = 29 / (told.seconds - told.first_seconds)
    assert told.tokens_per_second == pytest.approx(speed)
    assert found.to_dict()["tokens_per_second"] == told.tokens_per_second
    assert "reference" not in found.to_dict()


def test_it_ends_where_the_model_does(writer: Writer) -> None:
    stream = begin(writer, PROMPT, None, GenerateOptions(max_tokens=240))
    assert "".join(stream) == stream.result().text
    assert stream.result().ended == Ended.END
    assert writer.ends == {1, 348}  # the second by its generation_config.json alone
    with pytest.raises(StopIteration):
        next(stream)


def test_beside_another_each_writes_as_it_does_alone(demo_nf3: Path) -> None:
    how = {"max_tokens": 24, "temperature": 0.9, "top_p": 0.95, "seed": 3}
    torch.manual_seed(11)
    before = torch.get_rng_state()
    order: list[int] = []
    both = generate(demo_nf3, PROMPT, against=DEMO, on_text=lambda n, _: order.append(n), **how)
    assert torch.equal(torch.get_rng_state(), before)
    assert both.reference is not None
    assert both.generated.text == generate(demo_nf3, PROMPT, **how).generated.text
    assert both.reference.text == generate(DEMO, PROMPT, **how).generated.text
    assert order[:6] == [0, 1, 0, 1, 0, 1]
    assert both.generated.text != generate(demo_nf3, PROMPT, **how | {"seed": 4}).generated.text
    same = both.same_characters
    assert same is not None
    assert both.generated.text[:same] == both.reference.text[:same]
    assert both.generated.text[same : same + 1] != both.reference.text[same : same + 1]
    assert both.to_dict()["reference"]["model"] == str(DEMO)


def test_top_p_alone_samples(writer: Writer) -> None:
    def text(**how: Any) -> str:
        return "".join(begin(writer, PROMPT, None, GenerateOptions(max_tokens=20, **how)))

    assert text(top_p=1e-6) == text()  # the likeliest token alone
    assert text(top_p=0.99, seed=1) != text(top_p=0.99, seed=2)


def test_a_stream_that_is_stopped_has_what_there_is(writer: Writer) -> None:
    whole = "".join(begin(writer, PROMPT, None, GenerateOptions(max_tokens=30)))
    stream = begin(writer, PROMPT, None, GenerateOptions(max_tokens=30))
    pieces = in_turns([stream])
    some = "".join(next(pieces)[1] for _ in range(4))
    pieces.close()
    assert whole.startswith(some)
    assert stream.result().text == some
    assert stream.result().ended == Ended.STOPPED
    never = begin(writer, PROMPT, None, GenerateOptions())
    never.close()
    assert (never.result().tokens, never.result().ended) == (0, Ended.STOPPED)


def test_no_more_than_its_positions(writer: Writer, tokenizer: PreTrainedTokenizerBase) -> None:
    words = tokenizer.decode(tokenizer(PROMPT * 80)["input_ids"][1:251])
    stream = begin(writer, words, None, GenerateOptions(max_tokens=99))
    assert "".join(stream) == stream.result().text
    found = stream.result()
    assert found.prompt_tokens + found.tokens <= 256
    assert found.ended in (Ended.POSITIONS, Ended.END)
    with pytest.raises(UsageError, match="the model takes 256"):
        begin(writer, PROMPT * 100, None, GenerateOptions())


def make_adapter(artifact: Path, kind: AdapterKind, folder: Path) -> Path:
    """An adapter of a kind that changes what the model says."""
    model = irq_convert.load(artifact)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    adapted = get_peft_model(model, adapter_config(kind, task_type="CAUSAL_LM", **lora))
    torch.manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            size = 0.5 if "lora_" in name else 0.1 * parameter.detach().abs().mean()
            with torch.no_grad():
                parameter.add_(size * torch.randn_like(parameter))
    adapted.save_pretrained(str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(AdapterKind))
def test_adapters_of_every_kind(
    demo_nf3: Path, kind: AdapterKind, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    from peft import PeftModel

    folder = make_adapter(demo_nf3, kind, tmp_path / "adapter")
    found = generate(demo_nf3, PROMPT, adapter=folder, max_tokens=8).generated.text
    adapted = PeftModel.from_pretrained(irq_convert.load(demo_nf3), str(folder))
    assert found == expected(adapted, tokenizer, 8)
    with adapted.disable_adapter():
        assert found != expected(adapted, tokenizer, 8)


def with_template(folder: Path, template: str = TEMPLATE) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def with_more_words(folder: Path) -> Path:
    """The demo's tokenizer with words of its own at the end, which stories are full of."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.add_tokens(["the", "Once", "The", "At", "upon"])
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the tokenizer belongs to another model"):
        generate(DEMO, "Once upon a time", tokenizer=with_more_words(tmp_path / "other"))


def test_an_adapter_brings_its_own_tokenizer(demo_nf3: Path, tmp_path: Path) -> None:
    """For all that run it: here the template is the adapter's."""
    folder = make_adapter(demo_nf3, AdapterKind.PLAIN, tmp_path / "adapter")
    with_template(folder)
    (own, against) = check_runnable(demo_nf3, adapter=folder, against=DEMO)
    assert own.tokenizer.chat_template == TEMPLATE
    assert against.tokenizer.chat_template is None
    assert own.name == f"{demo_nf3} + adapter"
    assert generate(demo_nf3, "Hi.", adapter=folder, chat=True, max_tokens=2).generated.tokens


def test_a_conversation_goes_through_the_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    talk = with_template(tmp_path / "talk")
    found = generate(DEMO, "Hi.", chat=True, system="Be kind.", tokenizer=talk, max_tokens=8)
    written = "system: Be kind.\nuser: Hi.\nassistant:"
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    assert found.generated.prompt_tokens == len(ids)
    assert found.prompt == "Hi."


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('No system role here.') }}", "No system role here."),
        ("{% if %}", "refuses the messages"),
    ],
)
def test_templates_that_do_not_serve(
    template: str | None, says: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = DEMO if template is None else with_template(tmp_path / "t", template)
    with pytest.raises(UsageError) as caught:
        generate(DEMO, "Hi.", chat=True, tokenizer=folder)
    assert_one_line(str(caught.value), says, str(DEMO))


def test_numbers_that_are_none_are_refused(writer: Writer) -> None:
    broken = load_writers(DEMO, options=GenerateOptions())[0]
    with torch.no_grad():
        broken.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(IrqError, match="gives NaN logits"):
        list(begin(broken, PROMPT, None, GenerateOptions()))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_tokens": 0}, "--max-tokens 0: at least 1"),
        ({"temperature": -1.0}, "--temperature -1: 0"),
        ({"top_p": 0.0}, "--top-p 0: it must lie"),
        ({"top_p": 0.5, "temperature": 0.0}, "--temperature 0 does not"),
        ({"seed": -1}, "--seed -1"),
        ({"dtype": "int8"}, "--dtype int8: choose one of auto"),
    ],
)
def test_options_that_mean_nothing(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        GenerateOptions(**settings)
    assert_one_line(str(caught.value), says)


@settings(max_examples=30)
@given(text=st.text(max_size=12), prompt=st.text(max_size=8))
def test_pieces_are_the_whole_text(
    tokenizer: PreTrainedTokenizerBase, text: str, prompt: str
) -> None:
    first = tokenizer(prompt)["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = Pieces(tokenizer, first)
    given_out = [pieces.add(token) for token in ids]
    assert not any("\ufffd" in piece for piece in given_out) or "\ufffd" in text
    whole = tokenizer.decode(first + ids, skip_special_tokens=True)
    before = tokenizer.decode(first, skip_special_tokens=True)
    assert before + "".join(given_out) + pieces.rest() == whole
