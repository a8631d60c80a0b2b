"""What a model will take of memory, counted from its shape before anything is loaded. Pure.

Sizes are bytes. The engine is llama.cpp's, with its defaults; sources are build 0c1e570 and what it
logs at verbosity 4. Rules, numbered as in the code:

1. A slot's context is padded to 256 tokens. Every slot has a cache of its own.
2. A layer with a window of n tokens keeps n and one batch, padded to 256, if that is less.
3. Keys and values have the same type. A layer without values (MLA) keeps keys alone.
4. A recurrent layer's state is F32 and does not grow with the context.
5. For computing there is one buffer on each device, large enough for a batch of `BATCH` tokens in
   the hungriest layer: a mask of 2 bytes for each token of the batch and of the context, for each
   window a second one, and what is alive at once in one layer (`_alive`).
6. Where several devices share all layers the engine works on several batches at once, with
   `COPIES` copies of what goes into each: the masks and a row of embeddings a token.
7. Logits of one token for each slot are kept in the host's memory.
8. Of a projector its weights are known; for computing a quarter of them is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from meshd.view.shape import LayerKind, ModelShape

BATCH: Final = 512
"""Tokens worked on at once; the engine's `--ubatch-size`."""
PAD: Final = 256
COPIES: Final = 4
FLOAT: Final = 4
BLOCKS: Final[Mapping[str, tuple[int, int]]] = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q5_1": (32, 24),
    "q5_0": (32, 22),
    "q4_1": (32, 20),
    "q4_0": (32, 18),
    "iq4_nl": (32, 18),
}
"""Types the engine takes for its cache: elements and bytes of a block."""


@dataclass(frozen=True, slots=True)
class LayerNeed:
    """Of one repeating layer."""

    weights: int
    cache: int

    @property
    def total(self) -> int:
        return self.weights + self.cache


@dataclass(frozen=True, slots=True)
class Estimate:
    """Everything one engine will hold, by where it can lie."""

    layers: tuple[LayerNeed, ...]
    """In order; a device holds a row of them."""
    output: int
    """The output layer, beside the last layer."""
    output_copy: int
    """What of the embedding a device with the output layer holds a second time."""
    embedding: int
    """In the host's memory."""
    compute: int
    """On a device that holds layers."""
    masks: int
    """Of one batch; part of `compute`."""
    row: int
    """Embeddings of one batch; part of `compute`."""
    logits: int
    """In the host's memory."""
    projector: int
    """On the first device."""
    prompts: int
    """In the host's memory: what may be kept of conversations that no slot has any more."""
    context: int
    """Tokens per slot, padded."""
    slots: int

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers) + self.output + self.embedding

    @property
    def cache(self) -> int:
        return sum(layer.cache for layer in self.layers)

    def compute_on_each(self, devices: int) -> int:
        """On each of `devices` that hold all layers together (6)."""
        copies = COPIES if devices > 1 else 1
        return self.compute + (copies - 1) * (self.masks + self.row)

    def compute_beside(self, devices: int) -> int:
        """In main memory, if it holds none of the layers: what goes into each batch, and the
        embeddings it is made of."""
        copies = COPIES if devices > 1 else 1
        return copies * (self.masks + self.row) + self.row

    @property
    def total(self) -> int:
        """All of it in one memory."""
        beside = self.logits + self.projector + self.prompts
        return self.weights + self.cache + self.compute + beside


def estimate(
    shape: ModelShape,
    *,
    context: int,
    slots: int,
    kv_type: str = "f16",
    flash_attention: bool = True,
    prompts: int = 0,
) -> Estimate:
    """For `slots` conversations of `context` tokens each. `prompts`: the engine's `--cache-ram`,
    which it takes up by and by; it is 8 GiB unless the engine is told otherwise.

    Raises ValueError for a type of cache the engine has not, or for no slot or no context.
    """
    if context < 1 or slots < 1:
        raise ValueError(f"{slots} slots of {context} tokens are nothing to count")
    if kv_type not in BLOCKS:
        raise ValueError(f"`{kv_type}` is none of the types of a cache: {', '.join(BLOCKS)}")
    padded = _padded(context)  # 1
    batch = min(BATCH, padded * slots)
    masks = batch * _mask(shape, padded, 2 if flash_attention else FLOAT)
    scores = 0 if flash_attention else batch * _scores(shape, padded)
    needs = tuple(
        LayerNeed(weights, _cache(kind, padded, slots, kv_type)) for weights, kind in shape.layers
    )
    return Estimate(
        layers=needs,
        output=shape.output_bytes,
        output_copy=shape.input_bytes if shape.tied else 0,
        embedding=shape.input_bytes,
        compute=masks + scores + FLOAT * batch * _alive(shape),
        masks=masks,
        row=FLOAT * batch * shape.width,
        logits=FLOAT * shape.vocabulary * slots,  # 7
        projector=shape.mmproj_bytes * 5 // 4,  # 8
        prompts=prompts,
        context=padded,
        slots=slots,
    )


def _padded(tokens: int) -> int:
    return -(-tokens // PAD) * PAD


def _cells(window: int, context: int) -> int:
    """Tokens a slot's cache has room for in a layer with that window (2)."""
    return _padded(min(context, window + BATCH)) if window else context


def _cache(kind: LayerKind, context: int, slots: int, kv_type: str) -> int:
    elements, size = BLOCKS[kv_type]
    row = sum(-(-width // elements) * size for width in (kind.key, kind.value))  # 3
    return slots * (row * _cells(kind.window, context) + kind.state)  # 4


def _mask(shape: ModelShape, context: int, element: int) -> int:
    """Bytes a token of a batch (5). A batch is shared out to slots: masks do not grow with them."""
    caches = {(kind.window > 0, _cells(kind.window, context)) for kind in shape.kinds if kind.key}
    return element * sum(cells for _, cells in caches)


def _scores(shape: ModelShape, context: int) -> int:
    """Bytes a token of a batch: without flash attention a layer compares with all keys at once."""
    cells = (_cells(kind.window, context) for kind in shape.kinds if kind.key)
    return FLOAT * shape.heads * max(cells, default=0)


def _alive(shape: ModelShape) -> int:
    """Elements a token that are alive at once in the hungriest part of a layer.

    Measured, since the engine plans its buffer by the order of its graph: a feed-forward part keeps
    its two inner products, what becomes of them, and four rows of the embedding's width; attention
    two rows of queries, and what was read or again four such rows; experts narrower than half the
    embedding are outweighed by what they give back. Off by at most a tenth of the embedding's width
    in shapes people train, by a fifth of the buffer in others.
    """
    width, used, expert = shape.width, shape.experts_used, shape.expert_ff
    parts = [
        3 * shape.feed_forward + 4 * width,
        2 * shape.query + max(4 * width, shape.attended),
        6 * shape.recurrence + width,
    ]
    if 2 * expert < width:
        parts.append(2 * used * (width + expert))
    else:
        parts.append(3 * used * expert + 4 * width)
    return max(parts)
