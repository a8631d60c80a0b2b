"""Frames of loans: what is written is read back, and nothing else than it should be is."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.errors import ProtocolError
from meshd.ids import ModelId
from meshd.peers.links.frames import frame
from meshd.peers.loans.words import (
    FRAME_LIMIT,
    MAX_DEVICES,
    MAX_REF,
    MAX_WORKERS,
    Ask,
    Ended,
    Granted,
    Refused,
    ask_to_wire,
    parse_host_word,
    parse_worker_word,
)
from meshd.view import MAX_NEEDED_FILES, NeededWeights, Part
from tests.peers.loans.parts import a_part, an_ask

NAMES = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=256)
SIZES = st.integers(0, (1 << 53) - 1)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
WORKER_WORDS: tuple[dict[str, Any], ...] = (
    {"t": "granted", "loan": "loan-" + "0" * 32},
    {"t": "refused", "reason": "no_memory", "message": "3 GiB are free"},
    {"t": "moved", "words": "warming"},
    {"t": "serving", "warmed_bytes": 5},
    {"t": "ended", "reason": "the device is gone"},
)


SOME = NeededWeights("acme/m@" + "0" * 40, (("f" * 64, 9),), 8, 16, 2, 1e8)


def over_the_wire(value: dict[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = orjson.loads(orjson.dumps(value))
    return read


@st.composite
def parts(draw: st.DrawFn) -> Part:
    memory = draw(st.lists(st.tuples(NAMES, SIZES), min_size=1, max_size=5))
    layers = st.lists(st.integers(0, 999), min_size=len(memory), max_size=len(memory))
    return replace(
        a_part(),
        name=draw(NAMES),
        memory=tuple(memory),
        layers=tuple(draw(layers)),
        first_layer=draw(st.integers(0, 999)),
        output=draw(st.booleans()),
        share=draw(st.sampled_from([0.0, 1.0]) | st.floats(0, 1)),
    )


NEEDED = st.builds(
    NeededWeights,
    ref=NAMES,
    files=st.lists(
        st.tuples(st.text("0123456789abcdef", min_size=64, max_size=64), SIZES),
        min_size=1,
        max_size=3,
    ).map(tuple),
    bytes=SIZES,
    pushed_bytes=SIZES,
    pushed_to=st.integers(0, 64),
    bytes_per_s=st.none() | st.floats(1, 1e15),
)


@given(part=parts(), epoch=SIZES, digest=st.none() | NAMES, weights=st.none() | NEEDED)
def test_an_ask_is_read_as_it_was_written(
    part: Part, epoch: int, digest: str | None, weights: NeededWeights | None
) -> None:
    ask = replace(an_ask(part), epoch=epoch, digest=digest, weights=weights)
    word = parse_host_word(over_the_wire(ask_to_wire(ask)))
    assert isinstance(word, Ask)
    assert word.to_view() == ask


def test_the_largest_ask_fits_a_frame() -> None:
    name = "\U00020000" * 256  # four bytes each
    part = replace(
        a_part(), name=name, memory=((name, 1 << 52),) * MAX_DEVICES, layers=(9,) * MAX_DEVICES
    )
    files = (("f" * 64, (1 << 53) - 1),) * MAX_NEEDED_FILES
    size = (1 << 53) - 1
    needed = NeededWeights("\U00020000" * MAX_REF, files, size, size, MAX_WORKERS, 1e15 / 3)
    ask = replace(an_ask(part), model=ModelId(name), digest=name, rpc_protocol=name, weights=needed)
    data = frame(ask_to_wire(ask))
    assert len(data) <= FRAME_LIMIT
    assert isinstance(parse_host_word(orjson.loads(data[4:])), Ask)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("model", ""),
        ("model", "x" * 257),
        ("model", "a\nb"),
        ("epoch", -1),
        ("epoch", 1 << 53),
        ("epoch", 1.0),
        ("rpc_protocol", None),
        ("part", None),
        ("part.node", "somebody"),
        ("part.memory", []),
        ("part.memory", [["CUDA0", 1 << 53]]),
        ("part.memory", [["CUDA0"]]),
        ("part.memory", [["CUDA0", 1]] * (MAX_DEVICES + 1)),
        ("part.layers", [1]),
        ("part.layers", [-1, 1]),
        ("part.first_layer", True),
        ("part.output", "no"),
        ("part.share", 1.5),
        ("part.share", float("nan")),
        ("weights.ref", ""),
        ("weights.ref", "a\nb"),
        ("weights.ref", "a" * (MAX_REF + 1)),
        ("weights.files", []),
        ("weights.files", [["f" * 64, 1]] * (MAX_NEEDED_FILES + 1)),
        ("weights.files", [["F" * 64, 1]]),
        ("weights.files", [["../" + "f" * 61, 1]]),
        ("weights.files", [["f" * 64]]),
        ("weights.files", [["f" * 64, -1]]),
        ("weights.bytes", -1),
        ("weights.pushed_bytes", "1"),
        ("weights.pushed_to", MAX_WORKERS + 1),
        ("weights.bytes_per_s", 0),
        ("weights.bytes_per_s", float("inf")),
        ("weights.bytes_per_s", float("nan")),
    ],
)
def test_what_an_ask_may_not_hold(place: str, value: Any) -> None:
    wire = over_the_wire(ask_to_wire(replace(an_ask(), weights=SOME)))
    inner = wire
    *outer, field = place.split(".")
    for key in outer:
        inner = inner[key]
    inner[field] = value
    with pytest.raises(ProtocolError, match=field):
        parse_host_word(wire)


def test_what_a_later_version_adds_is_ignored() -> None:
    wire = over_the_wire(ask_to_wire(an_ask())) | {"urgency": 3}
    wire["part"]["colour"] = "red"
    word = parse_host_word(wire)
    assert isinstance(word, Ask)
    assert word.to_view() == an_ask()
    assert parse_host_word({"t": "granted", "loan": 1}) is None
    assert parse_worker_word({"t": "ask"}) is None
    assert parse_worker_word({"t": ["granted"]}) is None


def test_words_for_people_are_one_clean_line() -> None:
    word = parse_worker_word({"t": "ended", "reason": "\x1b[31mred\nline" + "x" * 5000})
    assert isinstance(word, Ended)
    assert word.reason.startswith("[31mred line")
    assert len(word.reason) <= 500
    refused = parse_worker_word({"t": "refused", "message": 7})
    assert isinstance(refused, Refused)
    assert refused.message == "no reason given"


@pytest.mark.parametrize("loan", ["loan-1", "loan-" + "0" * 33, "../../" + "0" * 32, 7, None])
def test_a_loan_has_one_kind_of_name(loan: Any) -> None:
    assert isinstance(parse_worker_word(WORKER_WORDS[0]), Granted)
    with pytest.raises(ProtocolError, match="loan"):
        parse_worker_word({"t": "granted", "loan": loan})


@given(data=st.data(), value=JSON)
def test_any_value_in_any_place_is_read_or_refused(data: st.DataObject, value: Any) -> None:
    ask = over_the_wire(ask_to_wire(an_ask()))
    word = over_the_wire(data.draw(st.sampled_from((*WORKER_WORDS, ask, ask["part"]))))
    word[data.draw(st.sampled_from(sorted(word)))] = value
    host = {**ask, "part": word} if "node" in word else word
    for parse in (parse_host_word, parse_worker_word):
        with contextlib.suppress(ProtocolError):
            parse(host)
