"""A model that lies on three nodes: its file, how it is loaded, what of it runs where."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.mesh.nodes import Lan, MeshNode, Nodes
from tests.models import WIDE

MODEL = f"wide-{WIDE.layers}x{WIDE.width}-F16"
CAPPED = ("--max-vram", "400MB")
"""Of a node: room for one of the model's three layers."""
READY_LIMIT_S = 90.0
"""Of a load, on two busy cores."""

ENGINE, RPC_SERVER = "llama-server", "ggml-rpc-server"
TUNNEL, CARRIER = "meshd.tunnel", "meshd.carrier"


@dataclass(frozen=True, slots=True)
class Placed:
    """Where the model lies, as one node sees it."""

    host: str
    state: str
    workers: tuple[str, ...]
    epoch: int
    plan: dict[str, Any] | None


def split_mesh(lan: Lan, *names: str) -> Nodes:
    return lan.mesh(*names, flags=dict.fromkeys(names, CAPPED))


def load(
    node: MeshNode, weights: Path | str, *options: str, context: int = 1024, slots: int = 1
) -> None:
    """Returns when it is ready. `weights`: a file, or what a hub calls it. With 1024 tokens in all
    slots it takes three `CAPPED` nodes."""
    shape = ("--ctx", str(context), "--parallel", str(slots))
    done = node.meshd("load", str(weights), *shape, *options)
    assert done.returncode == 0, done.stderr


def placed(node: MeshNode, *states: str) -> Placed | None:
    """The one host that `node` sees; None if there is none, or more than one, or none of
    `states`."""
    hosts = [h for m in node.status()["models"] if m["id"] == MODEL for h in m["hosts"]]
    if len(hosts) != 1 or (states and hosts[0]["state"] not in states):
        return None
    (host,) = hosts
    workers = () if host["plan"] is None else tuple(w["node"] for w in host["plan"]["workers"])
    return Placed(host["node"], host["state"], workers, host["epoch"], host["plan"])


def wait_placed(lan: Lan, *nodes: MeshNode, timeout_s: float = READY_LIMIT_S) -> Placed:
    """Where it is ready, once all `nodes` see the same and nothing runs or is leased beside it."""
    found: Placed | None = None

    def agreed() -> bool:
        nonlocal found
        found, *others = (placed(node, "ready") for node in nodes)
        return found is not None and all(o == found for o in others) and tidy(found, nodes)

    lan.until(agreed, timeout_s=timeout_s, what="all see one split, and nothing runs beside it")
    assert found is not None
    return found


def tidy(where: Placed | None, nodes: Collection[MeshNode]) -> bool:
    """Whether on `nodes` runs what belongs to that split, and nothing else; None: to none."""
    return all(
        (engine_parts(node), loans(node)) == (_due(where, node.name), _lends(where, node.name))
        for node in nodes
    )


def of(nodes: Collection[MeshNode], name: str) -> MeshNode:
    return next(node for node in nodes if node.name == name)


# -- what it says ---------------------------------------------------------------------------------


def answer(node: MeshNode, prompt: str, tokens: int) -> str:
    """The text of the whole answer, greedy."""
    status, _, body = node.request("POST", "/v1/completions", question(prompt, tokens))
    assert status == 200, body
    said = json.loads(body)
    assert said["usage"]["completion_tokens"] == tokens
    (choice,) = said["choices"]
    text: str = choice["text"]
    return text


def question(prompt: str, tokens: int) -> dict[str, Any]:
    greedy = {"temperature": 0, "seed": 1, "cache_prompt": False, "ignore_eos": True}
    return {"model": MODEL, "prompt": prompt, "max_tokens": tokens} | greedy


def logged(node: MeshNode, words: str) -> list[str]:
    """What it logged since it was made that has these words; the oldest line first."""
    lines = (node.data_dir / "stderr.txt").read_text().splitlines()
    return [line for line in lines if words in line]


# -- what runs ------------------------------------------------------------------------------------


def processes(node: MeshNode, kind: str) -> list[psutil.Process]:
    """Those of that kind on its host, whoever their parents are: an orphan is one too."""
    return [process for process in node.host.processes() if _kind(process) == kind]


def engine_parts(node: MeshNode) -> Counter[str]:
    """How many of each kind run on its host, of those that a split model has and nothing else."""
    kinds = Counter(map(_kind, node.host.processes()))
    return Counter({kind: kinds[kind] for kind in (ENGINE, RPC_SERVER, TUNNEL) if kinds[kind]})


def rpc_port(worker: MeshNode) -> int:
    """Of its RPC server, on its loopback."""
    (server,) = processes(worker, RPC_SERVER)
    return int(_option(server.cmdline(), "-p"))


def tunnel_ports(host: MeshNode) -> list[int]:
    """Ends of its tunnels, on its loopback, in the order of the workers."""
    (engine,) = processes(host, ENGINE)
    return [int(end.rpartition(":")[2]) for end in _option(engine.cmdline(), "--rpc").split(",")]


def loans(node: MeshNode) -> int:
    return round(metric(node, "meshd_loans"))


def sent(host: MeshNode) -> dict[str, int]:
    """Bytes that the tunnels of `host` carried to each worker so far."""
    found = {}
    for line in _metrics(host):
        name, _, value = line.rpartition(" ")
        if name.startswith("meshd_tunnel_bytes_total{") and 'direction="out"' in name:
            found[name.partition('peer="')[2].partition('"')[0]] = round(float(value))
    return found


def metric(node: MeshNode, name: str) -> float:
    (value,) = (line.split()[1] for line in _metrics(node) if line.split()[0] == name)
    return float(value)


def plan_of(node: MeshNode, ref: str = MODEL) -> dict[str, Any]:
    """What `meshd plan` says there; that it fits nowhere is an answer too."""
    done = node.meshd("plan", ref, "--json")
    assert done.stdout, done.stderr
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


def _metrics(node: MeshNode) -> list[str]:
    _, _, text = node.request("GET", "/metrics")
    return [line for line in text.decode().splitlines() if not line.startswith("#")]


def _due(where: Placed | None, name: str) -> Counter[str]:
    if where is not None and name == where.host:
        return Counter({ENGINE: 1, TUNNEL: 1})
    return Counter({RPC_SERVER: _lends(where, name)} if _lends(where, name) else {})


def _lends(where: Placed | None, name: str) -> int:
    return int(where is not None and name in where.workers)


def _kind(process: psutil.Process) -> str:
    try:
        argv = process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
    if "-m" in argv and (place := argv.index("-m") + 1) < len(argv):
        return argv[place]
    return Path(argv[0]).name if argv else ""


def _option(argv: list[str], name: str) -> str:
    return argv[argv.index(name) + 1]
