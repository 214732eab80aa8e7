"""One process of a distributed training, as torchrun starts it.

Trains the artifact in BASE with DDP and with FSDP2, each process on its half of the batch, and
leaves what the test compares in the file OUT.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import irq_convert
from irq_convert.nn.packed import statistics_parameters

from .helpers import iec_config, packed_layers, randomize, tokens

BLOCK = {"pool": "block"}
STATISTICS = {"r": 0, "statistics": "both"}
BATCH = 4
STEPS = 2


def attached(base: Path, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    model = irq_convert.attach(irq_convert.load(base), iec_config(**options))
    randomize(model, size=0.05)
    return model.train()


def train(model: nn.Module, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Losses of the whole batch and the first gradients, of one process's share of the rows."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    losses, grads = [], {}
    for step in range(STEPS):
        ids = tokens(BATCH, seed=step)[rank::world]
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if step == 0:
            grads = {n.removeprefix("module."): whole(p.grad) for n, p in trained.items()}
        optimizer.step()
        total = loss.detach().clone()
        if world > 1:
            distributed.all_reduce(total)
        losses.append(float(total) / world)
    return {"losses": losses, "grads": grads}


def whole(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().clone()


def shard(model: PeftModel, **options: Any) -> PeftModel:
    """FSDP2 as one does it by hand: every decoder layer, then the rest."""
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def sharded_dtypes(model: nn.Module) -> dict[str, tuple[bool, torch.dtype]]:
    parts = {n: p for m in packed_layers(model).values() for n, p in m.packed_parts().items()}
    return {name: (isinstance(part, DTensor), part.dtype) for name, part in parts.items()}


def mixed(base: Path, ignored: bool) -> PeftModel:
    model = attached(base)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    parts = statistics_parameters(model) if ignored else None
    return shard(model, mp_policy=policy, ignored_params=parts)


def main(base: Path, out: Path) -> None:
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    found: dict[str, Any] = {"world": world}
    found["ddp"] = train(DistributedDataParallel(attached(base)), rank, world)
    found["ddp block"] = train(DistributedDataParallel(attached(base, **BLOCK)), rank, world)
    found["ddp statistics"] = train(
        DistributedDataParallel(attached(base, **STATISTICS)), rank, world
    )
    found["fsdp statistics"] = train(shard(attached(base, **STATISTICS)), rank, world)
    model = shard(attached(base))
    found["fsdp"] = train(model, rank, world)
    found["fsdp parts"] = sharded_dtypes(model)
    model = mixed(base, ignored=True)
    found["mixed"] = train(model, rank, world)
    found["mixed parts"] = sharded_dtypes(model)
    try:
        train(mixed(base, ignored=False), rank, world)
        found["unignored"] = ""
    except irq_convert.IrqError as error:
        found["unignored"] = str(error)
    if rank == 0:
        torch.save(found, out)
    distributed.destroy_process_group()
