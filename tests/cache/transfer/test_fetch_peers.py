"""Fetches from other nodes, good, partial, lying and dying ones."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from meshd.cache.chunks import CHUNK_BYTES
from meshd.cache.manifest import Manifest
from meshd.cache.places import Places
from meshd.cache.store import Store
from meshd.cache.transfer import crew, pace
from meshd.cache.transfer.partial import Partial
from meshd.cache.transfer.serving import serve_shard
from meshd.cache.transfer.words import Grant, News, PeerSource
from meshd.cache.verdict import Fault
from meshd.errors import PeerUnreachable, ProtocolError
from tests.cache.transfer.world import (
    NAMES,
    REPO,
    Dying,
    Neighbour,
    Silent,
    SocketStream,
    carry_out,
    content,
    done,
    failed,
    flipped,
    landed,
    manifest_of,
    neighbourhood,
    order_for,
    peer,
    places_in,
    said,
    sha256,
)
from tests.hub import LocalHub, Slow

FILES = {NAMES[0]: content(1, 5 * CHUNK_BYTES + 1), NAMES[1]: content(2, CHUNK_BYTES)}
TOTAL = sum(len(data) for data in FILES.values())
MANIFEST = manifest_of(FILES)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "FIRST_DELAY_S", 0.02)
    monkeypatch.setattr(crew, "FIRST_DELAY_S", 0.02)
    monkeypatch.setattr(crew, "REFRESH_S", 0.05)


def holder(tmp_path: Path, name: str, **more: Any) -> Neighbour:
    """A node that has everything."""
    neighbour = Neighbour(name, manifests=[MANIFEST], **more)
    for path, data in FILES.items():
        neighbour.has(tmp_path / name / path, data)
    return neighbour


def liar(tmp_path: Path, name: str, *, honest_list: bool) -> Neighbour:
    """A node whose first file has a flipped bit in each chunk; its list says so, or not."""
    neighbour = holder(tmp_path, name)
    data = FILES[NAMES[0]]
    wrong = flipped(data, *range(3, len(data), CHUNK_BYTES))
    neighbour.has(
        tmp_path / name / "wrong", wrong, sha256_of=data, told=data if honest_list else wrong
    )
    return neighbour


def fetch(
    home: Path, *neighbours: Neighbour, hub: bool = False, manifest: Manifest | None = MANIFEST,
    **more: Any,
) -> list[News]:  # fmt: skip
    with neighbourhood(*neighbours) as open_stream:
        order = order_for(
            home, manifest, offline=not hub, peers=tuple(peer(n.name) for n in neighbours), **more
        )
        return carry_out(order, open_stream)


def check(home: Path, manifest: Manifest = MANIFEST) -> None:
    for path, data in FILES.items():
        assert landed(home, manifest, path) == data


def test_one_peer_is_enough(tmp_path: Path) -> None:
    news = fetch(tmp_path / "home", holder(tmp_path, "ada"), manifest=None)
    assert done(news).sources == {"ada": TOTAL}
    check(tmp_path / "home")


def test_several_peers_and_the_hub_share_the_work(hub: LocalHub, tmp_path: Path) -> None:
    manifest = manifest_of(FILES, hub.add(REPO, FILES))
    for path in FILES:
        hub.faults.add(path, Slow(40e6), times=None)
    news = fetch(
        tmp_path / "home",
        holder(tmp_path, "ada"),
        holder(tmp_path, "bob"),
        hub=True,
        manifest=manifest,
        workers=1,
    )
    assert {"ada", "bob"} & set(done(news).sources)
    assert done(news).fetched_bytes < TOTAL + 6 * CHUNK_BYTES
    check(tmp_path / "home", manifest)


def test_of_a_set_single_shards_can_be_fetched(tmp_path: Path) -> None:
    """What is there then is no set, and the next fetch goes on from it."""
    home, ada = tmp_path / "home", holder(tmp_path, "ada")
    first, second = MANIFEST.shards
    part = done(
        fetch(
            home,
            ada,
            manifest=None,
            expected_digest=MANIFEST.digest,
            only=(second.sha256,),
        )
    )
    assert part.sources == {"ada": second.size}
    places = places_in(home)
    assert landed(home, MANIFEST, second.path) == FILES[second.path]
    assert not os.path.lexists(places.snapshot(REPO, MANIFEST.revision, first.path))
    assert not places.blob(REPO, first.sha256).exists()
    assert not places.partial(REPO, first.sha256).exists()
    assert not places.branch(REPO, "main").exists()
    store = Store.at(places)
    ((_, known), *_) = store.manifests.all()
    assert known == MANIFEST, "it is known what the whole would be"
    verdict = store.look(known)
    assert [file.fault for file in verdict.files] == [Fault.MISSING, Fault.CORRUPT]  # no weights
    whole = done(fetch(home, ada, manifest=None))
    assert whole.sources == {"ada": first.size}
    check(home)
    assert places.branch(REPO, "main").exists()


def test_shards_of_another_set_than_was_meant_are_not_fetched(tmp_path: Path) -> None:
    ada, other = holder(tmp_path, "ada"), "sha256:" + "0" * 64
    wanted = (MANIFEST.shards[0].sha256,)
    news = fetch(tmp_path / "home", ada, manifest=None, expected_digest=other, only=wanted)
    assert failed(news).code == "hub_unavailable"
    assert Store.at(places_in(tmp_path / "home")).manifests.all() == ()
    news = fetch(
        tmp_path / "home",
        ada,
        manifest=None,
        expected_digest=MANIFEST.digest,
        only=("0" * 64,),
    )
    assert failed(news).code == "invalid_reference"
    # Now it is known here under that name, and is not what is asked for.
    news = fetch(tmp_path / "home", ada, manifest=None, expected_digest=other, only=wanted)
    assert failed(news).code == "model_ambiguous"
    assert not places_in(tmp_path / "home").blob(REPO, wanted[0]).exists()


def test_who_is_asked_first_and_knows_the_set_is_enough(tmp_path: Path) -> None:
    """The digest proves it, so others that may be slow to answer need not be."""
    ada, bob = holder(tmp_path, "ada"), Neighbour("bob", manifests=[MANIFEST])
    fetch(tmp_path / "home", ada, bob, manifest=None, expected_digest=MANIFEST.digest)
    assert "manifest" in ada.services
    assert "manifest" not in bob.services


def test_a_peer_that_sends_other_bytes_than_it_promises_is_banned(tmp_path: Path) -> None:
    news = fetch(
        tmp_path / "home", liar(tmp_path, "eve", honest_list=True), holder(tmp_path, "ada")
    )
    assert done(news).sources["ada"] >= 5 * CHUNK_BYTES
    check(tmp_path / "home")


def test_a_peer_that_lies_consistently_is_found_out_by_the_hub(
    hub: LocalHub, tmp_path: Path
) -> None:
    manifest = manifest_of(FILES, hub.add(REPO, FILES))
    news = fetch(
        tmp_path / "home", liar(tmp_path, "eve", honest_list=False), hub=True, manifest=manifest
    )
    assert done(news).sources["hub"] >= CHUNK_BYTES
    check(tmp_path / "home", manifest)


def test_a_peer_that_lies_consistently_alone_lands_nothing(tmp_path: Path) -> None:
    news = fetch(tmp_path / "home", liar(tmp_path, "eve", honest_list=False))
    end = failed(news)
    assert NAMES[0] in end.message
    assert "eve: promised bytes that the file does not consist of" in end.message
    assert not places_in(tmp_path / "home").blob(REPO, MANIFEST.shards[0].sha256).exists()


def test_a_lying_minority_does_not_even_delay_the_end(tmp_path: Path) -> None:
    news = fetch(
        tmp_path / "home",
        liar(tmp_path, "eve", honest_list=False),
        holder(tmp_path, "ada"),
        holder(tmp_path, "bob"),
    )
    done(news)
    check(tmp_path / "home")


def test_a_peer_that_dies_is_replaced(tmp_path: Path) -> None:
    def dying(connection: socket.socket) -> SocketStream:
        return Dying(connection, 3 * CHUNK_BYTES)

    news = fetch(
        tmp_path / "home", holder(tmp_path, "mortal", stream=dying), holder(tmp_path, "ada")
    )
    assert done(news).sources["ada"] >= CHUNK_BYTES
    check(tmp_path / "home")


def test_a_stream_that_breaks_is_dialled_again_while_it_brings_something(tmp_path: Path) -> None:
    def brittle(connection: socket.socket) -> SocketStream:
        return Dying(connection, 3 * CHUNK_BYTES)

    neighbour = holder(tmp_path, "brittle", stream=brittle)
    done(fetch(tmp_path / "home", neighbour))
    assert neighbour.opened > 3
    check(tmp_path / "home")


def test_a_peer_that_falls_silent_is_left(tmp_path: Path) -> None:
    news = fetch(
        tmp_path / "home",
        holder(tmp_path, "mute", stream=Silent),
        holder(tmp_path, "ada"),
        stall_s=0.3,
    )
    assert done(news).sources["ada"] == TOTAL
    check(tmp_path / "home")


def test_a_peer_that_is_busy_is_asked_again_and_one_that_has_nothing_is_not(
    tmp_path: Path,
) -> None:
    busy, empty = holder(tmp_path, "busy", refuses="busy"), Neighbour("empty")
    end = failed(fetch(tmp_path / "home", busy, empty))
    assert "busy: not now" in end.message
    assert "empty: it is not here" in end.message
    assert not end.permanent
    assert busy.opened == crew.MAX_DIALS
    assert empty.opened == len(FILES)


def test_an_unreachable_peer_ends_it_with_words(tmp_path: Path) -> None:
    order = order_for(tmp_path, MANIFEST, offline=True, peers=(peer("gone"),))
    end = failed(carry_out(order))
    assert end.code == "hub_unavailable"
    assert "gone: nobody is at gone" in end.message


# -- parts ----------------------------------------------------------------------------------------


def half(home: Path, name: str, chunks: tuple[int, ...]) -> Neighbour:
    """A node that has some chunks of the first file, and all of the second."""
    places, shard = places_in(home / name), MANIFEST.shards[0]
    data = FILES[NAMES[0]]
    partial = Partial.open(places, REPO, shard, own=None)
    put(partial, data, chunks)
    partial.close()
    neighbour = Neighbour(name)
    neighbour.grants[shard.sha256] = partial_grant(places, shard.sha256, len(data))
    neighbour.has(home / name / "second", FILES[NAMES[1]])
    return neighbour


def put(partial: Partial, data: bytes, chunks: tuple[int, ...]) -> None:
    import hashlib

    for index in chunks:
        chunk = data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        partial.write(index, memoryview(chunk), hashlib.sha256(chunk).digest())


def partial_grant(places: Places, sha: str, size: int) -> Grant:
    return Grant(
        str(places.partial(REPO, sha)),
        size,
        sha,
        str(places.chunk_hashes(sha)),
        str(places.journal(sha)),
    )


def test_two_halves_make_a_whole(tmp_path: Path) -> None:
    news = fetch(
        tmp_path / "home",
        half(tmp_path, "even", (0, 2, 4)),
        half(tmp_path, "odd", (1, 3, 5)),
    )
    assert done(news).sources["even"] >= 3 * CHUNK_BYTES
    assert done(news).sources["odd"] >= 2 * CHUNK_BYTES
    check(tmp_path / "home")


def test_what_a_peer_gets_meanwhile_is_asked_for_again(tmp_path: Path) -> None:
    growing = half(tmp_path, "growing", (0, 1, 2))
    shard = MANIFEST.shards[0]

    class Growing(SocketStream):
        asked = 0

        def receive(self) -> dict[str, Any]:
            request = super().receive()
            if request["t"] == "have":
                Growing.asked += 1
                if Growing.asked == 3:
                    places = places_in(tmp_path / "growing")
                    partial = Partial.open(places, REPO, shard, own=None)
                    put(partial, FILES[NAMES[0]], tuple(range(6)))
                    partial.close()
            return request

    growing.stream = Growing
    assert done(fetch(tmp_path / "home", growing)).sources == {"growing": TOTAL}
    check(tmp_path / "home")


def test_peers_with_the_same_parts_end_it_when_none_gets_further(tmp_path: Path) -> None:
    news = fetch(tmp_path / "home", half(tmp_path, "stuck", (0, 1)), stall_s=0.3)
    assert "stuck: has not got any further itself" in failed(news).message


def test_two_nodes_on_their_way_serve_each_other(hub: LocalHub, tmp_path: Path) -> None:
    """Each begins with half; a fetch at one takes from the other's partial what the hub need not
    send."""
    manifest = manifest_of(FILES, hub.add(REPO, FILES))
    other = half(tmp_path, "other", (3, 4, 5))
    for path in FILES:
        hub.faults.add(path, Slow(30e6), times=None)
    news = fetch(tmp_path / "home", other, hub=True, manifest=manifest, workers=1)
    assert done(news).sources["other"] >= CHUNK_BYTES
    assert hub.sent() < TOTAL
    check(tmp_path / "home", manifest)


# -- manifests ------------------------------------------------------------------------------------


def test_manifests_are_what_most_say(tmp_path: Path) -> None:
    old = manifest_of({NAMES[0]: content(7, 100)}, "d" * 40)
    stale = Neighbour("stale", manifests=[old])
    news = fetch(
        tmp_path / "home", stale, holder(tmp_path, "ada"), holder(tmp_path, "bob"), manifest=None
    )
    done(news)
    check(tmp_path / "home")


def test_manifests_in_dispute_are_ambiguous(tmp_path: Path) -> None:
    old = manifest_of({NAMES[0]: content(7, 100)}, "d" * 40)
    end = failed(
        fetch(
            tmp_path / "home",
            Neighbour("stale", manifests=[old]),
            holder(tmp_path, "ada"),
            manifest=None,
        )
    )
    assert end.code == "model_ambiguous"
    assert "d" * 12 in end.message


def test_a_manifest_of_another_repository_is_none(tmp_path: Path) -> None:
    other = MANIFEST.model_copy(update={"repo": "evil/Name"})
    end = failed(fetch(tmp_path / "home", Neighbour("eve", manifests=[other]), manifest=None))
    assert end.code == "hub_unavailable"


# -- serving --------------------------------------------------------------------------------------


def served(grant: Grant, *requests: dict[str, Any]) -> tuple[SocketStream, Any]:
    """Both ends: ours, and a function that serves and returns what it raised."""
    here, there = socket.socketpair()
    ours = SocketStream(here)
    for request in requests:
        ours.send(request)
    here.shutdown(socket.SHUT_WR)
    try:
        serve_shard(SocketStream(there), grant)
        error = None
    except ProtocolError as found:
        error = found
    there.close()
    return ours, error


def small(tmp_path: Path) -> tuple[Grant, bytes]:
    data = content(3, 1000)
    neighbour = Neighbour("x")
    neighbour.has(tmp_path / "x" / "file", data)
    return neighbour.grants[sha256(data)], data


def test_served_bytes_and_hashes(tmp_path: Path) -> None:
    grant, data = small(tmp_path)
    ours, error = served(
        grant, {"t": "read", "offset": 10, "length": 20}, {"t": "hashes"}, {"t": "have"}
    )
    assert error is None
    assert ours.receive() == {
        "t": "open", "size": 1000, "chunk_bytes": CHUNK_BYTES, "whole": True, "hashes": True,
    }  # fmt: skip
    assert ours.receive() == {"t": "data", "length": 20}
    buffer = bytearray(20)
    ours.read_into(memoryview(buffer))
    assert buffer == data[10:30]
    assert ours.receive() == {"t": "hashes", "length": 32}
    ours.read_into(memoryview(bytearray(32)))
    assert ours.receive() == {"t": "have", "length": 1}
    ours.close()


@pytest.mark.parametrize(
    "request_",
    [
        {"t": "read", "offset": -1, "length": 5},
        {"t": "read", "offset": 990, "length": 11},
        {"t": "read", "offset": 0, "length": 0},
        {"t": "read", "offset": 0, "length": 1 << 40},
        {"t": "read", "offset": "0", "length": 5},
        {"t": "read", "offset": True, "length": 5},
        {"t": "read"},
        {"t": "write", "offset": 0, "length": 5},
        {},
    ],
)
def test_what_may_not_be_asked_ends_the_stream(tmp_path: Path, request_: dict[str, Any]) -> None:
    grant, _ = small(tmp_path)
    ours, error = served(grant, request_)
    assert isinstance(error, ProtocolError)
    assert ours.receive()["t"] == "open"
    with pytest.raises(PeerUnreachable):
        ours.receive()
    ours.close()


def test_a_file_that_is_another_now_is_not_served(tmp_path: Path) -> None:
    grant, data = small(tmp_path)
    path = Path(grant.path)
    for change in (lambda: path.write_bytes(data + b"x"), path.unlink, path.mkdir):
        change()
        ours, error = served(grant)
        assert error is None
        assert ours.receive()["reason"] == "gone"
        ours.close()


def test_of_a_partial_only_what_its_journal_lists_is_served(tmp_path: Path) -> None:
    neighbour = half(tmp_path, "half", (1,))
    grant = neighbour.grants[MANIFEST.shards[0].sha256]
    ours, error = served(
        grant,
        {"t": "read", "offset": 0, "length": 10},
        {"t": "read", "offset": 2 * CHUNK_BYTES - 5, "length": 10},
        {"t": "read", "offset": 2 * CHUNK_BYTES - 5, "length": 5},
    )
    assert error is None
    assert not ours.receive()["whole"]
    assert ours.receive()["t"] == "refused"
    assert ours.receive()["t"] == "refused"
    assert ours.receive() == {"t": "data", "length": 5}
    ours.close()


def test_a_peer_that_breaks_the_protocol_is_left_for_good(tmp_path: Path) -> None:
    class Rude(SocketStream):
        def send(self, frame: dict[str, Any]) -> None:
            super().send({**frame, "length": 1} if frame["t"] == "data" else frame)

    rude = holder(tmp_path, "rude", stream=Rude)
    end = failed(fetch(tmp_path / "home", rude))
    assert "rude: the answer is not" in end.message
    assert rude.opened == 1


def test_names_of_peers_are_told_apart(tmp_path: Path) -> None:
    ada = holder(tmp_path, "hub")
    with neighbourhood(ada) as open_stream:
        peers = (peer("hub"), PeerSource(node_id="0123456789", name="hub", addresses=()))
        order = order_for(tmp_path / "home", MANIFEST, offline=True, peers=peers)
        news = carry_out(order, open_stream)
    assert set(done(news).sources) <= {"hub (id of hu)", "hub (01234567)"}
    assert said(news) == ""
