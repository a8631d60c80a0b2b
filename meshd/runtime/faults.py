"""Reads llama.cpp's last words.

A line that says why an engine ends is turned into a `Fault`. Several lines of one death match; the
one with the highest rank says most (the name of the missing file, not "exiting due to error").
Source: the messages of llama.cpp at the pinned commit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

RPC_LOST = "rpc_lost"
"""Kind of the fault that an RPC server is gone; which worker's the engine does not say."""


@dataclass(frozen=True, slots=True)
class Fault:
    kind: str
    message: str
    """Names the file, device or limit."""
    deterministic: bool
    """The same launch would fail the same way: trying again is pointless."""
    out_of_memory: bool = False
    rank: int = 1


@dataclass(frozen=True, slots=True)
class _Pattern:
    kind: str
    regex: re.Pattern[str]
    message: Callable[[re.Match[str]], str]
    deterministic: bool
    out_of_memory: bool = False
    rank: int = 2


def classify(line: str) -> Fault | None:
    """The fault `line` tells of, or None for the many lines that tell of none."""
    for pattern in _PATTERNS:
        match = pattern.regex.search(line)
        if match is not None:
            return Fault(
                pattern.kind,
                pattern.message(match),
                pattern.deterministic,
                pattern.out_of_memory,
                pattern.rank,
            )
    return None


def worse(known: Fault | None, new: Fault) -> Fault:
    """Which of two faults of one process to tell people; the first of equals."""
    return new if known is None or new.rank > known.rank else known


def _pattern(
    kind: str,
    regex: str,
    message: str,
    *,
    deterministic: bool,
    out_of_memory: bool = False,
    rank: int = 2,
) -> _Pattern:
    return _Pattern(
        kind,
        re.compile(regex),
        lambda match: match.expand(message),
        deterministic,
        out_of_memory,
        rank,
    )


_PATTERNS = (
    _pattern(
        "file_missing",
        r"failed to open GGUF file '(?P<f>[^']+)' \((?P<w>[^)]+)\)",
        r"\g<f>: \g<w>",
        deterministic=True,
        rank=5,
    ),
    _pattern(
        "library_missing",
        r"error while loading shared libraries: (?P<lib>[^:]+): (?P<w>.+)",
        r"the engine needs the library \g<lib>: \g<w>",
        deterministic=True,
        rank=5,
    ),
    _pattern(
        "not_executable",
        r"^meshd guard: (?P<w>.+)",
        r"\g<w>",
        deterministic=True,
        rank=5,
    ),
    _pattern(
        "unknown_architecture",
        r"unknown model architecture: '(?P<a>[^']*)'",
        r"this engine does not know the model architecture '\g<a>'; a newer one may",
        deterministic=True,
        rank=5,
    ),
    _pattern(
        "bad_argument",
        r"^error(?: while handling argument|: (?:invalid|unknown) argument)[: ]+(?P<w>.+)",
        r"the engine does not understand its command line: \g<w>",
        deterministic=True,
        rank=5,
    ),
    _pattern(
        "out_of_memory",
        r"(?P<w>(?:failed to allocate|unable to allocate|ErrorOutOfDeviceMemory|"
        r"out of memory|cudaMalloc failed|bad_alloc|Cannot allocate memory).*)",
        r"out of memory: \g<w>",
        deterministic=False,
        out_of_memory=True,
        rank=4,
    ),
    _pattern(
        "not_gguf",
        r"invalid magic characters: (?P<w>.+)",
        r"the file is not GGUF: \g<w>",
        deterministic=True,
        rank=4,
    ),
    _pattern(
        "bad_gguf",
        r"gguf_init_from_\w+: (?P<w>.+)",
        r"the engine cannot read the GGUF file: \g<w>",
        deterministic=True,
        rank=3,
    ),
    _pattern(
        "bad_tensor",
        r"error loading model: (?P<w>.*(?:tensor|corrupt|incomplete|hyperparameters|vocab).*)",
        r"the engine refuses the weights: \g<w>",
        deterministic=True,
        rank=3,
    ),
    _pattern(
        "device_lost",
        r"(?P<w>(?:CUDA error|ROCm error|vk::DeviceLost|no CUDA-capable device).*)",
        r"\g<w>",
        deterministic=False,
        rank=3,
    ),
    _pattern(
        RPC_LOST,
        r"Remote RPC server crashed or returned malformed response",
        "a worker's rpc-server went away",
        deterministic=False,
        rank=3,
    ),
    _pattern(
        RPC_LOST,
        r"ggml-rpc\.cpp:\d+: (?:Failed to connect to|RPC handshake failed for) ",
        "a worker's rpc-server does not answer",
        deterministic=False,
        rank=3,
    ),
    _pattern(
        "assertion",
        # Nothing open-ended before what is looked for: a line of 4 KiB would take a second.
        r"(?P<w>GGML_ASSERT\(.+|\.(?:c|cpp|cu|cuh|h|m):\d+: fatal error|Assertion [`'].+' failed)",
        r"the engine gave itself up: \g<w>",
        deterministic=False,
        rank=3,
    ),
    _pattern(
        "exception",
        r"^\s+what\(\):\s+(?P<w>.+)",
        r"the engine gave itself up: \g<w>",
        deterministic=False,
        rank=2,
    ),
    _pattern(
        "address_in_use",
        r"couldn't bind HTTP server socket.*",
        "the engine could not listen on its socket",
        deterministic=False,
        rank=3,
    ),
    _pattern(
        "context",
        r"failed to create[ _]context",
        "the engine could not create its context; most often memory is short",
        deterministic=False,
        out_of_memory=True,
        rank=2,
    ),
    _pattern(
        "load_failed",
        r"error loading model: (?P<w>.+)",
        r"the engine cannot load the model: \g<w>",
        deterministic=True,
        rank=2,
    ),
    _pattern(
        "load_failed",
        r"exiting due to model loading error",
        "the engine could not load the model",
        deterministic=False,
        rank=1,
    ),
    _pattern(
        "http_failed",
        r"exiting due to HTTP server error",
        "the engine could not serve",
        deterministic=False,
        rank=1,
    ),
)
