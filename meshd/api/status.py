"""The JSON of `/mesh/status` and `/v1/models`, out of the view and our own counts. Pure.

The same shape on every node; what differs is who `node` is. `own_in_use` everywhere: slots of this
node's engines that are taken. Of other nodes' slots the view says what they reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from meshd.api.withdrawal import withdrawn_models
from meshd.ids import ModelId, NodeId
from meshd.view import (
    Deployment,
    FetchView,
    HostView,
    ModelState,
    ModelView,
    PeerState,
    PeerView,
    RuntimeView,
    View,
)


def status(
    view: View, founded_as: str, now: float, own_in_use: Mapping[ModelId, int]
) -> dict[str, Any]:
    """INTERFACES' `/mesh/status`. `founded_as`: what a mesh is called here before there is one.
    `now`: monotonic."""
    node = view.node
    return {
        "node": {
            "id": node.id,
            "name": node.name,
            "version": node.version,
            "role": node.role,
            "state": node.state.value,
            "uptime_s": round(max(0.0, now - node.started_at), 3),
            "listen": node.listen,
            "peer_listen": node.peer_listen,
        },
        "mesh": _mesh(view, founded_as),
        "runtime": None if view.runtime is None else _runtime(view.runtime),
        "devices": [asdict(device) for device in view.devices],
        "peers": peers(view),
        "models": models(view, own_in_use),
        "deployments": deployments(view),
        "cache": None if view.cache is None else asdict(view.cache),
    }


def peers(view: View) -> list[dict[str, Any]]:
    """Other nodes, those that died or left included while they are remembered."""
    return [_peer(peer) for peer in view.peers]


def models(view: View, own_in_use: Mapping[ModelId, int]) -> list[dict[str, Any]]:
    return [_model(view, model, own_in_use) for model in view.models.values()]


def deployments(view: View) -> list[dict[str, Any]]:
    """What the mesh should serve. `host` and `origin`: names of nodes, or ids of unknown ones."""
    names = {peer.id: peer.name for peer in view.peers} | {view.node.id: view.node.name}
    return [_deployment(d, names) for d in view.deployments if not d.removed]


def _deployment(deployment: Deployment, names: Mapping[NodeId, str]) -> dict[str, Any]:
    host, origin = deployment.host, deployment.origin
    return {
        "model": deployment.model,
        "ref": deployment.ref,
        "version": deployment.version,
        "replicas": deployment.replicas,
        "context": deployment.context,
        "parallel": deployment.parallel,
        "host": None if host is None else names.get(host, host),
        "cause": deployment.cause.value,
        "asleep": deployment.asleep,
        "origin": names.get(origin, origin),
    }


def model_list(view: View) -> dict[str, Any]:
    """OpenAI's list."""
    return {"object": "list", "data": [model_entry(view, m) for m in view.models.values()]}


def model_entry(view: View, model: ModelView) -> dict[str, Any]:
    """OpenAI's model object, and what meshd knows beyond it."""
    return {
        "id": model.id,
        "object": "model",
        "created": model.created_at,
        "owned_by": "meshd",
        "meshd": {
            "state": model.state.value,
            "digest": model.digest,
            "context_length": model.context_length,
            "capabilities": list(model.capabilities),
            "nodes": [host.node for host in model.hosts],
        },
    }


def _mesh(view: View, founded_as: str) -> dict[str, Any]:
    """`members`: who belongs to it, dead ones too, this node included; `alive`: who answers."""
    mesh, states = view.mesh, [peer.state for peer in view.peers]
    return {
        "id": mesh.id,
        "name": mesh.name or founded_as,
        "members": 1 + sum(state is not PeerState.LEFT for state in states),
        "alive": 1 + sum(state is PeerState.ALIVE for state in states),
        "state": mesh.state.value,
        "reason": mesh.reason,
    }


def _peer(peer: PeerView) -> dict[str, Any]:
    return {
        "id": peer.id,
        "name": peer.name,
        "state": peer.state.value,
        "address": peer.address,
        "rtt_ms": None if peer.rtt_s is None else round(peer.rtt_s * 1000, 3),
        "version": peer.version,
        "role": peer.role.value,
        "draining": peer.draining,
        # Those it works on; every member could load the built-in one.
        "models": [m.id for m in peer.models if m.state is not ModelState.ABSENT],
        "devices": [asdict(device) for device in peer.devices],
        "backend": peer.backend,
        "proof": None if peer.proof is None else asdict(peer.proof),
    }


def _model(view: View, model: ModelView, own_in_use: Mapping[ModelId, int]) -> dict[str, Any]:
    # An engine of this node counts under its plain name, whatever the model is called here.
    ours = next((t.model for t in model.targets if t.local), model.id)
    withdrawn = ours in withdrawn_models(view)
    hosts = [_host_now(view, host, own_in_use.get(ours, 0), withdrawn) for host in model.hosts]
    state = model.state
    if state is ModelState.READY and all(h.state is ModelState.DRAINING for h in hosts) and hosts:
        state = ModelState.DRAINING
    return {
        "id": model.id,
        "ref": model.ref,
        "digest": model.digest,
        "state": state.value,
        "reason": model.reason,
        "progress": model.progress,
        "ambiguous": list(model.ambiguous),
        "fetch": None if model.fetch is None else fetch(model.fetch),
        "evidence": list(model.evidence),
        "hosts": [_host(host) for host in hosts],
    }


def _host_now(view: View, host: HostView, own_in_use: int, withdrawn: bool) -> HostView:
    """For a host that is this node, what other nodes see of it: its slots that are free by our own
    count, and draining once its engine takes no new requests because the node drains."""
    if host.node_id != view.node.id:
        return host
    drains = withdrawn and host.state is ModelState.READY
    return replace(
        host,
        slots_free=max(0, host.slots - own_in_use),
        state=ModelState.DRAINING if drains else host.state,
    )


def _host(host: HostView) -> dict[str, Any]:
    return {
        "node": host.node,
        "node_id": host.node_id,
        "epoch": host.epoch,
        "state": host.state.value,
        "context_length": host.context_length,
        "slots": host.slots,
        "slots_free": host.slots_free,
        "memory": dict(host.memory),
        "offloaded": host.offloaded,
        "plan": _plan(host),
    }


def _plan(host: HostView) -> dict[str, Any]:
    """Who holds the model: its host alone, or workers with it. `share`: of the layers, by bytes;
    what the workers do not hold is the host's. `bytes`: of a host alone its weights, of workers
    the memory they lend."""
    if not host.workers:
        alone = {"node": host.node, "share": 1.0, "bytes": host.bytes_on_disk}
        return {"kind": "solo", "workers": [alone]}
    workers = [{"node": w.name, "share": w.share, "bytes": w.bytes} for w in host.workers]
    return {"kind": "split", "workers": workers}


def fetch(now: FetchView) -> dict[str, Any]:
    """Weights on their way; `sources` maps `hub` and names of nodes to bytes."""
    return {**asdict(now), "sources": dict(now.sources)}


def _runtime(runtime: RuntimeView) -> dict[str, Any]:
    return {
        "id": runtime.id,
        "backend": runtime.backend,
        "built_for": runtime.built_for,
        "build": runtime.build,
        "rpc_protocol": runtime.rpc_protocol,
        "directory": runtime.directory,
        "binaries": [asdict(binary) for binary in runtime.binaries],
        "proof": asdict(runtime.proof),
    }
