"""What `/mesh/*`, `/v1/models` and the events say of other nodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from meshd.api.events import changes
from meshd.api.status import model_list, status
from meshd.ids import InstanceId, MeshId, ModelId, NodeId
from meshd.view import (
    DeviceView,
    HostView,
    MeshState,
    MeshView,
    ModelState,
    ModelView,
    NodeState,
    NodeView,
    PeerModel,
    PeerState,
    PeerView,
    ProofView,
    Role,
    RuntimeView,
    Target,
    View,
    with_local,
    with_peers,
)
from tests.api.scripted import Api, peer_view, request

M = ModelId("m")
GPU = DeviceView("GPU 0", "cuda", "GPU-1", 8 << 30, 4 << 30, False, "9.0")


def node(name: str, state: NodeState = NodeState.READY) -> NodeView:
    return NodeView(
        NodeId(name[-1] * 52), name, "0.2", "member", state, 10.0, "127.0.0.1:9337", "0.0.0.0:9338"
    )


def own_model(name: str, instance: str, *, slots: int = 4) -> ModelView:
    host = HostView(
        name,
        NodeId(name[-1] * 52),
        1,
        ModelState.READY,
        4096,
        slots,
        slots,
        bytes_on_disk=1000,
        memory=(("CUDA0", 1200),),
        offloaded=(5, 5),
    )
    target = Target(M, name, InstanceId(instance), f"/run/{instance}.sock", slots)
    return ModelView(
        M, "m", ModelState.READY, created_at=7, hosts=(host,), targets=(target,), digest="d"
    )


def peer_of(view: View, *, state: PeerState = PeerState.ALIVE, free: int = 4) -> PeerView:
    """How `view`'s node is seen by the others."""
    return PeerView(
        view.node.id,
        view.node.name,
        state,
        Role.MEMBER,
        "10.0.0.7:9338",
        rtt_s=0.0012345,
        version="0.2",
        draining=view.node.state is NodeState.DRAINING,
        devices=(GPU,),
        backend="cuda",
        proof=ProofView("runtime", True, 7.0, ("offloaded 5/5 layers",)),
        models=tuple(
            PeerModel(
                m.id,
                m.ref,
                m.state,
                digest=m.digest,
                context_length=4096,
                created_at=m.created_at,
                bytes_on_disk=1000,
                memory=m.hosts[0].memory,
                offloaded=m.hosts[0].offloaded,
                instance=m.targets[0].instance,
                epoch=1,
                slots=m.targets[0].slots,
                slots_free=free,
            )
            for m in view.local.values()
        ),
    )


def two_nodes(
    b_state: NodeState = NodeState.READY, *, b_free: int = 4, a_free: int = 4
) -> tuple[View, View]:
    mesh = MeshView(MeshId("f" * 32), "home", MeshState.MEMBER)
    a = with_local(View(node=node("node-a"), mesh=mesh), {M: own_model("node-a", "ia")})
    b = with_local(View(node=node("node-b", b_state), mesh=mesh), {M: own_model("node-b", "ib")})
    return (
        with_peers(a, (peer_of(b, free=b_free),)),
        with_peers(b, (peer_of(a, free=a_free),)),
    )


def test_status_of_a_mesh() -> None:
    a, _ = two_nodes(b_free=1)
    said = status(a, "default", 12.5, {M: 3})
    assert said["node"] == {
        "id": "a" * 52,
        "name": "node-a",
        "version": "0.2",
        "role": "member",
        "state": "ready",
        "uptime_s": 2.5,
        "listen": "127.0.0.1:9337",
        "peer_listen": "0.0.0.0:9338",
    }
    assert said["mesh"] == {
        "id": "f" * 32,
        "name": "home",
        "members": 2,
        "alive": 2,
        "state": "member",
        "reason": None,
    }
    assert said["peers"] == [
        {
            "id": "b" * 52,
            "name": "node-b",
            "state": "alive",
            "address": "10.0.0.7:9338",
            "rtt_ms": 1.234,
            "version": "0.2",
            "role": "member",
            "draining": False,
            "models": ["m"],
            "devices": [
                {
                    "name": "GPU 0",
                    "backend": "cuda",
                    "uuid": "GPU-1",
                    "memory_total_bytes": 8 << 30,
                    "memory_free_bytes": 4 << 30,
                    "unified": False,
                    "compute_capability": "9.0",
                    "engine_name": None,
                    "driver": None,
                    "problem": None,
                    "memory_bytes_per_s": None,
                }
            ],
            "backend": "cuda",
            "proof": {
                "level": "runtime",
                "passed": True,
                "checked_at": 7.0,
                "evidence": ("offloaded 5/5 layers",),
                "layers": (),
                "problem": None,
            },
        }
    ]
    assert said["models"] == [
        {
            "id": "m",
            "ref": "m",
            "digest": "d",
            "state": "ready",
            "reason": None,
            "progress": None,
            "ambiguous": [],
            "fetch": None,
            "evidence": [],
            "hosts": [host("node-a", free=1), host("node-b", free=1)],
        }
    ]


def host(name: str, *, free: int, state: str = "ready") -> dict[str, Any]:
    return {
        "node": name,
        "node_id": name[-1] * 52,
        "epoch": 1,
        "state": state,
        "context_length": 4096,
        "slots": 4,
        "slots_free": free,
        "memory": {"CUDA0": 1200},
        "offloaded": (5, 5),
        "plan": {"kind": "solo", "workers": [{"node": name, "share": 1.0, "bytes": 1000}]},
    }


def by_node(view: View, in_use: int = 0) -> tuple[str, dict[str, Any]]:
    (model,) = status(view, "", 0.0, {M: in_use})["models"]
    return model["state"], {h["node"]: h for h in model["hosts"]}


def test_both_nodes_say_the_same_of_the_models() -> None:
    a, b = two_nodes(a_free=2, b_free=3)
    assert by_node(a, in_use=2) == by_node(b, in_use=1)
    a, b = two_nodes(NodeState.DRAINING)
    assert by_node(a) == by_node(b)
    assert by_node(b)[1]["node-b"]["state"] == "draining"
    assert by_node(b)[0] == "ready"


def test_a_model_of_draining_nodes_only_is_draining() -> None:
    _, b = two_nodes(NodeState.DRAINING)
    alone = with_peers(b, ())
    seen = with_peers(View(node=node("node-c")), (peer_of(b),))
    assert by_node(alone) == by_node(seen)
    assert by_node(seen)[0] == "draining"


def test_members_are_all_but_those_who_left_and_alive_those_who_answer() -> None:
    peers = tuple(
        peer_view(f"n{number}", state=state)
        for number, state in enumerate((*PeerState, PeerState.ALIVE))
    )
    mesh = status(with_peers(View(node=node("me")), peers), "default", 0.0, {})["mesh"]
    assert (mesh["members"], mesh["alive"]) == (5, 3)
    assert (mesh["name"], mesh["id"], mesh["state"]) == ("default", None, "none")


def test_v1_models_is_the_union() -> None:
    a, _ = two_nodes()
    (entry,) = model_list(a)["data"]
    assert entry["meshd"]["nodes"] == ["node-a", "node-b"]
    view = with_peers(a, (peer_view("node-c", "i", model="other"),))
    assert [m["id"] for m in model_list(view)["data"]] == ["m", "other"]


async def test_over_http(api: Api) -> None:
    api.publish_peers(peer_view("far", "i9", slots=8, free=5))
    (peer,) = (await api.ask(request(b"", "/mesh/peers", method="GET"))).json()
    assert (peer["name"], peer["state"], peer["models"]) == ("far", "alive", ["m"])
    (model,) = (await api.ask(request(b"", "/mesh/models", method="GET"))).json()
    assert [(h["node"], h["slots_free"]) for h in model["hosts"]] == [("node1", 4), ("far", 5)]
    said = (await api.ask(request(b"", "/mesh/status", method="GET"))).json()
    assert said["mesh"]["alive"] == 2
    assert api.server.status()["peers"] == [peer]
    page = (await api.ask(request(b"", "/", method="GET"))).body
    assert b'id="peers"' in page


# -- events ----------------------------------------------------------------------------------------


def test_events_of_other_nodes() -> None:
    before, _ = two_nodes()
    (peer,) = before.peers
    suspect = with_peers(before, (replace(peer, state=PeerState.SUSPECT),))
    assert [e for e in changes(before, suspect) if e["type"] == "peer"] == [
        {
            "type": "peer",
            "peer": "node-b",
            "id": "b" * 52,
            "state": "suspect",
            "previous": "alive",
            "draining": False,
        }
    ]
    drains = with_peers(before, (replace(peer, draining=True),))
    (event,) = changes(before, drains)
    assert (event["state"], event["previous"], event["draining"]) == ("alive", "alive", True)
    alone = with_peers(before, ())
    assert {"type": "peer_removed", "peer": "node-b", "id": "b" * 52, "previous": "alive"} in (
        changes(before, alone)
    )
    joined, proved = changes(alone, before)
    assert (joined["type"], joined["previous"]) == ("peer", None)
    assert (proved["type"], proved["backend"], proved["previous"]) == (
        "peer_runtime",
        "cuda",
        "cpu",
    )


def test_a_gpu_that_is_lost_is_an_event() -> None:
    before, _ = two_nodes()
    (peer,) = before.peers
    failed = ProofView("binary", False, 8.0, (), problem="the engine lists no such device")
    lost = with_peers(before, (replace(peer, backend="cpu", proof=failed),))
    (event,) = changes(before, lost)
    assert event["type"] == "peer_runtime"
    assert (event["backend"], event["previous"]) == ("cpu", "cuda")
    assert event["reason"] == "the engine lists no such device"
    runtime = RuntimeView("e", "cuda", "0.5", None, "/e", (), peer.proof or failed, "cuda")
    proved = replace(before, runtime=runtime)
    fallen = replace(proved, runtime=replace(runtime, backend="cpu", proof=failed))
    assert changes(proved, fallen) == [
        {
            "type": "runtime",
            "node": "node-a",
            "backend": "cpu",
            "previous": "cuda",
            "reason": "the engine lists no such device",
        }
    ]


def test_numbers_that_change_all_the_time_are_no_events() -> None:
    before, _ = two_nodes()
    (peer,) = before.peers
    busier = replace(peer, rtt_s=0.5, models=(replace(peer.models[0], slots_free=0),))
    after = with_peers(before, (busier,))
    assert after != before
    assert changes(before, after) == []


def test_events_of_the_mesh() -> None:
    before, _ = two_nodes()
    refused = replace(before, mesh=replace(before.mesh, state=MeshState.REFUSED, reason="revoked"))
    assert changes(before, refused) == [
        {
            "type": "mesh",
            "mesh": "home",
            "state": "refused",
            "previous": "member",
            "reason": "revoked",
        }
    ]
    assert changes(before, replace(before, mesh=replace(before.mesh, issuer=True))) == []


def test_what_a_node_could_load_is_not_what_it_works_on() -> None:
    could = tuple(
        PeerModel(ModelId(state.value), "x", state)
        for state in (ModelState.ABSENT, ModelState.LOADING, ModelState.FAILED)
    )
    far = PeerView(NodeId("r" * 52), "far", PeerState.ALIVE, models=could)
    (peer,) = status(View(node=node("near"), peers=(far,)), "", 0.0, {})["peers"]
    assert peer["models"] == ["loading", "failed"]
