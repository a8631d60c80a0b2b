"""Chunks: the pieces in which weights are compared, fetched and mended. Pure.

A file is cut into chunks of `CHUNK_BYTES`, the last one shorter; their sha256 are made when the
file is verified whole, so that a flipped byte later costs one chunk and not one file.
"""

from __future__ import annotations

from typing import Final

CHUNK_BYTES: Final = 4 * 1024 * 1024
"""Small enough that a flipped byte is cheap, large enough that 32 bytes of hash and one request a
chunk are nothing: 500 GB have 4 MB of hashes."""
HASH_BYTES: Final = 32


def chunk_count(size: int) -> int:
    """Chunks of a file of `size` bytes; an empty one has none."""
    return -(-size // CHUNK_BYTES)


def chunk_span(index: int, size: int) -> tuple[int, int]:
    """(offset, length) in bytes of chunk `index` of a file of `size` bytes."""
    offset = index * CHUNK_BYTES
    return offset, min(CHUNK_BYTES, size - offset)
