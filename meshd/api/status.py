"""The JSON of `/mesh/status` and `/v1/models`, out of the view and our own counts. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from meshd.ids import ModelId
from meshd.view import HostView, ModelView, RuntimeView, View

SlotsInUse = Callable[[ModelId], int]


def status(view: View, mesh: str, now: float, slots_in_use: SlotsInUse) -> dict[str, Any]:
    """INTERFACES' `/mesh/status`. `now`: monotonic."""
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
        "mesh": {"id": None, "name": mesh, "members": 1, "alive": 1},
        "runtime": None if view.runtime is None else _runtime(view.runtime),
        "devices": [asdict(device) for device in view.devices],
        "peers": peers(view),
        "models": models(view, slots_in_use),
        "cache": None if view.cache is None else asdict(view.cache),
    }


def peers(view: View) -> list[dict[str, Any]]:
    """Other nodes; there are none before nodes find each other."""
    return []


def models(view: View, slots_in_use: SlotsInUse) -> list[dict[str, Any]]:
    return [_model(model, slots_in_use(model.id)) for model in view.models.values()]


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


def _model(model: ModelView, in_use: int) -> dict[str, Any]:
    return {
        "id": model.id,
        "ref": model.ref,
        "digest": model.digest,
        "state": model.state.value,
        "reason": model.reason,
        "progress": model.progress,
        "evidence": list(model.evidence),
        "hosts": [_host(host, in_use) for host in model.hosts],
    }


def _host(host: HostView, in_use: int) -> dict[str, Any]:
    return {
        "node": host.node,
        "node_id": host.node_id,
        "epoch": host.epoch,
        "state": host.state.value,
        "context_length": host.context_length,
        "slots": host.slots,
        "slots_free": max(0, host.slots - in_use),
        "plan": {
            "kind": "solo",
            "workers": [{"node": host.node, "share": 1.0, "bytes": host.bytes_on_disk}],
        },
    }


def _runtime(runtime: RuntimeView) -> dict[str, Any]:
    return {
        "id": runtime.id,
        "backend": runtime.backend,
        "build": runtime.build,
        "rpc_protocol": runtime.rpc_protocol,
        "directory": runtime.directory,
        "binaries": [asdict(binary) for binary in runtime.binaries],
        "proof": asdict(runtime.proof),
    }
