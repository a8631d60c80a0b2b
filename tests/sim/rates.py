"""What an idle node sends in meshes of different sizes; `python -m tests.sim.rates` prints it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tests.sim.world import World

SETTLE_S = 4.0
MEASURE_S = 8.0
"""Two rounds of digests."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Per node and second, sent; bytes as estimated for frames of JSON."""

    nodes: int
    messages: float
    bytes: float


def measure(nodes: int, seed: int = 1, measure_s: float = MEASURE_S) -> Rate:
    """In steady state: nobody comes or goes, nothing is lost."""
    world = World(seed, nodes)
    world.run(SETTLE_S)
    messages, size = world.messages, world.bytes
    world.run(measure_s)
    share = nodes * measure_s
    return Rate(nodes, (world.messages - messages) / share, (world.bytes - size) / share)


def table(rates: Iterable[Rate]) -> str:
    lines = [f"{'nodes':>6} {'messages/s':>11} {'bytes/s':>9}   per node, sent"]
    lines += [f"{r.nodes:>6} {r.messages:>11.2f} {r.bytes:>9.0f}" for r in rates]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(measure(nodes) for nodes in (3, 8, 32, 256, 1000)))  # noqa: T201
