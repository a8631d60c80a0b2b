"""The few words of ggml's RPC protocol that meshd says itself.

Source: ggml/src/ggml-rpc/ggml-rpc.cpp (commands, structures), ggml/src/ggml-rpc/transport.h (length
of the capabilities), ggml/include/ggml-rpc.h (version), ggml/include/ggml.h (length of a tensor's
arrays, number of a type) of llama.cpp, build 0c1e570. All numbers are little endian and packed:

    request   command u8 | length of the body u64 | body
    answer    length of the body u64 | body

    HELLO            capabilities 24 bytes    ->  major u8, minor u8, patch u8, 0 u8, capabilities
    DEVICE_COUNT     nothing                  ->  devices u32
    ALLOC_BUFFER     device u32, size u64     ->  buffer u64 (0: no memory), its size u64
    BUFFER_GET_BASE  buffer u64               ->  address u64
    FREE_BUFFER      buffer u64               ->  no answer
    SET_TENSOR       tensor 296 bytes, cache u8, offset u64, data  ->  no answer

HELLO is the first command of every connection. Capabilities of zero mean plain TCP. A server that
does not like a request closes the connection and says why in its output only.
"""

from __future__ import annotations

import struct
from enum import IntEnum

PROTOCOL = "7.0.0"
"""The version whose structures these are. HELLO has kept its number through all versions."""
CAPABILITIES_BYTES = 24
TENSOR_BYTES = 296
HASHED_OVER_BYTES = 10 * 1024 * 1024
"""A host offers weights larger than this by their hash before it sends them."""
TYPE_BYTES = 24
"""Number of the type I8: tensors are sent as rows of bytes, whatever they hold."""
ROW_BYTES = 4096
"""Lengths in a tensor are u32; in rows, tensors of up to 16 TiB can be told."""

_HEAD = struct.Struct("<BQ")
_LENGTH = struct.Struct("<Q")
_HELLO = struct.Struct(f"<BBBx{CAPABILITIES_BYTES}x")
_DEVICE_COUNT = struct.Struct("<I")
_ALLOCATE = struct.Struct("<IQ")
_ALLOCATED = struct.Struct("<QQ")
_BUFFER = struct.Struct("<Q")
_TENSOR = struct.Struct("<QIQ4I4II64si80sQQQ64si")
_SET_TAIL = struct.Struct("<BQ")

HELLO_BYTES, DEVICE_COUNT_BYTES = _HELLO.size, _DEVICE_COUNT.size
ALLOCATED_BYTES, BASE_BYTES = _ALLOCATED.size, _BUFFER.size
LENGTH_BYTES = _LENGTH.size
"""Sizes of answers' bodies, and of the length before them."""


class Command(IntEnum):
    ALLOC_BUFFER = 0
    BUFFER_GET_BASE = 3
    FREE_BUFFER = 4
    SET_TENSOR = 6
    HELLO = 14
    DEVICE_COUNT = 15


def hello() -> bytes:
    return _request(Command.HELLO, bytes(CAPABILITIES_BYTES))


def device_count() -> bytes:
    return _request(Command.DEVICE_COUNT, b"")


def allocate(device: int, size: int) -> bytes:
    """Ask for `size` bytes on the server's device of that number."""
    return _request(Command.ALLOC_BUFFER, _ALLOCATE.pack(device, size))


def base_of(buffer: int) -> bytes:
    return _request(Command.BUFFER_GET_BASE, _BUFFER.pack(buffer))


def free(buffer: int) -> bytes:
    return _request(Command.FREE_BUFFER, _BUFFER.pack(buffer))


def set_tensor_head(name: str, size: int, *, buffer: int, base: int) -> bytes:
    """All of a SET_TENSOR but its `size` bytes of data, which follow: the server is to write them
    to `base`, the start of `buffer`, and to keep them in its cache.

    The buffer must hold `rows(size)` rows.
    """
    strides = (1, ROW_BYTES, ROW_BYTES, ROW_BYTES)  # of one, the last two are not looked at
    tensor = _TENSOR.pack(
        *(0, TYPE_BYTES, buffer),
        *(ROW_BYTES, rows(size), 1, 1),
        *strides,
        *(0, b"", 0, b"", 0, 0, base),
        *(name.encode()[:63], 0),
    )
    tail = _SET_TAIL.pack(True, 0)
    return _HEAD.pack(Command.SET_TENSOR, len(tensor) + len(tail) + size) + tensor + tail


def rows(size: int) -> int:
    """Rows of `ROW_BYTES` that hold `size` bytes."""
    return -(-size // ROW_BYTES)


def read_length(data: bytes) -> int:
    """Length of an answer's body, from the `LENGTH_BYTES` before it."""
    (length,) = _LENGTH.unpack(data)
    return int(length)


def read_hello(body: bytes) -> str:
    """The server's protocol, as in `7.0.0`."""
    return ".".join(map(str, _HELLO.unpack(body)))


def read_device_count(body: bytes) -> int:
    (count,) = _DEVICE_COUNT.unpack(body)
    return int(count)


def read_allocated(body: bytes) -> int | None:
    """The buffer, or None if the device has no room."""
    buffer, _ = _ALLOCATED.unpack(body)
    return int(buffer) or None


def read_base(body: bytes) -> int:
    (base,) = _BUFFER.unpack(body)
    return int(base)


def _request(command: Command, body: bytes) -> bytes:
    return _HEAD.pack(command, len(body)) + body
