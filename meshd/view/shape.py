"""What the memory of a model depends on, small enough to travel between nodes. Sizes are bytes.

A node that holds the weights reads a `ModelShape` out of their headers; every other node counts
with it whether it could host them, without a byte of them on its disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_letters
from typing import Annotated, Final

from pydantic import Field, TypeAdapter, ValidationError

MAX_JSON_BYTES: Final = 4096
MAX_LAYERS: Final = 256
"""Of the largest models known 126."""
MAX_KINDS: Final = 16
MAX_UNITS: Final = 999_999

Size = Annotated[int, Field(ge=0, le=1 << 50)]
Width = Annotated[int, Field(ge=0, lt=1 << 24)]
"""A number of elements, or of tokens."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What one layer keeps of a conversation."""

    key: Width = 0
    """Elements a token in the cache of keys."""
    value: Width = 0
    """The same of values; 0 where keys hold them too (MLA)."""
    window: Width = 0
    """Tokens it looks back at; 0 for all."""
    state: Size = 0
    """Bytes a slot that do not grow with the context: the state of a recurrent layer."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """See the module's docstring. Made by `meshd.cache.shape`, or by `from_json`."""

    architecture: Annotated[str, Field(max_length=64)]
    weight_unit: Annotated[int, Field(ge=1, le=1 << 50)]
    """Bytes that the numbers in `weights` count."""
    weights: Annotated[tuple[Annotated[int, Field(ge=0, le=MAX_UNITS)], ...],
                       Field(max_length=MAX_LAYERS)]  # fmt: skip
    """Of each repeating layer, in order; rounded up."""
    pattern: Annotated[str, Field(max_length=MAX_LAYERS)]
    """A letter for each of these layers: `a` is the first of `kinds`."""
    kinds: Annotated[tuple[LayerKind, ...], Field(max_length=MAX_KINDS)]
    input_bytes: Size = 0
    """The embedding of tokens: it stays in the host's memory."""
    output_bytes: Size = 0
    """The output layer and whatever else belongs to no layer."""
    tied: bool = False
    """The output layer is the embedding: a device that has it needs a copy."""
    mmproj_bytes: Size = 0
    """Of the projector for images or sound."""
    width: Width = 0
    """Of the embedding."""
    query: Width = 0
    """Of all heads' queries together, as they are compared with keys."""
    attended: Width = 0
    """Of what all heads together read from values."""
    feed_forward: Width = 0
    """Inner width of layers without experts."""
    expert_ff: Width = 0
    """The same of one expert."""
    experts_used: Width = 0
    """By each token; 0 without experts."""
    recurrence: Width = 0
    """Inner width of recurrent layers."""
    heads: Width = 0
    vocabulary: Width = 0
    trained_context: Width = 0
    """Tokens; 0 if not said."""

    @property
    def layers(self) -> tuple[tuple[int, LayerKind], ...]:
        """(bytes of weights, kind) of each repeating layer, in order."""
        kinds = dict(zip(ascii_letters, self.kinds, strict=False))
        return tuple(
            (units * self.weight_unit, kinds[letter])
            for units, letter in zip(self.weights, self.pattern, strict=True)
        )

    def to_json(self) -> bytes:
        """At most `MAX_JSON_BYTES`, of whatever `meshd.cache.shape` makes."""
        return _ADAPTER.dump_json(self, exclude_defaults=True)

    @classmethod
    def from_json(cls, text: bytes) -> ModelShape:
        """Another node's word, bounded and coherent; raises ValueError. Unknown fields are ignored:
        a newer node may say more."""
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"a shape of {len(text)} bytes is longer than {MAX_JSON_BYTES}")
        try:
            shape = _ADAPTER.validate_json(text, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        if len(shape.pattern) != len(shape.weights):
            raise ValueError(f"{len(shape.weights)} layers, but kinds of {len(shape.pattern)}")
        if not set(shape.pattern) <= set(ascii_letters[: len(shape.kinds)]):
            raise ValueError("a layer is of a kind that is not described")
        return shape


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """What an engine holds of one device."""

    weights: int = 0
    mapped: int = 0
    """Of the weights: pages of their file, which the kernel may drop and read again. They are no
    less of the machine's available memory for being there."""
    cache: int = 0
    """Of keys and values, and states of recurrent layers."""
    compute: int = 0
    output: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.compute + self.output

    @property
    def private(self) -> int:
        """What is missing from the device's free memory because of it."""
        return self.total - self.mapped


def units_of(weights: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """`weight_unit` and `weights` for layers of these bytes: a power of two of at least 1024, so
    that no number has more than six digits and none is off by more than a hundred-thousandth of the
    largest."""
    unit = 1024
    while max(weights, default=0) > unit * MAX_UNITS:
        unit *= 2
    return unit, tuple(-(-size // unit) for size in weights)


def pattern_of(layers: Sequence[LayerKind]) -> tuple[str, tuple[LayerKind, ...]]:
    """`pattern` and `kinds` of these layers. Kinds beyond `MAX_KINDS` are counted as one that is as
    large as the largest of all in everything."""
    distinct = list(dict.fromkeys(layers))
    if len(distinct) <= MAX_KINDS:
        kinds = tuple(distinct)
    else:
        largest = LayerKind(
            key=max(kind.key for kind in distinct),
            value=max(kind.value for kind in distinct),
            window=0,
            state=max(kind.state for kind in distinct),
        )
        kinds = (*distinct[: MAX_KINDS - 1], largest)
    letters = dict(zip(kinds, ascii_letters, strict=False))
    return "".join(letters.get(kind, ascii_letters[len(kinds) - 1]) for kind in layers), kinds


_ADAPTER: Final = TypeAdapter(ModelShape)
