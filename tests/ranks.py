"""Processes of one run as torchrun starts them, forked from one that has imported everything."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch.distributed import TCPStore


def agent_store(count: int) -> tuple[TCPStore, dict[str, str]]:
    """The store of torchrun's agent, to be kept as long as they live, and what it tells them."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    return store, told | {"TORCHELASTIC_USE_AGENT_STORE": "True"}


def run_ranks(count: int, run: Callable[[], int]) -> int:
    """`run()` in `count` processes at once; the largest exit status."""
    pids = []
    for rank in range(count):
        pid = os.fork()
        if not pid:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            os._exit(run())
        pids.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
