"""Going: for now, for good, or only from new work."""

from __future__ import annotations

import http.client
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.mesh.asking import Asker
from tests.mesh.nodes import REACTION_S, Lan, MeshNode
from tests.models import small_model

pytestmark = pytest.mark.slow

MODEL = "tiny"
LEFT_LIMIT_S = 1.0


@pytest.fixture
def hosts(mock_lan: Lan, short_dir: Path) -> tuple[MeshNode, MeshNode, MeshNode]:
    """Two nodes that serve the same model, and one that only asks."""
    a, b, c = mock_lan.mesh("a", "b", "c", flags={"c": ("--client",)})
    a.load(str(small_model(short_dir / f"{MODEL}.gguf")), replicas=2)
    mock_lan.until(
        lambda: _hosts(c, "ready") == {"a", "b"}, timeout_s=20, what="c sees both engines"
    )
    return a, b, c


def test_leave(lan: Lan) -> None:
    a, b, c = lan.mesh("a", "b", "c")
    before = c.id
    done = c.meshd("leave")
    assert done.returncode == 0, done.stderr
    lan.wait_seen("c", "left", by=[a, b], timeout_s=LEFT_LIMIT_S + REACTION_S)
    assert c.mesh["state"] == "none"
    assert c.mesh_files() == []
    assert c.request("GET", "/readyz")[0] == 200
    again = c.meshd("leave")
    assert again.returncode == 1
    assert "no mesh" in again.stderr

    # It comes back only by an invite, as the node it was.
    assert c.stop() == 0
    c = lan.node("c", "--join", a.invite()).start()
    lan.wait_whole(a, b, c)
    assert c.id == before


def test_a_node_that_left_founds_no_mesh_behind_ones_back(lan: Lan) -> None:
    _a, b = lan.mesh("a", "b")
    assert b.meshd("leave").returncode == 0
    assert b.peers() == {}
    assert b.meshd("invite").returncode == 1


def test_a_terminated_node_leaves_and_its_streams_finish(
    mock_lan: Lan, hosts: tuple[MeshNode, MeshNode, MeshNode]
) -> None:
    a, b, c = hosts
    stream = Stream(c, seconds=3)
    other = b if stream.node == "a" else a
    stopped = a if stream.node == "a" else b
    assert stopped.process is not None
    stopped.process.send_signal(signal.SIGTERM)
    took_s = mock_lan.until(
        lambda: _hosts(c, "ready") == {other.name}, timeout_s=1 + REACTION_S, what="routed around"
    )
    mock_lan.say(f"routed around {took_s:.3f} s after SIGTERM")
    for _ in range(20):
        status, headers, _ = c.request("POST", "/v1/chat/completions", _chat())
        assert (status, headers["x-meshd-node"]) == (200, other.name)
    assert stopped.process.poll() is None
    assert stream.finish() == 3 * Stream.RATE_HZ
    assert stopped.process.wait(15) == 0
    mock_lan.wait_seen(stopped.name, "left", by=[other, c], timeout_s=LEFT_LIMIT_S + REACTION_S)


def test_drain_and_undrain(mock_lan: Lan, hosts: tuple[MeshNode, MeshNode, MeshNode]) -> None:
    a, b, c = hosts
    stream = Stream(c, seconds=3)
    drained, other = (a, b) if stream.node == "a" else (b, a)
    done = drained.meshd("drain")
    assert done.returncode == 0, done.stderr
    mock_lan.until(
        lambda: _hosts(c, "ready") == {other.name}, timeout_s=1 + REACTION_S, what="routed around"
    )
    assert drained.status()["node"]["state"] == "draining"
    assert c.sees(drained.name) == "alive"
    for node in (c, drained):  # its own clients too are served by the other
        for _ in range(10):
            status, headers, _ = node.request("POST", "/v1/chat/completions", _chat())
            assert (status, headers["x-meshd-node"]) == (200, other.name)
    assert stream.finish() == 3 * Stream.RATE_HZ

    assert drained.meshd("undrain").returncode == 0
    # It gave its model up, so it claims and loads it as any other node would.
    mock_lan.until(lambda: _hosts(c, "ready") == {"a", "b"}, timeout_s=10, what="both again")
    assert _answers_from_both(c) == {"a", "b"}


def test_who_drains_serves_until_another_does(mock_lan: Lan, short_dir: Path) -> None:
    """One host is wanted, so the other node has to load first; no request is refused meanwhile."""
    a, b = mock_lan.mesh("a", "b")
    path = str(small_model(short_dir / f"{MODEL}.gguf"))
    a.load(path, host="a")
    a.wait_state(MODEL, "ready")
    a.load(path)  # no longer pinned
    with Asker(a, MODEL) as own, Asker(b, MODEL) as remote:
        mock_lan.until(lambda: own.by("a") and remote.by("a"), timeout_s=10, what="a answers")
        assert a.meshd("drain").returncode == 0
        mock_lan.until(lambda: _hosts(a) == _hosts(b) == {"b"}, timeout_s=20, what="only b hosts")
        since = time.monotonic()
        mock_lan.until(
            lambda: own.by("b", since=since) and remote.by("b", since=since),
            timeout_s=10,
            what="b answers",
        )
    assert own.failed == []
    assert remote.failed == []
    assert a.engines() == []


def test_everybody_drained_says_so(mock_lan: Lan, short_dir: Path) -> None:
    a, b = mock_lan.mesh("a", "b")
    a.load(str(small_model(short_dir / f"{MODEL}.gguf")))
    mock_lan.until(lambda: _hosts(b, "ready"), timeout_s=20, what="the engine seen")
    for node in (a, b):
        assert node.meshd("drain").returncode == 0
    mock_lan.until(lambda: _hosts(a) | _hosts(b) == set(), timeout_s=20, what="all have given up")
    for node in (a, b):
        status, headers, body = node.request("POST", "/v1/chat/completions", _chat())
        assert (status, json.loads(body)["error"]["code"]) == (503, "node_draining")
        assert "undrain" in json.loads(body)["error"]["message"]
        assert int(headers["retry-after"]) >= 1


# -- steps ----------------------------------------------------------------------------------------


class Stream:
    """A stream in flight from one of the engines, read by a client on `entry`."""

    RATE_HZ = 50

    def __init__(self, entry: MeshNode, *, seconds: int) -> None:
        self._connection = entry.connect()
        body = _chat(stream=True, n_events=seconds * self.RATE_HZ, rate_hz=self.RATE_HZ)
        self._connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        self._answer = self._connection.getresponse()
        assert self._answer.status == 200
        self.node = str(self._answer.headers["x-meshd-node"])

    def finish(self) -> int:
        """Read on to a proper end: how many events came in all."""
        try:
            text = self._answer.read()
        except http.client.IncompleteRead as error:
            raise AssertionError(f"cut off after {len(error.partial)} bytes") from None
        finally:
            self._connection.close()
        assert b'"error"' not in text
        assert text.rstrip().endswith(b"data: [DONE]")
        return text.count(b"data: {")


def _chat(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **more}


def _hosts(node: MeshNode, *states: str) -> set[str]:
    return set(node.hosts(MODEL, *states))


def _answers_from_both(node: MeshNode, *, limit_s: float = 10.0) -> set[str]:
    seen: set[str] = set()
    until = time.monotonic() + limit_s
    while len(seen) < 2 and time.monotonic() < until:
        status, headers, _ = node.request("POST", "/v1/chat/completions", _chat())
        assert status == 200
        seen.add(headers["x-meshd-node"])
    return seen
