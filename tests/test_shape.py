"""Shapes as they travel between nodes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from meshd.view.shape import (
    MAX_JSON_BYTES,
    MAX_KINDS,
    MAX_LAYERS,
    LayerKind,
    MemoryParts,
    ModelShape,
    pattern_of,
    units_of,
)

SHAPE = ModelShape(
    architecture="gemma3",
    weight_unit=1024,
    weights=(10, 20, 30),
    pattern="aab",
    kinds=(LayerKind(key=128, value=64, window=512), LayerKind(key=128, value=64)),
    input_bytes=7,
    tied=True,
    width=256,
)


def as_dict() -> dict[str, Any]:
    found = json.loads(SHAPE.to_json())
    assert isinstance(found, dict)
    return found


def test_a_shape_travels() -> None:
    assert ModelShape.from_json(SHAPE.to_json()) == SHAPE
    assert SHAPE.layers == (
        (10_240, SHAPE.kinds[0]),
        (20_480, SHAPE.kinds[0]),
        (30_720, SHAPE.kinds[1]),
    )
    newer = as_dict() | {"said_later": 1}
    assert ModelShape.from_json(json.dumps(newer).encode()) == SHAPE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pattern": "aa"}, "3 layers, but kinds of 2"),
        ({"pattern": "abc"}, "a kind that is not described"),
        ({"pattern": "a b"}, "a kind that is not described"),
        ({"width": -1}, "width: "),
        ({"width": 1 << 24}, "width: "),
        ({"width": "9"}, "width: "),
        ({"input_bytes": 1 << 51}, "input_bytes: "),
        ({"weights": [1.5, 1, 1]}, "weights.0: "),
        ({"kinds": [{"key": -1}]}, "kinds.0.key: "),
        ({"architecture": "x" * 65}, "architecture: "),
        ({"weights": [0] * (MAX_LAYERS + 1), "pattern": "a"}, "weights: "),
        ({"kinds": [{}] * (MAX_KINDS + 1)}, "kinds: "),
    ],
)
def test_another_nodes_word_is_checked(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModelShape.from_json(json.dumps(as_dict() | change).encode())


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"null", b"\xff", b" " * 5000])
def test_what_is_no_shape_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (the words are pydantic's)
        ModelShape.from_json(text)


def test_the_largest_shape_there_can_be_travels() -> None:
    most = (1 << 24) - 1
    kinds = tuple(LayerKind(most, most, most, (1 << 50) - n) for n in range(MAX_KINDS))
    unit, weights = units_of([(1 << 50) - n for n in range(MAX_LAYERS)])
    sizes = dict.fromkeys(("input_bytes", "output_bytes", "mmproj_bytes"), 1 << 50)
    widths = dict.fromkeys(
        ("width", "query", "attended", "feed_forward", "expert_ff", "experts_used", "recurrence",
         "heads", "vocabulary", "trained_context"),
        most,
    )  # fmt: skip
    shape = ModelShape(
        "x" * 64, unit, weights, "abcdefghijklmnop" * 16, kinds, tied=True, **sizes, **widths
    )
    assert MAX_JSON_BYTES * 0.8 < len(shape.to_json()) <= MAX_JSON_BYTES
    assert ModelShape.from_json(shape.to_json()) == shape


def test_weights_are_rounded_up_and_hardly() -> None:
    assert units_of([]) == (1024, ())
    assert units_of([0, 1, 1024, 1025]) == (1024, (0, 1, 1, 2))
    sizes = [11_000_000_001, 10_000_000_000]
    unit, units = units_of(sizes)
    for size, count in zip(sizes, units, strict=True):
        assert size <= count * unit < size * 1.00001


def test_kinds_beyond_the_most_are_counted_as_the_largest() -> None:
    many = [LayerKind(key=n + 1, value=200 - n, window=n + 1) for n in range(100)]
    pattern, kinds = pattern_of(many)
    assert len(kinds) == MAX_KINDS
    shape = ModelShape("x", 1024, (0,) * 100, pattern, kinds)
    for asked, (_, kept) in zip(many, shape.layers, strict=True):
        assert kept == asked or kept == LayerKind(key=100, value=200)


def test_private_memory_is_what_is_missing_elsewhere() -> None:
    parts = MemoryParts(weights=100, mapped=60, cache=10, compute=5, output=1)
    assert (parts.total, parts.private) == (116, 56)
