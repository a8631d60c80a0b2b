"""Names, and what is shown of other nodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from meshd.ids import InstanceId, ModelId, NodeId
from meshd.peers.advert_size import MAX_BODY_BYTES
from meshd.peers.adverts import (
    MAX_EVIDENCE,
    MAX_EVIDENCE_CHARS,
    MAX_WEIGHTS,
    Advert,
    AdvertBook,
    describe,
    slots_from_wire,
)
from meshd.peers.picture import Standing, picture, unique_names
from meshd.view import (
    DeviceView,
    HostView,
    ModelState,
    ModelView,
    NodeState,
    NodeView,
    PeerState,
    PeerView,
    ProofView,
    Role,
    RuntimeView,
    Target,
    View,
    WeightsView,
)

A, B, C = (NodeId(c * 52) for c in "abc")
PROOF = {"level": "runtime", "passed": True, "checked_at": 1.79e9}
TAKES = (("CPU", 10), ("CUDA0", 90))


def view(*models: ModelView, state: NodeState = NodeState.READY, devices: int = 1) -> View:
    node = NodeView(A, "one", "0.1", "member", state, 0.0, "127.0.0.1:9337", None)
    device = DeviceView("CPU", "cpu", None, 16_000, 9_500, True, None)
    return View(node=node, local={m.id: m for m in models}, devices=(device,) * devices)


def served(name: str = "m", slots: int = 4) -> ModelView:
    model = ModelId(name)
    return ModelView(
        id=model,
        ref=name,
        state=ModelState.READY,
        digest="d1",
        hosts=(HostView("one", A, 3, ModelState.READY, 512, slots, slots, 77, TAKES, (5, 5)),),
        targets=(Target(model, "one", InstanceId(f"~{name}"), "/run/x", slots),),
    )


def holding(count: int, *models: ModelView) -> View:
    """With that many sets on its disk, each under two names."""
    sets = [
        WeightsView(ModelId(f"m{n}{name}"), "r", f"sha256:{n:064x}", 1 << 30)
        for n in range(count)
        for name in "ab"
    ]
    return replace(view(*models), weights=tuple(sets))


def proved(backend: str, *lines: str, passed: bool = True, problem: str | None = None) -> View:
    proof = ProofView("runtime", passed, 1.79e9, lines, problem=problem)
    runtime = RuntimeView("e", backend, "0.5", "7.0.0", "/e", (), proof, built_for="cuda")
    return replace(view(), runtime=runtime)


def put(book: AdvertBook, node: NodeId, body: dict[str, Any], version: int = 1) -> bool:
    return book.put(node, version, Advert.model_validate(body), {"version": version})


def test_a_node_s_advert_comes_out_as_its_models_and_devices() -> None:
    book = AdvertBook()
    assert put(book, A, describe(view(served()), "one", Role.MEMBER))
    own, (peer,) = picture({A: Standing(PeerState.ALIVE, ("h:1",))}, book, {A: 0.002}, B, "two")
    assert own == "two"
    assert (peer.name, peer.address, peer.rtt_s) == ("one", "h:1", 0.002)
    (model,) = peer.models
    assert (model.id, model.instance, model.slots, model.slots_free) == ("m", "~m", 4, 4)
    assert (model.digest, model.epoch, model.bytes_on_disk) == ("d1", 3, 77)
    assert (model.memory, model.offloaded) == (TAKES, (5, 5))
    assert peer.devices[0].memory_free_bytes == 9_000  # in sixteenths: it moves all the time


def test_what_is_wrong_with_a_device_is_told() -> None:
    device = replace(
        view().devices[0], engine_name="CUDA0", driver="580.65.06", problem="fell off the bus"
    )
    (shown,) = seen(describe(replace(view(), devices=(device,)), "one", Role.MEMBER)).devices
    assert shown == replace(device, memory_free_bytes=9_000)


def test_free_slots_are_newer_than_the_advert_and_never_more_than_all() -> None:
    book = AdvertBook()
    put(book, A, describe(view(served()), "one", Role.MEMBER))
    assert book.put_slots(A, {"~m": 1, "~gone": 9})
    assert not book.put_slots(A, {"~m": 1, "~gone": 9})
    assert book.models(A)[0].slots_free == 1
    book.put_slots(A, {"~m": 99})
    assert book.models(A)[0].slots_free == 4


def test_only_a_newer_advert_is_taken() -> None:
    book = AdvertBook()
    body = describe(view(served()), "one", Role.MEMBER)
    assert put(book, A, body, version=5)
    assert not put(book, A, {**body, "name": "older"}, version=5)
    assert not put(book, A, {**body, "name": "older"}, version=4)
    assert put(book, A, {**body, "name": "newer"}, version=6)
    advert = book.get(A)
    assert advert is not None
    assert advert.name == "newer"
    assert book.envelope(A) == {"version": 6}
    book.forget(A)
    assert book.version(A) == -1
    assert book.models(A) == ()


def test_a_client_advertises_no_capacity_and_none_is_believed() -> None:
    body = describe(view(served()), "one", Role.CLIENT)
    assert "models" not in body
    assert "devices" not in body
    book = AdvertBook()
    put(book, A, {**describe(view(served()), "one", Role.MEMBER), "role": "client"})
    assert book.models(A) == ()


def test_the_weights_on_disk_are_told_once_a_set() -> None:
    book = AdvertBook()
    put(book, A, describe(holding(3), "one", Role.MEMBER))
    _, (peer,) = picture({A: Standing(PeerState.ALIVE, ())}, book, {}, B, "two")
    assert peer.weights == {f"sha256:{n:064x}" for n in range(3)}
    put(book, A, describe(view(), "one", Role.MEMBER), version=2)
    assert book.weights(A) == frozenset()
    assert book.weights(B) == frozenset()


def test_more_weights_than_fit_are_left_out_before_models_are() -> None:
    models = [served(f"m{n}") for n in range(100)]
    body = describe(holding(MAX_WEIGHTS + 50, *models), "one", Role.MEMBER)
    assert len(body["weights"]) == MAX_WEIGHTS
    assert len(orjson.dumps(body)) <= MAX_BODY_BYTES
    assert len(body["models"]) == 100
    Advert.model_validate(body)


def test_a_client_s_weights_are_neither_told_nor_believed() -> None:
    assert "weights" not in describe(holding(2), "one", Role.CLIENT)
    book = AdvertBook()
    put(book, A, {**describe(holding(2), "one", Role.MEMBER), "role": "client"})
    assert book.weights(A) == frozenset()


def seen(body: dict[str, Any]) -> PeerView:
    book = AdvertBook()
    put(book, A, body)
    _, (peer,) = picture({A: Standing(PeerState.ALIVE, ())}, book, {}, B, "two")
    return peer


def test_what_models_run_on_is_told_with_its_evidence() -> None:
    peer = seen(describe(proved("cuda", "offloaded 5/5 layers"), "one", Role.MEMBER))
    assert peer.backend == "cuda"
    assert peer.proof == ProofView("runtime", True, 1.79e9, ("offloaded 5/5 layers",))


def test_a_node_whose_proof_fails_is_shown_as_cpu_and_why() -> None:
    view = proved("cpu", passed=False, problem="the engine lists no such device")
    peer = seen(describe(view, "one", Role.MEMBER))
    assert peer.backend == "cpu"
    assert peer.proof is not None
    assert peer.proof.problem == "the engine lists no such device"


def test_a_backend_is_not_believed_without_a_proof_that_passed() -> None:
    body = describe(proved("cuda", passed=False), "one", Role.MEMBER)
    assert seen(body).backend == "cpu"
    assert seen({**body, "proof": None}).backend == "cpu"
    assert seen(describe(view(), "one", Role.MEMBER)).backend == "cpu"
    client = {**describe(proved("cuda"), "one", Role.MEMBER), "role": "client"}
    assert (seen(client).backend, seen(client).proof) == ("cpu", None)


def test_the_evidence_in_an_advert_is_bounded() -> None:
    lines = [f"{n}: {'x' * 500}" for n in range(100)]
    body = describe(proved("cuda", *lines, problem="p" * 5000), "one", Role.MEMBER)
    evidence = body["proof"]["evidence"]
    assert len(evidence) == MAX_EVIDENCE
    assert all(len(line) == MAX_EVIDENCE_CHARS for line in evidence)
    Advert.model_validate(body)


def test_draining_is_said() -> None:
    assert describe(view(state=NodeState.DRAINING), "one", Role.MEMBER)["draining"] is True
    assert describe(view(), "one", Role.MEMBER)["draining"] is False


def test_an_advert_fits_and_keeps_what_is_served() -> None:
    idle = [
        ModelView(ModelId(f"idle{n:03d}"), "r" * 1000, ModelState.ABSENT, "w" * 1000)
        for n in range(200)
    ]
    body = describe(view(*idle, served("zz-served")), "one", Role.MEMBER)
    assert len(orjson.dumps(body)) <= MAX_BODY_BYTES
    assert body["models"][0]["id"] == "zz-served"
    Advert.model_validate(body)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "bad name\n"},
        {"name": ""},
        {"role": "king"},
        {"models": [{"id": "m"}]},
        {"models": [{"id": "m", "state": "ready", "slots": -1}]},
        {"models": [{"id": "m", "state": "ready", "slots": 1 << 40}]},
        {"models": [{"id": "m", "state": "ready", "progress": 2.0}]},
        {"models": [{"id": "m" * 300, "state": "ready"}]},
        {"devices": [{"name": "x"}]},
        {"draining": "yes"},
        {"weights": "sha256:"},
        {"weights": ["x" * 81]},
        {"weights": ["x"] * (MAX_WEIGHTS + 1)},
        {"backend": 7},
        {"proof": {"level": "runtime"}},
        {"proof": {**PROOF, "passed": "yes"}},
        {"proof": {**PROOF, "checked_at": -1.0}},
        {"proof": {**PROOF, "evidence": ["x" * (MAX_EVIDENCE_CHARS + 1)]}},
        {"proof": {**PROOF, "evidence": ["x"] * (MAX_EVIDENCE + 1)}},
    ],
)
def test_a_malformed_advert_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Advert.model_validate({**describe(view(), "one", Role.MEMBER), **change})


def test_slots_are_read_as_far_as_they_are_some() -> None:
    assert slots_from_wire({"a": 1, "b": -1, "c": True, "d": "2", "e" * 300: 1}) == {"a": 1}
    assert slots_from_wire([1]) == {}


def test_a_taken_name_gets_a_suffix_and_the_smallest_id_keeps_it() -> None:
    assert unique_names({C: "gpu", A: "gpu", B: "cpu"}) == {C: "gpu-cccc", A: "gpu", B: "cpu"}


def test_a_node_without_an_advert_goes_by_its_id() -> None:
    _, (peer,) = picture({A: Standing(PeerState.DEAD, ())}, AdvertBook(), {}, B, "two")
    assert (peer.name, peer.address, peer.models, peer.rtt_s) == ("aaaaaaaa", None, (), None)
