"""Other users of the machines that a split lies on: what they reach of it, and what comes then."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import pytest

from meshd.node.lending import WATCH_S
from meshd.runtime.lending import rpc_words
from tests.mesh.nodes import REACTION_S, Lan, MeshNode
from tests.mesh.splitting import (
    MODEL,
    RPC_SERVER,
    answer,
    load,
    logged,
    of,
    placed,
    processes,
    rpc_port,
    sent,
    split_mesh,
    tidy,
    tunnel_ports,
    wait_placed,
)
from tests.models import wide_model

pytestmark = [pytest.mark.engine, pytest.mark.slow]

NOBODY = 65534
PROMPT, TOKENS = "Two users of one machine", 12
TOLD_LIMIT_S = 5.0
"""Until the daemon tells of what its process of tunnels refused."""
ENDED_LIMIT_S = WATCH_S + REACTION_S
"""From a stranger's connection to the end of the RPC server."""
SERVED_LIMIT_S = 60.0

_SPEAK = """
import socket, sys
heard = 0
with socket.create_connection(("127.0.0.1", int(sys.argv[1])), 5) as connection:
    print("connected", flush=True)
    connection.settimeout(60)
    try:
        connection.sendall(bytes.fromhex(sys.argv[2]))
        while data := connection.recv(4096):
            heard += len(data)
    except (ConnectionResetError, BrokenPipeError):
        pass
print(heard)
"""


class Stranger:
    """A process of another user on the machine of `node`, while the block runs: it greets whoever
    listens on a port there, as an engine greets an RPC server, and stays until it is closed out."""

    def __init__(self, node: MeshNode, port: int) -> None:
        greeting = rpc_words.hello().hex()
        with node.host.inside():
            self._process = subprocess.Popen(
                [_python_of_all(), "-c", _SPEAK, str(port), greeting],
                user=NOBODY,
                group=NOBODY,
                extra_groups=(),
                cwd="/",
                stdout=subprocess.PIPE,
                text=True,
            )

    def __enter__(self) -> Stranger:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "connected\n"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def heard(self, *, within_s: float) -> int:
        """Bytes it was answered until it was closed out."""
        said, _ = self._process.communicate(timeout=within_s)
        return int(said)


@pytest.mark.timeout(600)
def test_another_user_of_the_host_or_a_worker_gets_nothing_of_it(engine_lan: Lan) -> None:
    nodes = a, *_ = split_mesh(engine_lan, "a", "b", "c")
    load(a, wide_model(), "--host", "a")
    where = wait_placed(engine_lan, *nodes)
    expected = answer(a, PROMPT, TOKENS)
    _tunnels_are_closed_to_him(engine_lan, a, where.workers)
    assert placed(a) == where
    assert answer(a, PROMPT, TOKENS) == expected

    worker = of(nodes, where.workers[0])
    (server,) = processes(worker, RPC_SERVER)
    began = time.monotonic()
    with Stranger(worker, rpc_port(worker)) as stranger:
        ended_s = engine_lan.until(
            lambda: not server.is_running(), timeout_s=ENDED_LIMIT_S, what="its server is ended"
        )
        assert stranger.heard(within_s=REACTION_S) == 0
    why = f"another user ({NOBODY}) is connected to its RPC server"
    assert logged(worker, f"the loan for {MODEL} ends: {why}")
    again = wait_placed(engine_lan, *nodes, timeout_s=SERVED_LIMIT_S)
    served_s = time.monotonic() - began
    assert logged(a, f"planning anew: worker {worker.name}: {why}")
    assert worker.name in again.workers, "there is no model without it"
    assert answer(a, PROMPT, TOKENS) == expected
    assert tidy(again, nodes)
    engine_lan.say(f"a stranger at an RPC server: ended after {ended_s:.2f} s")
    engine_lan.say(f"and served again {served_s:.1f} s after he came")


# -- steps ----------------------------------------------------------------------------------------


def _tunnels_are_closed_to_him(lan: Lan, host: MeshNode, workers: tuple[str, ...]) -> None:
    """At the host's end of each, without a byte on the way to a worker."""
    first, *_ = ports = tunnel_ports(host)
    _is_closed_out(lan, host, first)  # with the report of which all is told that was sent before
    before = sent(host)
    assert before.keys() == set(workers)
    for port in ports:
        _is_closed_out(lan, host, port)
    assert sent(host) == before


def _is_closed_out(lan: Lan, host: MeshNode, port: int) -> None:
    """Returns when the host has told of it, and of what its tunnels carried until then."""
    told = "tunnels were refused to other users"
    before = len(logged(host, told))
    with Stranger(host, port) as stranger:
        assert stranger.heard(within_s=REACTION_S) == 0
    lan.until(lambda: len(logged(host, told)) > before, timeout_s=TOLD_LIMIT_S, what="it is told")


def _python_of_all() -> str:
    """An interpreter any user can execute."""
    for path in (Path(sys.executable), Path("/usr/bin/python3")):
        done = subprocess.run(
            ["/usr/bin/env", str(path), "-c", ""], user=NOBODY, cwd="/", stderr=subprocess.DEVNULL
        )
        if done.returncode == 0:
            return str(path)
    pytest.skip("no interpreter here that another user can execute")
