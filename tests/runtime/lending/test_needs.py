"""What workers are told they need of the weights."""

from __future__ import annotations

from dataclasses import replace

from meshd.ids import NodeId
from meshd.runtime.lending.extents import TensorExtent
from meshd.runtime.lending.needs import needs
from meshd.view import MAX_NEEDED_FILES, NeededWeights, Part

MIB = 1 << 20
B, C, D = (NodeId(name) for name in "bcd")
REF = "acme/model-GGUF@" + "0" * 40 + ":F16"


def part(node: NodeId, first: int, layers: int, *, output: bool = False) -> Part:
    return Part(node, node, (("CPU", MIB),), (layers,), first, output, 0.5)


def layer(number: int, path: str) -> list[TensorExtent]:
    """20 MiB in two tensors that are kept, and one that is not."""
    names = {"ffn_up": 12 * MIB, "ffn_down": 11 * MIB, "attn_norm": 4096}
    return [TensorExtent(f"blk.{number}.{n}.weight", path, 0, size) for n, size in names.items()]


TENSORS = [
    TensorExtent("token_embd.weight", "/1", 0, 16 * MIB),
    *layer(0, "/1"),
    *layer(1, "/2"),
    *layer(2, "/2"),
    *layer(3, "/3"),
    TensorExtent("output.weight", "/4", 0, 16 * MIB),
]
FILES = {f"/{number}": (str(number) * 64, number * 1000) for number in range(1, 5)}
LAYER = 23 * MIB


def told(*parts: Part, holders: frozenset[NodeId] = frozenset()) -> dict[NodeId, NeededWeights]:
    return dict(needs(parts, REF, TENSORS, FILES, holders=holders, bytes_per_s={C: 1e8}))


def test_each_needs_the_files_of_its_layers() -> None:
    found = told(part(B, 0, 2), part(C, 2, 2, output=True))
    assert found == {
        B: NeededWeights(REF, (FILES["/1"], FILES["/2"]), 2 * LAYER, 4 * LAYER + 16 * MIB, 2, None),
        C: NeededWeights(
            REF,
            (FILES["/2"], FILES["/3"], FILES["/4"]),
            2 * LAYER + 16 * MIB,
            4 * LAYER + 16 * MIB,
            2,
            1e8,
        ),
    }


def test_who_holds_the_weights_is_sent_none() -> None:
    found = told(part(B, 0, 1), part(C, 1, 1), part(D, 2, 1), holders=frozenset({C}))
    assert {
        node: (one.pushed_bytes, one.pushed_to) for node, one in found.items()
    } == dict.fromkeys((B, C, D), (2 * LAYER, 2))


def test_what_cannot_be_kept_need_not_be_fetched() -> None:
    small = [t for t in TENSORS if t.size < MIB]
    assert needs((part(B, 0, 4),), REF, small, FILES, holders=(), bytes_per_s={}) == {}


def test_a_part_in_too_many_files_is_left_to_the_host() -> None:
    spread = [replace(t, path=f"/{n}") for n in range(MAX_NEEDED_FILES + 1) for t in layer(0, "")]
    files = {f"/{n}": ("0" * 64, 1) for n in range(MAX_NEEDED_FILES + 1)}
    parts = (part(B, 0, 1), part(C, 0, 1))
    assert needs(parts, REF, spread, files, holders=(), bytes_per_s={}) == {}
    most = spread[: 3 * MAX_NEEDED_FILES]
    assert set(needs(parts, REF, most, files, holders=(), bytes_per_s={})) == {B, C}
