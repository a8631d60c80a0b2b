"""GGUF models of many architectures, shaped like real ones: small ones with random weights, and
sparse files as large as the real ones that take no room on disk."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Tensors = Iterator[tuple[str, tuple[int, ...]]]
"""Name and dimensions, in GGUF's order: the length of a row comes first."""

CONV, STATE, DT_RANK = 4, 16, 32
"""Of recurrent layers: taps of the convolution, numbers of state a channel, rank of the step."""
ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@dataclass(frozen=True)
class Latent:
    """Of MLA; numbers of elements."""

    keys: int = 256
    """What is kept of keys and values of all heads."""
    queries: int = 192
    rotated: int = 32
    plain: int = 64
    """Part of a head's key that is not rotated."""
    value: int = 64


@dataclass(frozen=True)
class Recipe:
    """One model. Lengths are numbers of elements."""

    architecture: str
    layers: int = 4
    width: int = 512
    heads: int = 8
    kv_heads: int = 8
    head: int | None = None
    """Of a key and of a value; None is width / heads."""
    feed_forward: int = 1536
    vocabulary: int = 4096
    experts: int = 0
    experts_used: int = 0
    expert_ff: int = 0
    window: int = 0
    attention_every: int = 0
    """Of hybrids: each n-th layer attends, the others recur."""
    latent: Latent = Latent()
    """Of deepseek2."""
    weights: str = "F16"
    tied: bool = False
    """The output layer is the embedding."""
    context: int = 32768

    @property
    def head_length(self) -> int:
        return self.head or self.width // self.heads

    def attends(self, layer: int) -> bool:
        if self.architecture == "mamba":
            return False
        return self.attention_every == 0 or layer % self.attention_every == 0


def write_shape(path: Path, recipe: Recipe, *, seed: int = 1) -> Path:
    """Write the model. Raises KeyError for an architecture it has no tensors of."""
    writer = gguf.GGUFWriter(path, recipe.architecture)
    _write_keys(writer, recipe)
    _write_vocabulary(writer, recipe.vocabulary)
    noise = np.random.default_rng(seed).standard_normal(1 << 20, dtype=np.float32) * 0.02
    kind = gguf.GGMLQuantizationType[recipe.weights]
    for name, dimensions in _tensors(recipe):
        values = np.resize(noise, dimensions[::-1])
        if _is_exact(name, dimensions):
            writer.add_tensor(name, values)
        else:
            stored = gguf.quants.quantize(values, kind)
            writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_sparse(path: Path, recipe: Recipe) -> Path:
    """The same with F16 weights that are all zero and take no room on disk."""
    writer = gguf.GGUFWriter(path, recipe.architecture)
    _write_keys(writer, recipe)
    _write_vocabulary(writer, recipe.vocabulary)
    end = 0
    for name, dimensions in _tensors(recipe):
        kind = np.dtype(np.float32 if _is_exact(name, dimensions) else np.float16)
        size = math.prod(dimensions) * kind.itemsize
        writer.add_tensor_info(name, dimensions[::-1], kind, size)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + ALIGNMENT + end)
    return path


def _is_exact(name: str, dimensions: tuple[int, ...]) -> bool:
    """Small tensors stay F32, as converters leave them."""
    inexact = len(dimensions) > 1 and name.endswith(".weight")
    return not inexact or "conv1d" in name or "gate_inp" in name


def _write_keys(writer: Any, recipe: Recipe) -> None:
    writer.add_name("random shape")
    writer.add_context_length(recipe.context)
    writer.add_embedding_length(recipe.width)
    writer.add_block_count(recipe.layers)
    writer.add_feed_forward_length(recipe.feed_forward)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    if recipe.architecture in ("mamba", "jamba"):
        writer.add_ssm_conv_kernel(CONV)
        writer.add_ssm_inner_size(2 * recipe.width)
        writer.add_ssm_state_size(STATE)
        writer.add_ssm_time_step_rank(DT_RANK)
    if recipe.architecture != "mamba":
        _write_attention(writer, recipe)
    if recipe.experts:
        writer.add_expert_count(recipe.experts)
        writer.add_expert_used_count(recipe.experts_used)
        if recipe.architecture not in ("llama", "jamba"):
            writer.add_expert_feed_forward_length(recipe.expert_ff)


def _write_attention(writer: Any, recipe: Recipe) -> None:
    writer.add_head_count(recipe.heads)
    if recipe.architecture == "deepseek2":
        latent = recipe.latent
        writer.add_head_count_kv(1)
        writer.add_key_length(latent.keys + latent.rotated)
        writer.add_value_length(latent.keys)
        writer.add_key_length_mla(latent.plain + latent.rotated)
        writer.add_value_length_mla(latent.value)
        writer.add_q_lora_rank(latent.queries)
        writer.add_kv_lora_rank(latent.keys)
        writer.add_rope_dimension_count(latent.rotated)
        writer.add_leading_dense_block_count(1)
        writer.add_expert_shared_count(1)
        return
    by_layer = [recipe.kv_heads if recipe.attends(n) else 0 for n in range(recipe.layers)]
    writer.add_head_count_kv(by_layer if recipe.attention_every else recipe.kv_heads)
    writer.add_rope_dimension_count(recipe.head_length)
    if recipe.head is not None:
        writer.add_key_length(recipe.head)
        writer.add_value_length(recipe.head)
    if recipe.window:
        writer.add_sliding_window(recipe.window)


def _tensors(recipe: Recipe) -> Tensors:
    yield "token_embd.weight", (recipe.width, recipe.vocabulary)
    for layer in range(recipe.layers):
        yield f"blk.{layer}.attn_norm.weight", (recipe.width,)
        parts = [_feed_forward(recipe, layer)]
        if recipe.architecture == "deepseek2":
            parts.append(_latent_attention(recipe))
        elif recipe.attends(layer):
            parts.append(_attention(recipe))
        else:
            parts.append(_recurrence(recipe))
        for part in parts:
            for name, dimensions in part:
                yield f"blk.{layer}.{name}", dimensions
    yield "output_norm.weight", (recipe.width,)
    if not recipe.tied:
        yield "output.weight", (recipe.width, recipe.vocabulary)


def _attention(recipe: Recipe) -> Tensors:
    queries = recipe.heads * recipe.head_length
    keys = recipe.kv_heads * recipe.head_length
    if recipe.architecture == "phi3":
        yield "attn_qkv.weight", (recipe.width, queries + 2 * keys)
    else:
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield f"attn_{name}.weight", (recipe.width, rows)
            if recipe.architecture in ("qwen2", "gpt-oss"):
                yield f"attn_{name}.bias", (rows,)
    yield "attn_output.weight", (queries, recipe.width)
    if recipe.architecture in ("qwen3", "qwen3moe", "gemma3"):
        yield "attn_q_norm.weight", (recipe.head_length,)
        yield "attn_k_norm.weight", (recipe.head_length,)
    if recipe.architecture in ("gemma2", "gemma3", "gpt-oss"):
        yield "post_attention_norm.weight", (recipe.width,)
    if recipe.architecture == "gpt-oss":
        yield "attn_output.bias", (recipe.width,)
        yield "attn_sinks.weight", (recipe.heads,)


def _latent_attention(recipe: Recipe) -> Tensors:
    latent, heads = recipe.latent, recipe.heads
    yield "attn_q_a_norm.weight", (latent.queries,)
    yield "attn_kv_a_norm.weight", (latent.keys,)
    yield "attn_q_a.weight", (recipe.width, latent.queries)
    yield "attn_q_b.weight", (latent.queries, heads * (latent.plain + latent.rotated))
    yield "attn_kv_a_mqa.weight", (recipe.width, latent.keys + latent.rotated)
    yield "attn_k_b.weight", (latent.plain, latent.keys, heads)
    yield "attn_v_b.weight", (latent.keys, latent.value, heads)
    yield "attn_output.weight", (heads * latent.value, recipe.width)


def _recurrence(recipe: Recipe) -> Tensors:
    inner = 2 * recipe.width
    yield "ssm_in.weight", (recipe.width, 2 * inner)
    yield "ssm_conv1d.weight", (CONV, inner)
    yield "ssm_conv1d.bias", (inner,)
    yield "ssm_x.weight", (inner, DT_RANK + 2 * STATE)
    yield "ssm_dt.weight", (DT_RANK, inner)
    yield "ssm_dt.bias", (inner,)
    yield "ssm_a", (STATE, inner)
    yield "ssm_d", (inner,)
    yield "ssm_out.weight", (inner, recipe.width)
    if recipe.architecture == "jamba":
        yield "ssm_dt_norm.weight", (DT_RANK,)
        yield "ssm_b_norm.weight", (STATE,)
        yield "ssm_c_norm.weight", (STATE,)


def _feed_forward(recipe: Recipe, layer: int) -> Tensors:
    if recipe.architecture == "mamba":
        return
    width = recipe.width
    if recipe.architecture != "gpt-oss":
        yield "ffn_norm.weight", (width,)
    if recipe.architecture in ("gemma2", "gemma3"):
        yield "post_ffw_norm.weight", (width,)
    if not recipe.experts or (recipe.architecture == "deepseek2" and layer == 0):
        length = recipe.feed_forward
        if recipe.architecture == "phi3":
            yield "ffn_up.weight", (width, 2 * length)
        else:
            yield "ffn_gate.weight", (width, length)
            yield "ffn_up.weight", (width, length)
        yield "ffn_down.weight", (length, width)
        return
    length = recipe.expert_ff or recipe.feed_forward
    yield "ffn_gate_inp.weight", (width, recipe.experts)
    for name, dimensions in (
        ("gate", (width, length)),
        ("up", (width, length)),
        ("down", (length, width)),
    ):
        yield f"ffn_{name}_exps.weight", (*dimensions, recipe.experts)
        if recipe.architecture == "gpt-oss":
            yield f"ffn_{name}_exps.bias", (dimensions[1], recipe.experts)
        if recipe.architecture == "deepseek2":
            yield f"ffn_{name}_shexp.weight", dimensions
    if recipe.architecture == "gpt-oss":
        yield "ffn_gate_inp.bias", (recipe.experts,)


def _write_vocabulary(writer: Any, size: int) -> None:
    """SentencePiece-like: specials, byte tokens, the space, and made-up words up to `size`."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    tokens += [f"w{number}" for number in range(size - len(tokens))]
    kinds += [gguf.TokenType.NORMAL] * (size - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(rank) for rank in range(size)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
