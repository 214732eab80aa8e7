"""What may go wrong between a client and the Hub: each fault strikes a number of requests."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

KINDS = ("status", "drop", "reset", "short", "corrupt", "slow", "lost")


@dataclass
class Fault:
    """Answers the next `times` requests of `method` whose path matches `path` with a fault.

    `status` answers with an error; `drop` ends the connection in the middle of the body, `reset`
    the hard way; `short` sends half of the body as if it were all; `corrupt` changes a byte;
    `slow` sends in small pieces with a pause after each; `lost` does what was asked and gives no
    answer.
    """

    kind: str
    method: str = "GET"
    path: str = ""
    times: int = 1
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    pause: float = 0.02
    struck: int = 0

    def strikes(self, method: str, path: str) -> bool:
        assert self.kind in KINDS
        if self.struck >= self.times or method != self.method or not re.search(self.path, path):
            return False
        self.struck += 1
        return True
