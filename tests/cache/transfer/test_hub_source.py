"""Ranges from the hub: nothing but the right bytes in the right place is ever delivered."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from meshd.cache.chunks import CHUNK_BYTES
from meshd.cache.hub import translate
from meshd.cache.manifest import Manifest
from meshd.cache.transfer.flights import Span
from meshd.cache.transfer.hub_source import HubFile
from meshd.errors import HubRefused, HubUnavailable, MeshdError
from tests.cache.transfer.world import REPO, content, manifest_of, sha256
from tests.hub import (
    Drop,
    Fault,
    IgnoreRange,
    LocalHub,
    Page,
    Pointer,
    Reset,
    Stage,
    Stall,
    Status,
    Truncate,
    WrongLength,
)

PATH = "a.gguf"
DATA = content(1, 4 * CHUNK_BYTES + 100)
ALL = Span(1, 0, 5)


@dataclass
class Sink:
    got: dict[int, bytes] = field(default_factory=dict)
    enough: int = 1000

    def __call__(self, index: int, data: memoryview) -> bool:
        self.got[index] = bytes(data)
        return len(self.got) < self.enough

    def is_right(self) -> bool:
        return all(
            data == DATA[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES] for i, data in self.got.items()
        )


def file_at(hub: LocalHub, stall_s: float = 10.0, data: bytes = DATA) -> HubFile:
    commit = hub.add(REPO, {PATH: DATA})
    return file_of(manifest_of({PATH: data}, commit), stall_s)


def file_of(manifest: Manifest, stall_s: float = 10.0) -> HubFile:
    return HubFile(manifest, manifest.shards[0], stall_s=stall_s, translate=translate)


def fetch(file: HubFile, span: Span = ALL, enough: int = 1000) -> Sink:
    sink = Sink(enough=enough)
    file.fetch(span, memoryview(bytearray(CHUNK_BYTES)), sink)
    assert sink.is_right()
    return sink


def trouble(file: HubFile, span: Span = ALL) -> tuple[Sink, MeshdError]:
    sink = Sink()
    with pytest.raises((HubRefused, HubUnavailable)) as caught:
        file.fetch(span, memoryview(bytearray(CHUNK_BYTES)), sink)
    assert sink.is_right()
    return sink, caught.value


def test_the_whole_in_one_request(hub: LocalHub) -> None:
    assert b"".join(fetch(file_at(hub)).got.values()) == DATA
    assert len(hub.content_requests()) == 1


def test_a_span_costs_just_its_bytes(hub: LocalHub) -> None:
    assert sorted(fetch(file_at(hub), Span(1, 2, 1)).got) == [2]
    hub.wait_sent(PATH, CHUNK_BYTES)
    assert sorted(fetch(file_at(hub), Span(1, 4, 1)).got) == [4]
    hub.wait_sent(PATH, CHUNK_BYTES + 100)
    assert hub.sent() == CHUNK_BYTES + 100


def test_the_address_is_asked_for_once(hub: LocalHub) -> None:
    file = file_at(hub)
    for index in range(3):
        fetch(file, Span(1, index, 1))
    assert len([r for r in hub.requests if r.stage is Stage.RESOLVE]) == 1


def test_enough_is_enough(hub: LocalHub) -> None:
    assert sorted(fetch(file_at(hub), enough=2).got) == [0, 1]


@pytest.mark.parametrize(
    ("fault", "delivered"),
    [
        (Truncate(CHUNK_BYTES + 10), 1),
        (Reset(2 * CHUNK_BYTES + 10), 2),
        (WrongLength(5), 5),
        (IgnoreRange(), 0),
        (Page(), 0),
        (Pointer(), 0),
        (Drop(), 0),
        (Status(500, None, None, None), 0),
        (Status(503, 7), 0),
        (Status(429, 7), 0),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else "",
)
def test_faults_that_may_pass(hub: LocalHub, fault: Fault, delivered: int) -> None:
    file = file_at(hub)
    hub.faults.add(PATH, fault, times=1)
    if delivered == 5:
        fetch(file)  # the announced rest is not waited for
    else:
        sink, error = trouble(file)
        assert isinstance(error, HubUnavailable)
        assert len(sink.got) == delivered
        if isinstance(fault, Status) and fault.retry_after_s:
            assert error.retry_after_s == 7
    assert len(fetch(file).got) == 5


def test_a_range_that_is_ignored_in_the_middle_of_a_file(hub: LocalHub) -> None:
    file = file_at(hub)
    hub.faults.add(PATH, IgnoreRange(), times=1)
    sink, error = trouble(file, Span(1, 2, 2))
    assert not sink.got
    assert "something else" in error.message


def test_silence_ends(hub: LocalHub) -> None:
    file = file_at(hub, stall_s=0.3)
    hub.faults.add(PATH, Stall(CHUNK_BYTES + 10), times=1)
    sink, error = trouble(file)
    assert isinstance(error, HubUnavailable)
    assert sorted(sink.got) == [0]


def test_an_address_that_ran_out_is_asked_for_again(hub: LocalHub) -> None:
    file = file_at(hub)
    fetch(file, Span(1, 0, 1))
    hub.faults.add(PATH, Status(403), times=1, stage=Stage.CONTENT)
    _, error = trouble(file, Span(1, 1, 1))
    assert isinstance(error, HubUnavailable)
    fetch(file, Span(1, 1, 1))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refusals_are_final(hub: LocalHub, status: int) -> None:
    file = file_at(hub)
    hub.faults.add(PATH, Status(status), times=None)
    _, error = trouble(file)
    assert isinstance(error, HubRefused)
    assert not error.retryable


def test_other_bytes_than_the_manifest_names_are_not_even_asked_for(hub: LocalHub) -> None:
    other = content(2, len(DATA))
    _, error = trouble(file_at(hub, data=other))
    assert isinstance(error, HubRefused)
    assert sha256(other) in error.message
    assert not hub.content_requests()


def test_a_token_goes_to_the_hub_and_not_where_it_leads(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add(REPO, {PATH: DATA}, private=True)
    hub.admit("hf_secret", REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(file_of(manifest_of({PATH: DATA}, commit)))
    tokens = {request.stage: request.token for request in hub.requests}
    assert tokens[Stage.RESOLVE] == "hf_secret"
    assert tokens[Stage.CONTENT] is None


def test_without_a_connection(hub: LocalHub) -> None:
    file = file_at(hub)
    hub.close()
    _, error = trouble(file)
    assert isinstance(error, HubUnavailable)
