"""From the headers of a set of weights to what its memory depends on (`ModelShape`). Pure.

Widths are taken from tensors where tensors tell, since keys may be arrays (one number a layer) and
arrays are not kept. Total: what a header does not say falls to an assumption, numbered here and in
the code:

1. Layers are the blocks that tensors are named after (`blk.7.`). Blocks past `MAX_LAYERS` count as
   parts of the output layer.
2. A layer with recurrent tensors keeps a state and no keys, except in `BOTH`, where it has both.
   A layer without tensors of keys keeps none. If no layer has either, all attend.
3. Keys of a layer are as wide as `attn_k` makes them; where queries, keys and values are one
   tensor, `head_count_kv` heads of `key_length`. Without `head_count_kv` there are as many as
   heads, without `key_length` a head is its share of the embedding.
4. With `key_length_mla` attention is latent: what `attn_kv_a_mqa` makes is kept, and no values.
5. A window counts only for architectures in `WINDOWS`: the engine ignores the key elsewhere. Which
   layers have it follows `sliding_window_pattern` if that is a number, else the table. Where it
   cannot be known every layer looks back at everything, which takes more memory, never less.
6. The last `shared_kv_layers` layers use the keys of others. The last `nextn_predict_layers` ones
   (for guessing tokens ahead) are not loaded, but keep keys like the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from meshd.cache.gguf_header import GgufHeader, TensorInfo
from meshd.view.shape import MAX_LAYERS, LayerKind, ModelShape, pattern_of, units_of


class Windows(NamedTuple):
    """Layers of a period look back at a window, but for one, which looks at everything."""

    period: int
    first: bool = False
    """That one is the first of the period, not the last."""
    default: int = 0
    """Tokens if the key is missing; 0: then there is no window."""


WINDOWS: Final[Mapping[str, Windows]] = {
    "afmoe": Windows(4),
    "cohere2": Windows(4),
    "cohere2moe": Windows(4, first=True),
    "exaone-moe": Windows(4, default=128),
    "gemma2": Windows(2, default=4096),
    "gemma3": Windows(6),
    "gemma3n": Windows(5),
    "gpt-oss": Windows(2),
    "laguna": Windows(4, first=True),
    "llama4": Windows(4, default=8192),
    "mellum": Windows(4),
    "olmo2": Windows(4),
    "plamo3": Windows(8),
    "smallthinker": Windows(4, first=True),
}
"""Source: `load_arch_hparams` of the engine's models, build 0c1e570."""
BOTH: Final = frozenset({"falcon-h1"})
"""Architectures whose layers attend and recur at once."""

_BLOCK = re.compile(r"blk\.(\d{1,4})\.(.+)")
_RECURRENT = ("ssm_", "shortconv", "time_mix")
_FUSED = ("attn_qkv.", "attn_kv_a_mqa.", "attn_kv_b.")
MAX_NUMBER: Final = (1 << 24) - 1
MAX_STATE: Final = 1 << 50
FLOAT: Final = 4
"""Bytes of an element of a recurrent state, which is F32."""


@dataclass(slots=True)
class _Block:
    weights: int = 0
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    """By the name within the block."""

    def makes(self, name: str) -> int:
        """Length of what the tensor makes of a token; 0 if it is not there."""
        found = self.tensors.get(name)
        return _sane(found.dimensions[1]) if found and len(found.dimensions) > 1 else 0

    def takes(self, name: str) -> int:
        """Length of what the tensor is given of a token; 0 if it is not there."""
        found = self.tensors.get(name)
        return _sane(found.dimensions[0]) if found and found.dimensions else 0

    def has(self, *beginnings: str) -> bool:
        return any(name.startswith(beginnings) for name in self.tensors)


def shape_of(shards: Sequence[GgufHeader], projector: GgufHeader | None = None) -> ModelShape:
    """The shape of the model whose shards have these headers: at least one, the first shard's
    (it has the keys) first. `projector`: of the mmproj that is loaded with it."""
    keys = _Keys(shards[0])
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    blocks, input_bytes, rest = _sort(tensors)
    layers = [blocks.get(number, _Block()) for number in range(max(blocks, default=-1) + 1)]
    unloaded = range(len(layers) - keys.number("nextn_predict_layers"), len(layers))
    unit, weights = units_of(
        [0 if number in unloaded else block.weights for number, block in enumerate(layers)]  # 6
    )
    pattern, kinds = pattern_of(_kinds(keys, layers))
    embedding = next((t for t in tensors if t.name == "token_embd.weight"), None)
    return ModelShape(
        architecture=keys.architecture[:64],
        weight_unit=unit,
        weights=weights,
        pattern=pattern,
        kinds=kinds,
        input_bytes=input_bytes,
        output_bytes=rest,
        tied=all(tensor.name != "output.weight" for tensor in tensors),
        mmproj_bytes=0 if projector is None else sum(t.size for t in projector.tensors),
        width=keys.width,
        query=_query(keys, layers),
        attended=_sane(keys.heads * keys.value_length),
        feed_forward=max((block.takes("ffn_down.weight") for block in layers), default=0),
        expert_ff=max((block.takes("ffn_down_exps.weight") for block in layers), default=0),
        experts_used=keys.number("expert_used_count"),
        recurrence=keys.number("ssm.inner_size"),
        heads=keys.heads,
        vocabulary=_sane(embedding.dimensions[-1]) if embedding and embedding.dimensions else 0,
        trained_context=keys.number("context_length"),
    )


class _Keys:
    """The keys of an architecture, with what is assumed where they are missing (3)."""

    def __init__(self, header: GgufHeader) -> None:
        self._header = header
        self.architecture = header.architecture or ""
        self.width = self.number("embedding_length")
        self.heads = self.number("attention.head_count")
        share = self.width // self.heads if self.heads else 0
        self.kv_heads = self.number("attention.head_count_kv", self.heads)
        self.key_length = self.number("attention.key_length", share)
        self.value_length = self.number("attention.value_length", share)
        self.latent = self.number("attention.key_length_mla") > 0

    def number(self, key: str, missing: int = 0) -> int:
        """What is below zero or absurdly large is taken for missing; so is an array."""
        found = self._header.integer(f"{self.architecture}.{key}")
        return found if found is not None and 0 <= found <= MAX_NUMBER else missing


def _sort(tensors: Sequence[TensorInfo]) -> tuple[dict[int, _Block], int, int]:
    """(blocks by number, bytes of the embedding, bytes of all else)."""
    blocks: dict[int, _Block] = {}
    embedding = rest = 0
    for tensor in tensors:
        match = _BLOCK.fullmatch(tensor.name)
        if match is not None and int(match[1]) < MAX_LAYERS:  # 1
            block = blocks.setdefault(int(match[1]), _Block())
            block.weights += tensor.size
            block.tensors[match[2]] = tensor
        elif tensor.name.startswith(("token_embd", "per_layer_token_embd", "token_types")):
            embedding += tensor.size
        else:
            rest += tensor.size
    return blocks, embedding, rest


def _kinds(keys: _Keys, layers: Sequence[_Block]) -> list[LayerKind]:
    state = min(_state(keys), MAX_STATE)
    shared_from = len(layers) - keys.number("attention.shared_kv_layers")
    told = any(block.has("attn_k.", *_FUSED, *_RECURRENT) for block in layers)
    kinds = []
    for number, block in enumerate(layers):
        recurs = block.has(*_RECURRENT)
        attends = block.has("attn_k.", *_FUSED) or not told  # 2
        if recurs and keys.architecture not in BOTH:
            kinds.append(LayerKind(state=state))
        elif attends and number < shared_from:  # 6
            key, value = _row(keys, block)
            window = _window(keys, number)
            kinds.append(LayerKind(key, value, window, state if recurs else 0))
        else:
            kinds.append(LayerKind(state=state if recurs else 0))
    return kinds


def _row(keys: _Keys, block: _Block) -> tuple[int, int]:
    """Elements (of keys, of values) that a layer keeps of a token."""
    if keys.latent:  # 4
        return block.makes("attn_kv_a_mqa.weight") or keys.key_length, 0
    key = block.makes("attn_k.weight") or keys.kv_heads * keys.key_length  # 3
    value = block.makes("attn_v.weight") or keys.kv_heads * keys.value_length
    return _sane(key), _sane(value)


def _window(keys: _Keys, layer: int) -> int:
    """Tokens the layer looks back at; 0 for all (5)."""
    known = WINDOWS.get(keys.architecture)
    if known is None:
        return 0
    window = keys.number("attention.sliding_window", known.default)
    period = keys.number("attention.sliding_window_pattern", known.period)
    full = period > 0 and layer % period == (0 if known.first else period - 1)
    return 0 if full else window


def _state(keys: _Keys) -> int:
    """Bytes a slot of a recurrent layer, by the family of its keys: convolution and memory."""
    width = keys.width
    if head := keys.number("wkv.head_size"):
        return FLOAT * (keys.number("token_shift_count", 2) * width + width * head)
    if taps := keys.number("shortconv.l_cache"):
        return FLOAT * width * (taps - 1)
    if head := keys.number("kda.head_dim"):
        taps = keys.number("ssm.conv_kernel", 4)
        return FLOAT * (3 * (taps - 1) * keys.heads * head + head * head * keys.heads)
    inner, state = keys.number("ssm.inner_size"), keys.number("ssm.state_size")
    taps, groups = keys.number("ssm.conv_kernel"), keys.number("ssm.group_count")
    return FLOAT * (max(0, taps - 1) * (inner + 2 * groups * state) + state * inner)


def _query(keys: _Keys, layers: Sequence[_Block]) -> int:
    made = max((block.makes("attn_q.weight") for block in layers), default=0)
    return made if made and not keys.latent else _sane(keys.heads * keys.key_length)


def _sane(width: int) -> int:
    """What no model has is counted as the largest that could be."""
    return min(width, MAX_NUMBER)
