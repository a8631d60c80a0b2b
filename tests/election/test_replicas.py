"""How many hosts demand asks for, of all deployments together."""

from __future__ import annotations

from meshd.election.demand import Demand
from meshd.election.replicas import Replicas
from meshd.election.scaling import HOLD_DOWN_S, HOLD_UP_S
from meshd.election.words import Standing
from meshd.ids import ModelId, NodeId
from meshd.view import Deployment, HostView, ModelState, ModelView
from tests.election.words import M, bid, claim, node, record

SLOTS = 4
AUTO = record(replicas=None)
MANY = (node("a", bid(), claim(1)), node("b", bid()), node("c", bid()))


def models(slots: int = SLOTS) -> dict[ModelId, ModelView]:
    host = HostView("a", NodeId("a"), 1, ModelState.READY, 4096, slots, slots)
    return {M: ModelView(M, "org/llama", ModelState.READY, hosts=(host,) if slots else ())}


def busy(slots: float) -> Demand:
    """Other nodes' clients keep so many slots busy."""
    demand = Demand()
    demand.hear(NodeId("z"), {M: slots})
    return demand


def settled(
    demand: Demand,
    deployment: Deployment = AUTO,
    nodes: tuple[Standing, ...] = MANY,
    slots: int = SLOTS,
) -> Replicas:
    replicas = Replicas()
    for now in (0.0, HOLD_UP_S):
        replicas.look([deployment], nodes, models(slots), demand, now)
    return replicas


def test_a_model_starts_with_the_hosts_it_has() -> None:
    replicas, two = Replicas(), (*MANY, node("d", bid(), claim(2)))
    assert replicas.look([AUTO], two, models(), Demand(), 0.0)
    assert replicas.wanted == {M: 2}
    assert not replicas.look([AUTO], two, models(), Demand(), 1.0), "nothing changed"


def test_only_what_is_left_to_demand_is_counted() -> None:
    fixed = (record(replicas=2), record(replicas=None, asleep=True))
    for deployment in (*fixed, record(replicas=None, removed=True)):
        replicas = Replicas()
        assert not replicas.look([deployment], MANY, models(), busy(50.0), 0.0)
        assert replicas.wanted == {}


def test_more_are_wanted_once_the_load_has_held() -> None:
    replicas, demand = Replicas(), busy(6.0)
    replicas.look([AUTO], MANY, models(), demand, 0.0)
    assert not replicas.look([AUTO], MANY, models(), demand, HOLD_UP_S - 1)
    assert replicas.look([AUTO], MANY, models(), demand, HOLD_UP_S)
    assert replicas.wanted == {M: 2}


def test_no_more_than_nodes_that_could() -> None:
    assert settled(busy(100.0)).wanted == {M: 3}


def test_fewer_are_wanted_after_a_long_calm() -> None:
    replicas = settled(busy(6.0))
    two = (*MANY[:1], node("b", bid(), claim(2)), MANY[2])
    assert replicas.wanted == {M: 2}
    calm = Demand()
    assert not replicas.look([AUTO], two, models(), calm, HOLD_UP_S + 1)
    assert not replicas.look([AUTO], two, models(), calm, HOLD_UP_S + HOLD_DOWN_S)
    assert replicas.look([AUTO], two, models(), calm, HOLD_UP_S + HOLD_DOWN_S + 1)
    assert replicas.wanted == {M: 1}


def test_without_a_host_whose_slots_are_known_nothing_changes() -> None:
    assert settled(busy(100.0), slots=0).wanted == {M: 1}


def test_what_is_left_to_demand_no_more_is_forgotten() -> None:
    replicas = settled(busy(6.0))
    assert replicas.look([record(replicas=1)], MANY, models(), busy(6.0), 40.0)
    assert replicas.wanted == {}
