"""Shapes out of headers: keys, tensors, and what is assumed where they say nothing."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hypothesis import given
from hypothesis import strategies as st

from meshd.cache.gguf_header import ArrayLength, GgufHeader, Scalar, TensorInfo
from meshd.cache.shape import WINDOWS, shape_of
from meshd.view.shape import MAX_LAYERS, LayerKind, ModelShape

Tensor = tuple[str, tuple[int, ...]]


def header(
    architecture: str, keys: Mapping[str, Scalar | ArrayLength], *tensors: Tensor
) -> GgufHeader:
    """Tensors are of bytes, one an element."""
    metadata: dict[str, Scalar | ArrayLength] = {"general.architecture": architecture}
    metadata |= {f"{architecture}.{name}": value for name, value in keys.items()}
    infos, offset = [], 0
    for name, dimensions in tensors:
        size = 1
        for dimension in dimensions:
            size *= dimension
        infos.append(TensorInfo(name, dimensions, "I8", offset, size))
        offset += size
    return GgufHeader(3, MappingProxyType(metadata), tuple(infos), 32, 0)


def layers(count: int, *tensors: Tensor) -> list[Tensor]:
    return [(f"blk.{n}.{name}", dimensions) for n in range(count) for name, dimensions in tensors]


PLAIN = {"embedding_length": 512, "attention.head_count": 8, "context_length": 4096}
KEYS = ("attn_k.weight", (512, 128))
VALUES = ("attn_v.weight", (512, 64))


def kinds_of(shape: ModelShape) -> list[LayerKind]:
    return [kind for _, kind in shape.layers]


def test_weights_are_counted_where_they_lie() -> None:
    shape = shape_of(
        [
            header("llama", PLAIN, ("token_embd.weight", (512, 1000)), *layers(1, KEYS)),
            header(
                "llama",
                {},
                ("blk.1.ffn_down.weight", (2048, 512)),
                ("blk.1.attn_k.weight", (512, 128)),
                ("output_norm.weight", (512,)),
                ("output.weight", (512, 1000)),
            ),
        ],
        header("clip", {}, ("v.blk.0.attn_k.weight", (100, 100))),
    )
    assert shape.input_bytes == 512_000
    assert shape.output_bytes == 512_512
    assert [weights for weights, _ in shape.layers] == [64 * 1024, 1088 * 1024]
    assert shape.mmproj_bytes == 10_000
    assert not shape.tied
    assert (shape.vocabulary, shape.trained_context, shape.feed_forward) == (1000, 4096, 2048)


def test_keys_are_as_wide_as_their_tensors_say() -> None:
    shape = shape_of([header("llama", PLAIN, *layers(2, KEYS, VALUES))])
    assert kinds_of(shape) == [LayerKind(key=128, value=64)] * 2
    assert shape.tied


def test_fused_tensors_leave_it_to_the_keys() -> None:
    fused = ("attn_qkv.weight", (512, 900))
    keys = PLAIN | {"attention.head_count_kv": 2, "attention.key_length": 96}
    assert kinds_of(shape_of([header("phi3", keys, *layers(1, fused))])) == [LayerKind(192, 128)]
    assert kinds_of(shape_of([header("phi3", PLAIN, *layers(1, fused))])) == [LayerKind(512, 512)]


def test_latent_attention_keeps_one_row_for_all_heads() -> None:
    keys = PLAIN | {"attention.key_length": 576, "attention.value_length": 512}
    latent = ("attn_kv_a_mqa.weight", (512, 576))
    new = keys | {"attention.key_length_mla": 192}
    shape = shape_of([header("deepseek2", new, *layers(1, latent))])
    assert kinds_of(shape) == [LayerKind(key=576)]
    assert (shape.query, shape.attended) == (8 * 576, 8 * 512)
    old = shape_of([header("deepseek2", keys, *layers(1, latent))])  # as files were before
    assert kinds_of(old) == [LayerKind(key=8 * 576, value=8 * 512)]


def test_windows_follow_the_architecture() -> None:
    keys = PLAIN | {"attention.sliding_window": 1024}

    def windows(architecture: str, more: Mapping[str, Scalar | ArrayLength]) -> list[int]:
        found = shape_of([header(architecture, {**keys, **more}, *layers(6, KEYS, VALUES))])
        return [kind.window for kind in kinds_of(found)]

    pattern = "attention.sliding_window_pattern"
    assert windows("gemma3", {}) == [1024] * 5 + [0]
    assert windows("gemma3", {pattern: 3}) == [1024, 1024, 0] * 2
    assert windows("gemma3", {pattern: ArrayLength(6)}) == [1024] * 5 + [0]
    assert windows("gemma3", {pattern: 0}) == [1024] * 6
    assert windows("smallthinker", {}) == [0, 1024, 1024, 1024, 0, 1024]
    assert windows("phi3", {}) == [0] * 6  # the engine ignores it
    assert windows("gemma3", {"attention.sliding_window": 0}) == [0] * 6
    gemma2 = shape_of([header("gemma2", PLAIN, *layers(2, KEYS, VALUES))])
    assert [kind.window for kind in kinds_of(gemma2)] == [4096, 0]


def test_recurrent_layers_keep_a_state() -> None:
    keys = PLAIN | {"ssm.conv_kernel": 4, "ssm.inner_size": 1024, "ssm.state_size": 16}
    state = 4 * (3 * 1024 + 16 * 1024)
    mixed = [*layers(1, ("ssm_in.weight", (512, 2048))), ("blk.1.attn_k.weight", (512, 128))]
    found = kinds_of(shape_of([header("jamba", keys, *mixed)]))
    assert found == [LayerKind(state=state), LayerKind(key=128, value=512)]
    both = layers(1, ("ssm_in.weight", (512, 2048)), KEYS, VALUES)
    assert kinds_of(shape_of([header("falcon-h1", keys, *both)])) == [LayerKind(128, 64, 0, state)]
    assert kinds_of(shape_of([header("qwen3next", keys, *both)])) == [LayerKind(state=state)]


def test_states_of_other_families() -> None:
    def state(keys: dict[str, int], tensor: str) -> int:
        found = shape_of([header("x", PLAIN | keys, *layers(1, (tensor, (512, 512))))])
        return kinds_of(found)[0].state

    assert state({"wkv.head_size": 64}, "time_mix_key.weight") == 4 * (2 * 512 + 512 * 64)
    assert state({"shortconv.l_cache": 3}, "shortconv.conv.weight") == 4 * 512 * 2
    kda = 4 * (3 * 3 * 8 * 64 + 64 * 64 * 8)
    assert state({"kda.head_dim": 64, "ssm.conv_kernel": 4}, "ssm_conv1d_q.weight") == kda


def test_a_layer_without_attention_keeps_nothing() -> None:
    tensors = [("blk.0.attn_k.weight", (512, 128)), ("blk.1.ffn_up.weight", (512, 128))]
    found = kinds_of(shape_of([header("nemotron_h", PLAIN, *tensors)]))
    assert found == [LayerKind(128, 512), LayerKind()]


def test_layers_that_share_or_guess() -> None:
    shared = PLAIN | {"attention.shared_kv_layers": 2}
    found = kinds_of(shape_of([header("gemma3n", shared, *layers(3, KEYS, VALUES))]))
    assert found == [LayerKind(128, 64), LayerKind(), LayerKind()]
    guessing = PLAIN | {"nextn_predict_layers": 1}
    shape = shape_of([header("glm4moe", guessing, *layers(2, KEYS, VALUES))])
    assert [weights for weights, _ in shape.layers] == [96 * 1024, 0]
    assert kinds_of(shape) == [LayerKind(128, 64)] * 2


def test_a_header_that_says_nothing_has_a_shape_as_well() -> None:
    empty = GgufHeader(3, MappingProxyType({}), (), 32, 0)
    assert shape_of([empty]).layers == ()
    silent = shape_of([header("new", PLAIN, *layers(1, ("mixer.weight", (512, 10))))])
    assert kinds_of(silent) == [LayerKind(512, 512)]  # all attend, with as many keys as heads


def test_blocks_past_the_limit_are_counted_all_the_same() -> None:
    shape = shape_of([header("x", PLAIN, (f"blk.{MAX_LAYERS}.attn_k.weight", (512, 128)))])
    assert (shape.layers, shape.output_bytes) == ((), 512 * 128)


NAMES = st.sampled_from(
    ["embedding_length", "attention.head_count", "attention.head_count_kv",
     "attention.key_length", "attention.key_length_mla", "attention.value_length",
     "attention.sliding_window", "attention.sliding_window_pattern", "ssm.inner_size",
     "ssm.state_size", "ssm.conv_kernel", "ssm.group_count", "kda.head_dim", "wkv.head_size",
     "shortconv.l_cache", "expert_used_count", "context_length", "nextn_predict_layers",
     "attention.shared_kv_layers"]
)  # fmt: skip
VALUE = st.one_of(
    st.integers(-(1 << 63), 1 << 64), st.floats(), st.text(max_size=3), st.just(ArrayLength(3))
)
PARTS = st.sampled_from(["attn_k.weight", "attn_qkv.weight", "ssm_in.weight", "ffn_down.weight"])


@given(
    st.sampled_from(["", "llama", "falcon-h1", *WINDOWS]),
    st.dictionaries(NAMES, VALUE),
    st.sets(st.tuples(st.integers(0, 400), PARTS), max_size=40),
    st.lists(st.integers(0, 1 << 40), max_size=3),
)
def test_whatever_a_header_says_its_shape_travels(
    architecture: str,
    keys: Mapping[str, Scalar | ArrayLength],
    parts: set[tuple[int, str]],
    dimensions: list[int],
) -> None:
    tensors = [
        TensorInfo(f"blk.{number}.{name}", tuple(dimensions), "F16", 0, 1 << 30)
        for number, name in parts
    ]
    made = GgufHeader(3, header(architecture, keys).metadata, tuple(tensors), 32, 0)
    shape = shape_of([made])
    assert ModelShape.from_json(shape.to_json()) == shape
