"""How fast this machine reads its main memory: measured, as nobody tells.

Several threads copy at once, each between two buffers of its own; all buffers together are larger
than most caches. Time is each thread's own on a processor, so that a busy machine does not look
slow; what others read meanwhile still counts against it, and the best of several rounds stands.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Final

from meshd.sizes import two_digits

MIB: Final = 1 << 20
MAX_THREADS: Final = 16
"""As many as there are processors, if there are fewer. A server's memory may be faster than that
many threads are: it looks slower than it is then, and never slower than a desktop's."""
BUFFERS: Final = 128 * MIB
"""Of all threads together."""
FREE_SHARE: Final = 8
"""No more than one such part of the free memory is used."""
LEAST_BUFFER: Final = 2 * MIB
"""Smaller ones lie in a core's own cache."""
ROUNDS: Final = 4
ANONYMOUS: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
WAIT_S: Final = 2.0
"""For all threads to come to the beginning of a round."""


def measure_memory_speed(free_bytes: int) -> int | None:
    """Bytes per second, to two digits; None if there is too little free memory to find out.
    Blocking: a tenth of a second, on all processors and without the interpreter's lock."""
    threads = min(MAX_THREADS, _processors())
    size = min(BUFFERS, free_bytes // FREE_SHARE) // (2 * threads)
    if size < LEAST_BUFFER:
        return None
    try:
        with mmap.mmap(-1, 2 * threads * size, flags=ANONYMOUS) as buffers:
            return two_digits(_best(buffers, threads, size))
    except (OSError, RuntimeError):  # no memory, no thread, or one that did not come
        return None


def _best(buffers: mmap.mmap, threads: int, size: int) -> float:
    """Bytes per second of all threads together in the best round. `size`: of one buffer."""
    first = ctypes.c_char.from_buffer(buffers)  # while it is held the mapping cannot be closed
    try:
        address = ctypes.addressof(first)
        together = Barrier(threads, timeout=WAIT_S)
        with ThreadPoolExecutor(threads, thread_name_prefix="meshd-memory") as pool:
            each = pool.map(
                lambda number: _rounds(address + 2 * size * number, size, together), range(threads)
            )
            return max(map(sum, zip(*each, strict=True)))
    finally:
        del first


def _rounds(address: int, size: int, together: Barrier) -> list[float]:
    """Bytes per second of one thread in each round: what it reads and what it writes."""
    ctypes.memset(address, 1, 2 * size)  # pages that were never written are not there
    found = []
    for _ in range(ROUNDS):
        together.wait()
        began = time.thread_time()
        ctypes.memmove(address + size, address, size)
        found.append(2 * size / max(time.thread_time() - began, 1e-6))
    return found


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
