"""Which tensors lie with which worker."""

from __future__ import annotations

import pytest

from meshd.ids import NodeId
from meshd.runtime.lending.extents import TensorExtent, held_by, offered_by_hash
from meshd.view.split import Part

NAMES = ["token_embd.weight"]
NAMES += [f"blk.{n}.{what}.weight" for n in range(12) for what in ("attn_q", "ffn_up")]
NAMES += ["output_norm.weight", "output.weight", "rope_freqs.weight"]


def extents(names: list[str], size: int = 1) -> list[TensorExtent]:
    return [TensorExtent(name, "/w", 0, size) for name in names]


def part(first: int, *layers: int, output: bool = False) -> Part:
    memory = tuple((f"CUDA{n}", 1) for n in range(len(layers)))
    return Part(NodeId("n"), "n", memory, layers, first, output, 0.5)


def held(which: Part, names: list[str]) -> list[str]:
    return [t.name for t in held_by(which, extents(names))]


def test_layers_of_all_its_devices() -> None:
    assert held(part(1, 1, 2), NAMES) == [
        f"blk.{n}.{what}.weight" for n in (1, 2, 3) for what in ("attn_q", "ffn_up")
    ]  # and neither 10 nor 11


def test_the_output_layer() -> None:
    assert held(part(12, 0, output=True), NAMES) == ["output_norm.weight", "output.weight"]


def test_an_embedding_that_is_the_output_layer_too() -> None:
    names = [name for name in NAMES if name != "output.weight"]
    assert held(part(12, 0, output=True), names) == ["token_embd.weight", "output_norm.weight"]


def test_an_embedding_is_not_taken_for_the_output_layer_when_that_may_be_elsewhere() -> None:
    some = extents(["token_embd.weight", "blk.0.ffn_up.weight"])
    assert [t.name for t in held_by(part(0, 1, output=True), some, all_known=False)] == [
        "blk.0.ffn_up.weight"
    ]


@pytest.mark.parametrize("name", ["blk.x.w", "blk.", "blk", "block.1.w", "blk.²"])
def test_a_name_that_is_no_layer_is_nobodys(name: str) -> None:
    assert held(part(0, 99, output=True), [name]) == []


def test_only_large_ones_are_offered_by_hash() -> None:
    limit = 10 * 1024 * 1024
    assert offered_by_hash(extents(["a"], limit)) == ()
    assert [t.name for t in offered_by_hash(extents(["a"], limit + 1))] == ["a"]
