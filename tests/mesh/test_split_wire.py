"""What a model on three nodes says over the network, and to whom."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from meshd.errors import PeerRefused
from meshd.peers.bulk.dialing import open_stream
from meshd.peers.bulk.words import Credentials, der_to_wire
from meshd.peers.trust.credentials import MeshStore
from meshd.peers.trust.identity import load_or_create
from tests.mesh.network import Host
from tests.mesh.nodes import PEER_PORT, Lan, MeshNode, Nodes
from tests.mesh.splitting import (
    CAPPED,
    MODEL,
    Placed,
    load,
    loans,
    of,
    placed,
    plan_of,
    rpc_port,
    split_mesh,
    tunnel_ports,
    wait_placed,
)
from tests.mesh.wire import ARP, NEIGHBOURS, Capture
from tests.models import WIDE, wide_model

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MIB = 1 << 20
SAMPLE_BYTES = 32
CONNECT_LIMIT_S = 5.0
OLD_PROTOCOL = (6, 0, 0)


@dataclass(frozen=True, slots=True)
class Peer:
    """Whom to dial; see `meshd.peers.bulk.dialing.Peer`."""

    node_id: str
    name: str
    addresses: tuple[str, ...]


@pytest.mark.timeout(400)
def test_only_tls_crosses_the_network_and_only_the_host_gets_through(engine_lan: Lan) -> None:
    weights = wide_model()
    samples = _samples(weights)
    nodes = a, *_ = split_mesh(engine_lan, "a", "b", "c")
    with Capture(engine_lan.network, PEER_PORT, samples) as seen:
        load(a, weights, "--host", "a")
        question = {"model": MODEL, "prompt": "hi", "max_tokens": 8}
        assert a.request("POST", "/v1/completions", question)[0] == 200
    assert seen.dropped == 0
    assert seen.carried.keys() <= {"tcp", ARP, NEIGHBOURS}
    where = wait_placed(engine_lan, *nodes)
    assert where.plan is not None
    assert seen.carried["tcp"] > 2 * WIDE.parameters * sum(_shares(where))
    assert not seen.found
    stranger = engine_lan.network.add("stranger")
    _would_have_been_seen(engine_lan, stranger, a, weights, samples)
    _nobody_else_gets_through(stranger, nodes, where)


@pytest.mark.timeout(400)
def test_an_engine_of_another_protocol_is_no_worker(engine_lan: Lan, old_engine: Path) -> None:
    a, b = split_mesh(engine_lan, "a", "b")
    token = a.invite(uses=2)
    old = engine_lan.node("old", "--join", token, *CAPPED, engine_dir=old_engine).start()
    engine_lan.wait_whole(a, b, old)
    weights = wide_model()
    load(a, weights, "--no-wait")
    why = "old lends nothing (RPC protocol 6.0.0, not 7.0.0)"
    engine_lan.until(
        lambda: all(why in (n.model(MODEL)["reason"] or "") for n in (a, b, old)),
        timeout_s=20,
        what=why,
    )
    assert {n.model(MODEL)["state"] for n in (a, b, old)} == {"waiting"}
    assert any(why in node["why"] for node in plan_of(a)["nodes"])

    c = engine_lan.node("c", "--join", token, *CAPPED).start()
    where = wait_placed(engine_lan, a, b, c, old)
    assert {where.host, *where.workers} == {"a", "b", "c"}


# -- steps ----------------------------------------------------------------------------------------


@pytest.fixture
def old_engine(engine_dir: Path, short_dir: Path) -> Path:
    """The real engine, and beside it an RPC server that knows no more than to say it is older."""
    directory = short_dir / "old-engine"
    directory.mkdir()
    server = directory / "llama-server"
    server.write_text(f'#!/bin/sh\nexec "{engine_dir}/llama-server" "$@"\n')
    rpc_server = directory / "ggml-rpc-server"
    rpc_server.write_text(
        f"#!{sys.executable}\n"
        "import socket, sys\n"
        "port = int(sys.argv[sys.argv.index('-p') + 1])\n"
        "with socket.create_server(('127.0.0.1', port)) as listener:\n"
        "    while True:\n"
        "        connection, _ = listener.accept()\n"
        "        with connection:\n"
        "            connection.recv(64)\n"
        f"            connection.sendall((28).to_bytes(8, 'little') + bytes({OLD_PROTOCOL}))\n"
        "            connection.sendall(bytes(25))\n"
    )
    for binary in (server, rpc_server):
        binary.chmod(0o755)
    return directory


def _samples(weights: Path) -> list[bytes]:
    """Bytes of each large tensor, from another place in each."""
    import gguf

    data = weights.read_bytes()
    tensors = [t for t in gguf.GGUFReader(weights).tensors if t.n_bytes > 10 * MIB]
    offsets = [t.data_offset + n * t.n_bytes // len(tensors) for n, t in enumerate(tensors)]
    return [data[offset : offset + SAMPLE_BYTES] for offset in map(int, offsets)]


def _shares(where: Placed) -> list[float]:
    assert where.plan is not None
    return [worker["share"] for worker in where.plan["workers"]]


def _would_have_been_seen(
    lan: Lan, host: Host, to: MeshNode, weights: Path, samples: list[bytes]
) -> None:
    """Weights that go over the network as they are, and another port, are found by such a look."""
    with to.host.inside():
        listener = socket.create_server(("", 0))
    with listener, Capture(lan.network, PEER_PORT, samples[:1]) as seen:
        port = listener.getsockname()[1]
        with _connection(host, to, port) as sender:
            taker, _ = listener.accept()
            with taker:
                sender.sendall(samples[0])
                assert taker.recv(SAMPLE_BYTES) == samples[0]
    assert seen.found == {samples[0]}
    assert any(name.startswith("tcp (") and str(port) in name for name in seen.carried)


def _nobody_else_gets_through(stranger: Host, nodes: Nodes, where: Placed) -> None:
    host, worker, other = (of(nodes, name) for name in (where.host, *where.workers))
    ends = [(worker, rpc_port(worker)), *((host, port) for port in tunnel_ports(host))]
    for node, port in ends:
        with _connection(stranger, node, PEER_PORT):
            pass  # it reaches the machine
        with pytest.raises(ConnectionRefusedError), _connection(stranger, node, port):
            pass
    # A member that lends itself, and knows the name of the host's loan.
    (loan,) = (path.stem for path in worker.data_dir.glob("run/loan-*.pid"))
    peer, credentials = Peer(worker.id, worker.name, (worker.peer_address,)), _credentials(other)
    wanted = {"t": "open", "service": "rpc", "instance": loan}
    with other.host.inside(), pytest.raises(PeerRefused) as refused:
        open_stream(credentials, peer, wanted)
    assert refused.value.reason == "no_loan"
    assert [loans(node) for node in (host, worker, other)] == [0, 1, 1]
    assert placed(host) == where


def _credentials(node: MeshNode) -> Credentials:
    membership = MeshStore(node.data_dir / "mesh", load_or_create(node.data_dir)).load()
    assert membership is not None
    return Credentials(
        ca_der=der_to_wire(membership.ca_certificate),
        certificate_path=str(membership.certificate_path),
        key_path=str(load_or_create(node.data_dir).key_path),
        mesh_id=membership.mesh_id,
    )


@contextmanager
def _connection(host: Host, to: MeshNode, port: int) -> Iterator[socket.socket]:
    with host.inside():
        made = socket.create_connection((to.host.address, port), timeout=CONNECT_LIMIT_S)
    with made:
        yield made
