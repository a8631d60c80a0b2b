"""Which libraries a program or library asks the loader for, out of its ELF dynamic section.

Read from the file alone: nothing of it is executed, as `ldd` would. Format: System V gABI, chapters
4 and 5 (ELF header, program headers, dynamic section).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO

MAGIC = b"\x7fELF"
PT_LOAD, PT_DYNAMIC = 1, 2
DT_NULL, DT_NEEDED, DT_STRTAB, DT_STRSZ = 0, 1, 5, 10
MAX_HEADERS = 256
MAX_DYNAMIC_BYTES = 1 << 20
MAX_STRINGS_BYTES = 16 << 20
"""The string table of a large C++ library has megabytes of symbol names."""


def needed(path: Path) -> tuple[str, ...] | None:
    """File names as they stand in DT_NEEDED; None if `path` is no readable 64-bit ELF file or is
    not linked dynamically. Blocking."""
    try:
        with path.open("rb") as file:
            return _needed(file)
    except (OSError, struct.error, ValueError, KeyError, IndexError):
        return None


def _needed(file: IO[bytes]) -> tuple[str, ...] | None:
    ident = file.read(16)
    if ident[:4] != MAGIC or ident[4] != 2:
        return None
    order = "<" if ident[5] == 1 else ">"
    # e_type … e_shstrndx; of these e_phoff, e_phentsize, e_phnum matter.
    header = struct.unpack(f"{order}HHIQQQIHHHHHH", file.read(48))
    offset, size, count = header[4], header[8], header[9]
    loads, dynamic = [], None
    for index in range(min(count, MAX_HEADERS)):
        file.seek(offset + index * size)
        kind, _, at, address, _, length = struct.unpack(f"{order}IIQQQQ", file.read(40))
        if kind == PT_LOAD:
            loads.append((address, at, length))
        elif kind == PT_DYNAMIC:
            dynamic = (at, min(length, MAX_DYNAMIC_BYTES))
    if dynamic is None:
        return None
    file.seek(dynamic[0])
    table = file.read(dynamic[1] // 16 * 16)
    entries = list(struct.iter_unpack(f"{order}QQ", table))
    tags = {tag: value for tag, value in entries if tag in (DT_STRTAB, DT_STRSZ)}
    strings_at = next(
        (at + tags[DT_STRTAB] - a for a, at, n in loads if a <= tags[DT_STRTAB] < a + n), None
    )
    if strings_at is None:
        return None
    file.seek(strings_at)
    strings = file.read(min(tags[DT_STRSZ], MAX_STRINGS_BYTES))
    names = [value for tag, value in entries if tag == DT_NEEDED]
    return tuple(strings[at : strings.index(b"\0", at)].decode() for at in names)
