"""What a mesh that has nothing to do should serve: `--auto`. Pure; sizes are bytes.

Nothing but the size of the weights is known before a model is fetched, so this is a rule of thumb;
whether it really fits is counted from its headers when it is deployed, as of every model.

Rules, numbered as in the code:

1. A model fits if a quarter more than its weights and `BESIDE_BYTES` are there: context, prompts
   and the engine's buffers come on top of them.
2. Where there are accelerators it has to fit into those, all of them together; without any into
   main memory, and of that no more than `CPU_BYTES` count: a CPU reads all weights for each token.
3. The largest that fits is chosen. One that lies on the disk already goes before it if it has at
   least half its size: it answers now, and what a larger one knows more is not worth the download.
4. Of equal ones the first in the catalog.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from meshd.election.fit import Budget

BESIDE_BYTES: Final = 1 << 30
CPU_BYTES: Final = 8 * 10**9
"""Weights of 5.5 GB: some tokens a second on an ordinary machine."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model of the catalog."""

    name: str
    ref: str
    size_bytes: int
    """Of its weights."""
    on_disk: bool
    """They lie verified on this node's disk."""


def choose(catalog: Iterable[Candidate], memory: Sequence[Budget]) -> Candidate | None:
    """What to deploy on a node with these memories; None if nothing fits."""
    usable = usable_bytes(memory)
    fitting = [c for c in catalog if c.size_bytes * 5 // 4 + BESIDE_BYTES <= usable]  # 1
    if not fitting:
        return None
    largest = max(fitting, key=_size)  # 3, 4
    here = max((c for c in fitting if c.on_disk), key=_size, default=largest)
    return here if 2 * here.size_bytes >= largest.size_bytes else largest


def usable_bytes(memory: Sequence[Budget]) -> int:
    """What a model chosen here may take in all (2)."""
    accelerators = [budget.usable for budget in memory if budget.accelerator]
    if accelerators:
        return sum(accelerators)
    return min(CPU_BYTES, sum(budget.usable for budget in memory))


def _size(candidate: Candidate) -> int:
    return candidate.size_bytes
