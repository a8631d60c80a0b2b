"""Which tensors of a model a worker of a split holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshd.runtime.lending.rpc_words import HASHED_OVER_BYTES
from meshd.view.split import Part

EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"


@dataclass(frozen=True, slots=True)
class TensorExtent:
    """Where one tensor's bytes lie."""

    name: str
    path: str
    """Of a file that was verified."""
    offset: int
    """Bytes from the start of the file."""
    size: int
    """Bytes."""


def held_by(
    part: Part, tensors: Sequence[TensorExtent], *, all_known: bool = True
) -> tuple[TensorExtent, ...]:
    """Those of a model's `tensors` that lie with `part`: its repeating layers, and the output layer
    if it has that. A model without output weights uses its embedding for them; `all_known`: that
    there are none among `tensors` means that it has none."""
    layers = range(part.first_layer, part.first_layer + sum(part.layers))
    tied = all_known and all(t.name != OUTPUT for t in tensors)

    def held(name: str) -> bool:
        if (layer := _layer_of(name)) is not None:
            return layer in layers
        return part.output and (name.startswith("output") or (tied and name == EMBEDDING))

    return tuple(t for t in tensors if held(t.name))


def offered_by_hash(tensors: Sequence[TensorExtent]) -> tuple[TensorExtent, ...]:
    """Those a host offers by hash before it sends them: only these can lie in a cache."""
    return tuple(t for t in tensors if t.size > HASHED_OVER_BYTES)


def _layer_of(name: str) -> int | None:
    """7 of `blk.7.ffn_up.weight`; None of what belongs to no repeating layer."""
    prefix, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return int(number) if prefix == "blk" and number.isascii() and number.isdigit() else None
