"""What is said of a decision: to whoever asks for a plan, and in the events of the host."""

from __future__ import annotations

import json
from dataclasses import replace

from meshd.election.explain import Verdict, explain, why_claim
from meshd.election.ranking import ranked
from meshd.ids import NodeId
from meshd.view import Suits
from tests.election.words import FAILED, GB, M, bid, claim, node, part, record


def test_every_node_is_told_of_once_with_its_reason() -> None:
    nodes = [
        node("host", claim(3, reason="nobody hosted it")),
        node("late", claim(2)),
        node("next", bid(9)),
        node("slow", bid(9, speed=1)),
        node("full", bid(suits=Suits.NO, reason="needs 9.0 GB, 1.0 GB free on CUDA0")),
        node("sick", bid(), claim(4, FAILED, reason="disk full")),
        node("leaving", bid(), draining=True),
        node("guest", hosts=False),
    ]
    plan = explain(record(), nodes, {})
    assert sorted(p.name for p in plan.nodes) == sorted(n.name for n in nodes)
    told = {p.name: (p.verdict, p.why) for p in plan.nodes}
    assert told["host"] == (Verdict.HOSTS, "ready, epoch 3: nobody hosted it")
    assert told["late"][0] is Verdict.LEAVES
    assert "epoch 3 against 2" in told["late"][1]
    assert told["next"][0] is told["slow"][0] is Verdict.STANDS_BY
    assert told["slow"][1].startswith("about 2 tokens/s, not 32")
    assert told["full"] == (Verdict.CANNOT, "needs 9.0 GB, 1.0 GB free on CUDA0")
    assert told["sick"] == (Verdict.CANNOT, "failed: disk full")
    assert told["leaving"] == (Verdict.CANNOT, "draining")
    assert told["guest"] == (Verdict.CANNOT, "a client hosts nothing")
    assert plan.decision == "host (ready, epoch 3: nobody hosted it) hosts llama"


def test_gaps_are_filled_from_the_ranking_or_said_to_be_open() -> None:
    plan = explain(record(replicas=3), [node("a", bid(2)), node("b", bid(7))], {})
    assert [(p.name, p.verdict) for p in plan.nodes] == [("b", Verdict.NEXT), ("a", Verdict.NEXT)]
    assert plan.decision.endswith("is to host llama; no node for 1 of 3 hosts of llama")


def test_what_nobody_is_to_host() -> None:
    nodes = [node("a", bid(2)), node("b", bid(2), claim(1))]
    asleep = explain(record(asleep=True), nodes, {})
    assert asleep.decision == "llama is asleep: nobody hosts it"
    assert {p.name: p.verdict for p in asleep.nodes} == {
        "a": Verdict.STANDS_BY,
        "b": Verdict.LEAVES,
    }
    assert explain(record(removed=True), [], {}).decision.startswith("llama is unloaded")


def test_a_swap_is_not_next_while_somebody_says_yes() -> None:
    nodes = [node("a", bid(suits=Suits.SWAP)), node("b", bid())]
    plan = explain(record(replicas=2), nodes, {})
    assert {p.name: p.verdict for p in plan.nodes} == {"b": Verdict.NEXT, "a": Verdict.STANDS_BY}


def test_a_split_names_its_workers_with_their_shares() -> None:
    shares = (part("b", share=0.25).shown, part("c", share=0.375).shown)
    split = replace(claim(3, reason="nobody hosts it"), workers=shares)
    plan = explain(record(), [node("a", split)], {})
    (told,) = plan.nodes
    assert told.why == "ready, epoch 3: nobody hosts it; with memory of b (25%), c (38%)"
    assert told.workers == shares
    assert plan.decision == f"a ({told.why}) hosts llama"
    (shown,) = json.loads(json.dumps(plan.as_json()))["nodes"]
    assert shown["workers"] == [
        {"node": "b", "name": "b", "share": 0.25, "bytes": GB},
        {"node": "c", "name": "c", "share": 0.375, "bytes": GB},
    ]


def test_a_split_is_not_next_while_somebody_can_host_it_alone() -> None:
    split = node("a", bid(15, suits=Suits.SPLIT, workers=2))
    for other in (node("b", bid(0)), node("b", bid(0, suits=Suits.SWAP))):
        plan = explain(record(replicas=2), [split, other], {})
        assert [(p.name, p.verdict) for p in plan.nodes] == [
            ("b", Verdict.NEXT),
            ("a", Verdict.STANDS_BY),
        ]
    (alone,) = explain(record(), [split], {}).nodes
    assert alone.verdict is Verdict.NEXT
    assert alone.why.startswith("with memory of 2 other nodes, ")


def test_a_plan_is_json() -> None:
    plan = explain(record(replicas=2), [node("a", claim(1)), node("b", bid())], {M: 2})
    told = json.loads(json.dumps(plan.as_json()))
    assert told["model"] == M
    assert [n["verdict"] for n in told["nodes"]] == ["hosts", "next"]


def test_one_line_names_three_others_and_counts_the_rest() -> None:
    others = [node(f"n{i}", bid(i)) for i in range(9)]
    own = ranked(node("own", bid(12)), record())
    assert own is not None
    line = why_claim(record(), own, others, "nobody hosts it")
    assert line.startswith("nobody hosts it; own: weights on disk, 12/16 of its memory left over")
    assert line.endswith("n6: 6/16 of its memory left over, not 12/16; 6 more")
    assert "\n" not in line


def test_a_pin_says_why_not_the_others() -> None:
    plan = explain(record(host=NodeId("b")), [node("a", bid(9)), node("b", bid())], {})
    assert {p.name: p.why for p in plan.nodes}["a"] == "pinned to another node"
