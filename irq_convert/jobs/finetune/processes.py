"""Which of torchrun's processes this is, and which device it computes on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import distributed

from irq_convert.errors import UsageError
from irq_convert.hf.causal_lm import check_device
from irq_convert.jobs.common.ranks import Ranks


class Processes(Ranks):
    """The processes of a training run, which talk through torch's process group."""

    def same(self, value: Any) -> Any:
        """The first process's `value`, in every process."""
        if self.count == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every process the first one's numbers."""
        if self.count > 1:
            for tensor in tensors:
                distributed.broadcast(tensor.detach(), src=0)

    def largest(self, values: list[int], device: torch.device) -> list[int]:
        """The largest of every process's numbers, one by one."""
        if self.count == 1:
            return values
        shared = torch.tensor(values, device=device)
        distributed.all_reduce(shared, op=distributed.ReduceOp.MAX)
        found: list[int] = shared.tolist()
        return found

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            distributed.barrier()


def choose_device(asked: str, processes: Processes) -> str:
    """The torch device of this process: `cpu`, or a GPU, with torchrun one for each process.

    Raises `UsageError` where the device is absent, or one GPU is named for several processes.
    """
    name = asked
    if asked == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = processes.device(name)
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise UsageError(f"--device {asked}: not a device; choose cpu, cuda or auto") from None
    check_device(name)
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"--device {asked}: training runs on cpu and cuda")
    if kind == "cuda" and ":" not in name:
        name = "cuda:0"
    return name


def good_at_bfloat16(device: str) -> bool:
    """Whether bfloat16 is the faster choice there; a CPU mostly emulates it."""
    return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
