"""The GGUF parser against files of the gguf package, and against files nobody should write."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.cache.gguf_cursor import LONG_ARRAY, GgufError, NeedMore, Walks
from meshd.cache.gguf_header import (
    MAX_METADATA,
    MAX_TENSORS,
    ArrayLength,
    GgufHeader,
    parse_header,
)
from meshd.cache.gguf_types import TYPES
from tests.models import small_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return small_model(tmp_path_factory.mktemp("gguf") / "small.gguf").read_bytes()


def parse(data: bytes) -> GgufHeader:
    return parse_header(data, len(data))


def test_what_the_gguf_package_wrote(model: bytes, tmp_path: Path) -> None:
    header = parse(model)
    path = tmp_path / "m.gguf"
    path.write_bytes(model)
    reader = gguf.GGUFReader(path)
    assert header.version == 3
    assert header.architecture == "llama"
    assert header.context_length == 8192
    assert header.split is None
    assert not header.embeds
    assert [(t.name, t.offset, t.size) for t in header.tensors] == [
        (t.name, t.data_offset, t.n_bytes) for t in reader.tensors
    ]
    assert header.metadata["tokenizer.ggml.tokens"] == ArrayLength(354)
    assert header.metadata["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert header.text("tokenizer.chat_template")
    assert header.needed_bytes <= len(model)


def test_the_type_table_is_ggmls() -> None:
    known = {int(kind): sizes for kind, sizes in gguf.constants.GGML_QUANT_SIZES.items()}
    ours = {number: (block, size) for number, (_, block, size) in TYPES.items()}
    assert {n: ours[n] for n in ours if n in known} == {n: known[n] for n in known if n in ours}
    assert set(known) <= set(ours)


def test_every_cut_is_noticed(model: bytes) -> None:
    header = parse(model)
    for length in [*range(0, min(4096, header.data_offset), 7), header.data_offset]:
        with pytest.raises(GgufError):
            parse_header(model[:length], length)
    with pytest.raises(GgufError, match="short"):
        parse_header(model[: header.data_offset], header.needed_bytes - 1)


def test_a_prefix_asks_for_more(model: bytes) -> None:
    sizes = [16]
    header = None
    while header is None:
        try:
            header = parse_header(model[: sizes[-1]], len(model))
        except NeedMore as more:
            sizes.append(more.size)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] <= len(model)
    assert header == parse(model)


def raw(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensors: int = 0,
    entries: int = 0,
    body: bytes = b"",
) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, entries) + body


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return (
        text(name)
        + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        + struct.pack("<IQ", kind, offset)
    )


HUGE = 2**63


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (raw(magic=b"GGML"), "does not begin with GGUF"),
        (raw(version=1), "version 1"),
        (raw(version=0x03000000), "big endian"),
        (raw(tensors=MAX_TENSORS + 1), "tensors are more"),
        (raw(tensors=HUGE), "tensors are more"),
        (raw(entries=MAX_METADATA + 1), "metadata entries are more"),
        (raw(entries=1, body=struct.pack("<Q", HUGE)), "cut off|longer"),
        (raw(entries=1, body=text(b"k") + struct.pack("<I", 99)), "unknown type 99"),
        (raw(entries=1, body=text(b"k") + struct.pack("<IQ", 8, HUGE)), "cut off"),
        (raw(entries=1, body=text(b"k") + struct.pack("<IIQ", 9, 4, HUGE)), "cut off"),
        (raw(entries=1, body=text(b"k") + struct.pack("<IIQ", 9, 8, HUGE)), "more than the file"),
        (raw(entries=1, body=text(b"k") + struct.pack("<IIQ", 9, 9, 1)), "array of the unknown"),
        (raw(entries=2, body=2 * (text(b"k") + struct.pack("<II", 4, 1))), "stands twice"),
        (
            raw(entries=1, body=text(b"general.alignment") + struct.pack("<II", 4, 33)),
            "power of two",
        ),
        (
            raw(entries=1, body=text(b"general.alignment") + struct.pack("<II", 4, 0)),
            "power of two",
        ),
        (raw(tensors=1, body=tensor(b"", (1,))), "no name"),
        (raw(tensors=1, body=tensor(b"t", (1,) * 5)), "5 dimensions"),
        (raw(tensors=1, body=tensor(b"t", (32,), kind=77)), "unknown type 77"),
        (raw(tensors=1, body=tensor(b"t", (33,), kind=8)), "do not divide"),
        (raw(tensors=1, body=tensor(b"t", (32,), offset=5)), "not aligned"),
        (raw(tensors=1, body=tensor(b"t", (HUGE, 4))), "short"),
        (raw(tensors=1, body=tensor(b"t", (1,), offset=HUGE)), "short"),
        (raw(tensors=2, body=2 * tensor(b"t", (8,)) + bytes(256)), "stands twice"),
        (
            raw(tensors=2, body=tensor(b"a", (64,)) + tensor(b"b", (8,), offset=32) + bytes(512)),
            "overlap",
        ),
    ],
)
def test_absurd_headers(data: bytes, words: str) -> None:
    with pytest.raises(GgufError, match=words):
        parse(data)


def test_a_large_vocabulary_is_walked_over(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token-{i}" for i in range(150_000)])
    writer.add_tensor("t", np.zeros(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = parse(path.read_bytes())
    assert header.metadata["tokenizer.ggml.tokens"] == ArrayLength(150_000)


@settings(max_examples=300)
@given(data=st.data())
def test_no_bytes_make_it_crash_or_grow(model: bytes, data: st.DataObject) -> None:
    damaged = bytearray(model[:6000])
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(damaged) - 9))
        damaged[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
    size = data.draw(st.sampled_from([len(damaged), len(model), 2**40]))
    tracemalloc.start()
    try:
        parse_header(bytes(damaged), size)
    except (GgufError, NeedMore):
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 64 * 1024 * 1024


@given(st.binary(max_size=400))
def test_random_bytes(noise: bytes) -> None:
    for data in (noise, b"GGUF\x03\0\0\0" + noise):
        with pytest.raises((GgufError, NeedMore)):
            parse_header(data, len(data) + 100 if noise else 0)


@given(
    lengths=st.lists(st.sampled_from([0, 1, 7, 31, 32, 255, 256, 300]), min_size=1, max_size=20),
    count=st.integers(LONG_ARRAY, LONG_ARRAY + 600),
    first_prefix=st.integers(1, 200_000),
)
def test_long_arrays_end_where_they_end(lengths: list[int], count: int, first_prefix: int) -> None:
    """Short strings are walked over in blocks, others singly, and where bytes ran out it goes on;
    the key behind the array, itself a short string, is not taken for one of it."""
    strings = b"".join(text(lengths[n % len(lengths)] * b"x") for n in range(count))
    array = text(b"strings") + struct.pack("<IIQ", 9, 8, count) + strings
    data = raw(entries=2, body=array + text(b"behind") + struct.pack("<II", 4, 7))
    header, walks, size = None, Walks(), first_prefix
    while header is None:
        try:
            header = parse_header(data[:size], len(data), walks)
        except NeedMore as more:
            size = max(more.size, 2 * size)
    assert header.metadata == {"strings": ArrayLength(count), "behind": 7}
    with pytest.raises(GgufError, match="cut off"):
        parse(data[: len(data) - 20])
