"""What a node costs that has nothing to do, in a small mesh and in a large one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.lan import Node, invite_from, until_whole
from bench.processes import Stable, cpu_s, rss_bytes
from tests.mesh.network import Network

SETTLE_S = 20.0
"""From the first whole view to the measurement: news is told, caches are warm."""
AT_ONCE = 4
"""Nodes started together: they share two cores while they import."""
POLL_S = 0.5
"""Many nodes on few cores: asking them all without a pause would be most of what they do."""
WHOLE_LIMIT_S = 60.0
SAMPLE_S = 1.0


@dataclass(frozen=True, slots=True)
class Crowd:
    """Of all nodes of one mesh, idle."""

    nodes: int
    seconds: float
    rss_mb_median: float
    rss_mb_most: float
    """The largest seen of any."""
    cpu_percent_median: float
    cpu_percent_most: float
    """Of one core."""


def idle(
    stable: Stable, lan: Network, work: Path, runtime_dir: Path, *, size: int, seconds: float
) -> Crowd:
    """Start a mesh of `size`, each node on a host of its own with mDNS on, and let it be."""
    nodes = [
        Node(stable, lan.add(name), work / name, runtime_dir)
        for name in (f"m{size}x{number}" for number in range(1, size + 1))
    ]
    nodes[0].start("--mesh", f"crowd{size}")
    token = invite_from(nodes[0].data_dir, uses=size)
    for at in range(1, size, AT_ONCE):
        for node in nodes[at : at + AT_ONCE]:
            node.start("--join", token)
        until_whole(nodes[: at + AT_ONCE], limit_s=WHOLE_LIMIT_S, poll_s=POLL_S)
    time.sleep(SETTLE_S)
    crowd = _watch([node.pid for node in nodes], seconds)
    for node in nodes:
        node.stop()
    return crowd


def _watch(pids: list[int], seconds: float) -> Crowd:
    began = time.monotonic()
    before = {pid: cpu_s(pid) for pid in pids}
    largest = dict.fromkeys(pids, 0)
    while (left_s := seconds - (time.monotonic() - began)) > 0:
        for pid in pids:
            largest[pid] = max(largest[pid], rss_bytes(pid))
        time.sleep(min(SAMPLE_S, left_s))
    passed_s = time.monotonic() - began
    percent = [100 * (cpu_s(pid) - before[pid]) / passed_s for pid in pids]
    megabytes = [largest[pid] / 1e6 for pid in pids]
    return Crowd(
        nodes=len(pids),
        seconds=round(passed_s, 1),
        rss_mb_median=median(megabytes),
        rss_mb_most=max(megabytes),
        cpu_percent_median=median(percent),
        cpu_percent_most=max(percent),
    )
