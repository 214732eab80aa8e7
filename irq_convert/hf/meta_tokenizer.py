"""Meta's `tokenizer.model` as the files of a fast tokenizer: SentencePiece (LLaMA 1, 2, Code Llama)
and tiktoken's ranks (3), told apart by their first line.

The ids of a text are those of Meta's own code: a beginning-of-text token, then the pieces.
"""

from __future__ import annotations

import base64
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from irq_convert.checkpoint.source import Checkpoint
from irq_convert.errors import IrqError, one_line

FILE = "tokenizer.model"
_RANK = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_SPACE = "\u2581"
_BEGIN, _END = "<|begin_of_text|>", "<|end_of_text|>"
_FIRST_OF_3 = (
    *(_BEGIN, _END, "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|reserved_special_token_2|>", "<|reserved_special_token_3|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
)
_FIRST_OF_3_1 = (
    *(_BEGIN, _END, "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
)
_SPECIALS = 256


def find_tokenizer(checkpoint: Checkpoint) -> Path | None:
    """The file of a source in Meta's layout: beside the weights, in the folder, or above it.

    LLaMA 1 has one there for all sizes. None where it is in none of these places.
    """
    above = [] if checkpoint.repo_id else [checkpoint.folder.resolve().parent]
    places = [checkpoint.shards[0].parent, checkpoint.folder, *above]
    return next((place / FILE for place in places if (place / FILE).is_file()), None)


def is_tiktoken(path: Path) -> bool:
    """Whether the file lists ranks, a line each, as tiktoken reads them."""
    with path.open("rb") as file:
        return bool(_RANK.match(file.readline(4096)))


def tokenizer_files(path: Path, config: Mapping[str, Any]) -> dict[str, bytes]:
    """tokenizer.json and its settings, by name, made of `tokenizer.model` at `path`.

    `config` is the model's: its context, and whether it is of LLaMA 3.1 or later. Raises `IrqError`
    where the file cannot be read, or gives more ids than the model has embeddings.
    """
    try:
        built = _ranks(path, config) if is_tiktoken(path) else _pieces(path)
    except Exception as error:  # a damaged file: of sentencepiece, base64, tokenizers
        raise IrqError(f"{path}: no tokenizer of Meta's: {one_line(error)}: get it again") from None
    tokenizer, special = built
    count, rows = tokenizer.get_vocab_size(), int(config["vocab_size"])
    if count > rows:
        raise IrqError(
            f"{path}: has {count} tokens, the model {rows} embeddings: it is of another model"
        )
    return _saved(tokenizer, special, config.get("max_position_embeddings"))


def _saved(tokenizer: Any, special: Mapping[str, str], context: int | None) -> dict[str, bytes]:
    from transformers import PreTrainedTokenizerFast

    length = {"model_max_length": context} if context else {}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **special,
        **length,
    )
    with tempfile.TemporaryDirectory() as folder:
        fast.save_pretrained(folder)
        found = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    name = "tokenizer_config.json"
    settings = json.loads(found[name]) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings = {k: v for k, v in settings.items() if k not in ("is_local", "local_files_only")}
    return found | {name: f"{json.dumps(settings, indent=2)}\n".encode()}


def _pieces(path: Path) -> tuple[Any, dict[str, str]]:
    """SentencePiece's BPE: merges in the order of the scores of what they make."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers.convert_slow_tokenizer import generate_merges

    model = SentencePieceProcessor(model_file=str(path))
    names = [model.id_to_piece(at) for at in range(model.get_piece_size())]
    vocab = {name: at for at, name in enumerate(names)}
    merges = generate_merges(vocab, {n: model.get_score(at) for at, n in enumerate(names)})
    unknown = names[model.unk_id()]
    tokenizer = Tokenizer(
        BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    control = [name for at, name in enumerate(names) if model.is_control(at)]
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False, special=True) for name in (unknown, *control)]
    )
    begin, end = names[model.bos_id()], names[model.eos_id()]
    tokenizer.post_processor = _begins_with(begin, tokenizer)
    return tokenizer, {"bos_token": begin, "eos_token": end, "unk_token": unknown}


def _ranks(path: Path, config: Mapping[str, Any]) -> tuple[Any, dict[str, str]]:
    """tiktoken's byte pairs by transformers' converter, and the special tokens behind them."""
    from tokenizers import AddedToken, processors
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        """Reads the ranks itself: the package tiktoken is needed for nothing else."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            lines = Path(tiktoken_url).read_bytes().splitlines()
            pairs = (line.split() for line in lines if line)
            return {base64.b64decode(token): int(rank) for token, rank in pairs}

    tokenizer = Converter(vocab_file=str(path)).converted()
    specials = _specials(later="rope_scaling" in config)
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in specials]
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _begins_with(_BEGIN, tokenizer)]
    )
    instruct = isinstance(config.get("eos_token_id"), list)
    return tokenizer, {"bos_token": _BEGIN, "eos_token": "<|eot_id|>" if instruct else _END}


def _specials(later: bool) -> list[str]:
    """The 256 special tokens of LLaMA 3, or of 3.1 and `later` ones, in the order of their ids."""
    named = _FIRST_OF_3_1 if later else _FIRST_OF_3
    first = sum("reserved" in token for token in named)
    more = range(first, first + _SPECIALS - len(named))
    return [*named, *(f"<|reserved_special_token_{number}|>" for number in more)]


def _begins_with(token: str, tokenizer: Any) -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(
        single=f"{token}:0 $A:0",
        pair=f"{token}:0 $A:0 {token}:1 $B:1",
        special_tokens=[(token, tokenizer.token_to_id(token))],
    )
