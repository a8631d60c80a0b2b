"""What a model on three nodes rests on is lost, part by part: it is served again by who is left, or
says what lacks, and nothing of it stays behind."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import psutil
import pytest

from tests.mesh.asking import Asker, LongStream
from tests.mesh.nodes import Lan, MeshNode, Nodes
from tests.mesh.splitting import (
    CARRIER,
    MODEL,
    RPC_SERVER,
    TUNNEL,
    Placed,
    load,
    of,
    processes,
    split_mesh,
    tidy,
    wait_placed,
)
from tests.models import wide_model

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SERVED_LIMIT_S = 30.0
"""From a loss to the first answer after it."""
LOOK_LIMIT_S = 60.0
"""How long a test looks, so that what took too long is told with its figure."""
WAITING_LIMIT_S = 15.0
FREED_LIMIT_S = 10.0
"""From the loss of the host, or of the way to it, to the end of what was lent to it."""
MEANWHILE = {"model_loading", "model_failed", "upstream_failed", "split_failed"}
"""What clients are told until it is served again: all of it is worth another try."""


@dataclass(frozen=True, slots=True)
class Loss:
    """One process that is killed."""

    what: str
    victim: Callable[[Nodes, Placed], MeshNode]
    kind: str | None
    """Of the process; None: the node's daemon."""
    named: bool
    """Whether the reason names the victim: not where it is the host's own."""


def _a_worker(nodes: Nodes, where: Placed) -> MeshNode:
    return of(nodes, where.workers[0])


def _the_host(nodes: Nodes, where: Placed) -> MeshNode:
    return of(nodes, where.host)


class Clients:
    """Of one node, while the block runs: one that asks again and again, and one with a stream."""

    def __init__(self, entry: MeshNode) -> None:
        self._entry = entry
        self._asker = Asker(entry, MODEL)
        self._stream: LongStream | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Clients:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._asker)
            self._stream = LongStream(self._entry, MODEL)
            stack.callback(self._stream.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def refused(self) -> int:
        return len(self._asker.failed)

    def answered(self, since: float = 0.0) -> list[float]:
        """When answers came after `since`."""
        answers = tuple(self._asker.answers)
        return [a.ended_at for a in answers if a.status == 200 and a.ended_at > since]

    def served_again(self, lan: Lan, *, since: float) -> float:
        """Wait for the end of the stream, and for an answer after it. Seconds since the loss."""
        assert self._stream is not None
        assert self._stream.error_at_its_end() in MEANWHILE
        ended_at = time.monotonic()
        lan.until(
            lambda: self.answered(ended_at), timeout_s=LOOK_LIMIT_S, what="it is served again"
        )
        for refusal in self._asker.failed:
            assert refusal.status in (502, 503), refusal
            assert refusal.code in MEANWHILE, refusal
            assert refusal.status == 502 or int(refusal.retry_after or 0) > 0, refusal
        return self.answered(ended_at)[0] - since


LOSSES = (
    Loss("a worker's RPC server", _a_worker, RPC_SERVER, named=True),
    Loss("the host's tunnels", _the_host, TUNNEL, named=False),
    Loss("the host", _the_host, None, named=False),
    Loss("a worker's carrier", _a_worker, CARRIER, named=True),
    Loss("a worker", _a_worker, None, named=True),
)
"""The host in the middle: after three losses in a row it would leave the model to another."""


@pytest.mark.timeout(900)
def test_whatever_is_killed_it_is_served_again_and_nothing_is_left(engine_lan: Lan) -> None:
    nodes = _four(engine_lan)
    served = {loss.what: _lose(engine_lan, nodes, loss) for loss in LOSSES}
    wait_placed(engine_lan, *nodes)
    engine_lan.say(f"answers again after the loss of {served} s")
    assert max(served.values()) < SERVED_LIMIT_S


@pytest.mark.timeout(600)
def test_after_a_partition_one_host_stands_and_its_engine_was_left_alone(engine_lan: Lan) -> None:
    nodes = _four(engine_lan)
    for who, of_plan in (("a worker", _a_worker), ("the host", _the_host)):
        where = wait_placed(engine_lan, *nodes)
        cut_off = of_plan(nodes, where)
        rest = tuple(n for n in nodes if n is not cut_off)
        with Clients(_spare(nodes, where)) as clients:
            began = time.monotonic()
            engine_lan.network.isolate(cut_off.host)
            served_s = clients.served_again(engine_lan, since=began)
        new = wait_placed(engine_lan, *rest)
        assert cut_off.name not in (new.host, *new.workers)
        assert new.epoch > where.epoch or new.host == where.host
        freed_s = engine_lan.until(
            lambda: tidy(None, [cut_off]),  # noqa: B023
            timeout_s=FREED_LIMIT_S,
            what=f"{cut_off.name} has nothing left of it",
        )
        engine_lan.say(
            f"{who} cut off: an answer after {served_s:.1f} s, {freed_s:.1f} s more to free"
        )
        assert served_s < SERVED_LIMIT_S
        engines = of(nodes, new.host).engine_pids()
        engine_lan.network.heal()
        engine_lan.wait_whole(*nodes)
        assert wait_placed(engine_lan, *nodes) == new
        assert of(nodes, new.host).engine_pids() == engines


@pytest.mark.timeout(400)
def test_with_too_few_nodes_left_it_waits_and_says_what_lacks(engine_lan: Lan) -> None:
    nodes = split_mesh(engine_lan, "a", "b", "c")
    load(nodes[0], wide_model(), context=512, slots=2)
    where = wait_placed(engine_lan, *nodes)
    victim = _a_worker(nodes, where)
    rest = host, other = of(nodes, where.host), of(nodes, where.workers[1])
    victim.close()  # SIGKILL
    waiting_s = engine_lan.until(
        lambda: all(_lacks(node) for node in rest), timeout_s=WAITING_LIMIT_S, what="it waits"
    )
    engine_lan.until(lambda: tidy(None, rest), timeout_s=FREED_LIMIT_S, what="nothing is left")
    reason = _lacks(host)
    for node, peer in ((host, other), (other, host)):
        own = reason.partition(f"{node.name}: needs ")[2].partition(f"{peer.name}: needs ")[0]
        assert " free here; " in own
        assert f"{peer.name} lends " in own
    engine_lan.say(
        f"a worker that none can replace killed: after {waiting_s:.1f} s it says: {reason}"
    )
    for node in rest:
        question = {"model": MODEL, "prompt": "hi", "max_tokens": 1}
        status, headers, _ = node.request("POST", "/v1/completions", question)
        assert status == 503
        assert int(headers["retry-after"]) > 0
    victim.start()
    wait_placed(engine_lan, *nodes)


# -- steps ----------------------------------------------------------------------------------------


def _four(lan: Lan) -> Nodes:
    """One more than it takes. Two slots: a stream keeps one for as long as it lasts."""
    nodes = split_mesh(lan, "a", "b", "c", "d")
    load(nodes[0], wide_model(), context=512, slots=2)
    return nodes


def _lose(lan: Lan, nodes: Nodes, loss: Loss) -> float:
    """Kill it while clients use the model by way of the node that has no part in it. Seconds until
    it is served again."""
    where = wait_placed(lan, *nodes)
    victim = loss.victim(nodes, where)
    (process,) = [psutil.Process(victim.pid)] if loss.kind is None else processes(victim, loss.kind)
    with Clients(_spare(nodes, where)) as clients:
        lan.until(clients.answered, timeout_s=20, what="answers before the loss")
        began = time.monotonic()
        process.send_signal(signal.SIGKILL)
        served_s = clients.served_again(lan, since=began)
    lan.say(f"{loss.what} killed: {clients.refused} refusals, then served after {served_s:.1f} s")
    if loss.named:
        first, *_ = _planned_anew(of(nodes, where.host), since=began)
        assert first.startswith(f"worker {victim.name}: ")
    if loss.kind is None:
        victim.close()
        lan.until(lambda: not victim.host.processes(), timeout_s=2, what="its processes end")
        victim.start()
        lan.wait_whole(*nodes)
    return round(served_s, 1)


def _planned_anew(host: MeshNode, *, since: float) -> list[str]:
    """The beginnings of reasons with which its claim went back to preparing."""
    lead, found = "planning anew: ", []
    for line in host.admin.get("/flight")["lines"]:
        at, _, what = line.partition(" ")
        if float(at) > since and "PublishClaims(" in what and lead in what:
            assert "ClaimState.PREPARING" in what
            found.append(what.partition(lead)[2][:60])
    return found


def _spare(nodes: Nodes, where: Placed) -> MeshNode:
    (spare,) = (n for n in nodes if n.name not in (where.host, *where.workers))
    return spare


def _model(node: MeshNode) -> dict[str, str | None]:
    model: dict[str, str | None] = node.model(MODEL)
    return model


def _lacks(node: MeshNode) -> str:
    """Why the model waits, once that is for memory; empty before."""
    model = _model(node)
    reason = model["reason"] or ""
    return (
        reason if model["state"] == "waiting" and " short even if it is split: " in reason else ""
    )
