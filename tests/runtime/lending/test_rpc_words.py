"""Words of the RPC protocol, byte by byte."""

from __future__ import annotations

import struct

import pytest

from meshd.runtime.lending import rpc_words


def test_requests() -> None:
    assert rpc_words.hello() == b"\x0e" + b"\x18" + bytes(7) + bytes(24)
    assert rpc_words.device_count() == b"\x0f" + bytes(8)
    assert rpc_words.allocate(1, 0x1000) == (
        b"\x00" b"\x0c\0\0\0\0\0\0\0" b"\x01\0\0\0" b"\x00\x10\0\0\0\0\0\0"
    )  # fmt: skip
    assert rpc_words.base_of(7) == b"\x03\x08\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\0"
    assert rpc_words.free(7) == b"\x04\x08\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\0"


def test_a_tensor_lies_in_its_structure_as_the_engine_packs_it() -> None:
    size = 4096 * 3 + 1
    message = rpc_words.set_tensor_head("blk.0.x", size, buffer=0xB0FF, base=0xBA5E)
    assert message[0] == 6
    assert struct.unpack("<Q", message[1:9]) == (296 + 1 + 8 + size,)
    tensor, tail = message[9 : 9 + 296], message[9 + 296 :]
    assert tail == b"\x01" + bytes(8)  # keep it; from the start of the tensor
    assert struct.unpack("<QIQ", tensor[:20]) == (0, 24, 0xB0FF)
    assert struct.unpack("<4I", tensor[20:36]) == (4096, 4, 1, 1)
    assert struct.unpack("<4I", tensor[36:52])[:2] == (1, 4096)
    assert tensor[52 : 52 + 4 + 64 + 4 + 80 + 8 + 8] == bytes(168)  # no operation, no sources
    assert struct.unpack("<Q", tensor[220:228]) == (0xBA5E,)
    assert tensor[228:292] == b"blk.0.x".ljust(64, b"\0")
    assert tensor[292:] == bytes(4)


def test_a_name_always_ends_with_a_zero() -> None:
    message = rpc_words.set_tensor_head("n" * 100, 1, buffer=1, base=1)
    assert message[9 + 228 : 9 + 292] == b"n" * 63 + b"\0"


def test_a_tensor_of_more_than_four_gigabytes_fits_the_words() -> None:
    size = 5 << 30
    message = rpc_words.set_tensor_head("big", size, buffer=1, base=1)
    width, height = struct.unpack("<2I", message[29:37])
    assert width * height >= size


@pytest.mark.parametrize(("size", "rows"), [(1, 1), (4096, 1), (4097, 2), (0, 0)])
def test_rows(size: int, rows: int) -> None:
    assert rpc_words.rows(size) == rows


def test_answers() -> None:
    assert rpc_words.read_length(b"\x1c" + bytes(7)) == rpc_words.HELLO_BYTES == 28
    assert rpc_words.read_hello(b"\x07\x01\x02\x00" + b"\xff" * 24) == "7.1.2"
    assert rpc_words.read_device_count(b"\x02\0\0\0") == 2
    assert rpc_words.read_allocated(struct.pack("<QQ", 9, 100)) == 9
    assert rpc_words.read_allocated(bytes(16)) is None
    assert rpc_words.read_base(struct.pack("<Q", 9)) == 9
