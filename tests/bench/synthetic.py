"""A LLaMA checkpoint of any depth with random weights, written tile by tile.

Run `python tests/bench/synthetic.py OUT --layers N`: a folder with the shapes of LLaMA-7B (hidden
4096, intermediate 11008, vocabulary 32000, bfloat16, untied), N layers, in shards of 2 GB with an
index, for measuring memory and throughput. Weights are cut at random places from one block of
normal numbers, so that a tensor costs little more than its writing; there is no tokenizer.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POOL = 32 << 20
TILE = 4 << 20


@dataclass(frozen=True)
class Shapes:
    """Sizes of a LLaMA; the defaults are those of the 7B model."""

    layers: int
    hidden: int = 4096
    intermediate: int = 11008
    vocab: int = 32000

    @property
    def heads(self) -> int:
        """Attention heads of 128 each, one when `hidden` is smaller or odd."""
        return self.hidden // 128 if self.hidden % 128 == 0 else 1

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order of the model."""
        square, wide = (self.hidden, self.hidden), (self.intermediate, self.hidden)
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            name = f"model.layers.{layer}"
            for part in "qkvo":
                yield f"{name}.self_attn.{part}_proj.weight", square
            for part in ("gate", "up"):
                yield f"{name}.mlp.{part}_proj.weight", wide
            yield f"{name}.mlp.down_proj.weight", (self.hidden, self.intermediate)
            for part in ("input_layernorm", "post_attention_layernorm"):
                yield f"{name}.{part}.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    def config(self) -> dict[str, Any]:
        """What goes into `config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 4096,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
        }


class Noise:
    """Normal numbers in bfloat16 by the tile: random cuts from a pool of 64 MB, rescaled."""

    def __init__(self, seed: int) -> None:
        import torch

        self._generator = torch.Generator().manual_seed(seed)
        # Longer than the pool by a tile, so that a cut may begin anywhere in it.
        self._pool = torch.empty(POOL + TILE, dtype=torch.bfloat16)
        for start in range(0, POOL, TILE):
            normal = torch.randn(TILE, generator=self._generator)
            self._pool[start : start + TILE] = normal.bfloat16()
        self._pool[POOL:] = self._pool[:TILE]

    def tiles(self, shape: tuple[int, ...]) -> Iterator[memoryview]:
        """The bytes of a tensor: matrices with deviation 0.02 or so, vectors around one."""
        import torch

        from irq_convert.checkpoint.buffers import tensor_bytes

        count = 1
        for size in shape:
            count *= size
        scale = 0.02 * (0.5 + torch.rand((), generator=self._generator).item())
        for start in range(0, count, TILE):
            at = int(torch.randint(POOL, (), generator=self._generator))
            tile = self._pool[at : at + min(TILE, count - start)] * scale
            yield tensor_bytes(tile + 1 if len(shape) == 1 else tile)


def write_synthetic(
    out: Path, shapes: Shapes, *, seed: int = 0, shard_bytes: int = 2_000_000_000
) -> int:
    """Write the checkpoint into the folder `out`, new or empty; return the bytes of its tensors.

    Equal arguments give equal bytes. Raises `UsageError` for a folder that is not empty and
    `IrqError` when the disk is too small or fails; then nothing is left in it.
    """
    from irq_convert.checkpoint.disk import output_folder, require_space
    from irq_convert.checkpoint.files import write_json_atomic
    from irq_convert.checkpoint.shards import INDEX_NAME, build_index, plan_shards, shard_name
    from irq_convert.checkpoint.writer import ShardWriter, TensorSpec

    specs = {name: TensorSpec(name, "BF16", shape) for name, shape in shapes.tensors()}
    total = sum(spec.nbytes for spec in specs.values())
    with output_folder(out) as folder:
        require_space(out, total, "write the checkpoint")
        noise = Noise(seed)
        groups = plan_shards([(name, spec.nbytes) for name, spec in specs.items()], shard_bytes)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(groups, 1):
            file = shard_name(number, len(groups))
            weight_map |= dict.fromkeys(names, file)
            with ShardWriter(folder / file, [specs[name] for name in names]) as writer:
                for name in names:
                    offset = 0
                    for tile in noise.tiles(specs[name].shape):
                        writer.write(name, tile, offset)
                        offset += len(tile)
        if len(groups) > 1:
            write_json_atomic(folder / INDEX_NAME, build_index(weight_map, total))
        write_json_atomic(folder / "config.json", shapes.config())
        generation = {"bos_token_id": 1, "eos_token_id": 2, "_from_model_config": True}
        write_json_atomic(folder / "generation_config.json", generation)
    return total


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="a new or empty folder")
    parser.add_argument("--layers", type=int, default=4, help="each is 405 MB (default 4)")
    parser.add_argument("--hidden", type=int, default=Shapes.hidden)
    parser.add_argument("--intermediate", type=int, default=Shapes.intermediate)
    parser.add_argument("--vocab", type=int, default=Shapes.vocab)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if min(args.layers, args.hidden, args.intermediate, args.vocab) < 1:
        parser.error("sizes must be positive")
    from irq_convert.errors import IrqError

    shapes = Shapes(args.layers, args.hidden, args.intermediate, args.vocab)
    try:
        total = write_synthetic(args.out, shapes, seed=args.seed)
    except IrqError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    free = shutil.disk_usage(args.out).free
    print(f"{args.out}: {total / 1e9:.2f} GB of weights, {free / 1e9:.1f} GB left on the disk")


if __name__ == "__main__":
    main()
