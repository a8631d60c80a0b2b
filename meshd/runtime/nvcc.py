"""Which CUDA architectures a build is for, and whether this machine's nvcc can compile them. Pure.

An architecture is CMake's word for a compute capability: `121` for 12.1, `90a`, `80-virtual`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Release = tuple[int, int]
"""Of the CUDA toolkit: (13, 0)."""

FIRST_RELEASE: dict[str, Release] = {
    "75": (10, 0),
    "80": (11, 0),
    "86": (11, 1),
    "87": (11, 4),
    "88": (13, 0),
    "89": (11, 8),
    "90": (11, 8),
    "100": (12, 8),
    "101": (12, 8),
    "103": (12, 9),
    "110": (13, 0),
    "120": (12, 8),
    "121": (12, 9),
}
"""First release whose nvcc compiles for an architecture (release notes of the CUDA toolkit)."""
LAST_RELEASE: dict[str, Release] = {
    **dict.fromkeys(("50", "52", "53", "60", "61", "62", "70", "72", "101"), (12, 9)),
}
"""Last one, for those that a release dropped."""

_WORD = re.compile(r"(?:sm_|compute_)?(\d+)(?:\.(\d))?([af]?)(-real|-virtual)?")
_NUMBERS = range(50, 1000)


@dataclass(frozen=True, slots=True)
class Nvcc:
    path: str
    release: Release | None
    """None if its `--version` cannot be read."""
    architectures: frozenset[str]
    """What it says it compiles for, as in `121`; empty if it does not tell (before CUDA 11.5)."""

    @property
    def words(self) -> str:
        """Its release for people and records: `13.0`."""
        return "{}.{}".format(*self.release) if self.release is not None else ""


def parse_architectures(text: str) -> tuple[str, ...]:
    """`121`, `90;100`, `sm_90,12.1` in CMake's words, each once, in the order given.

    Raises ValueError saying what cannot be read.
    """
    found = []
    for word in re.split(r"[;,\s]+", text.strip()):
        match = _WORD.fullmatch(word.lower())
        number = f"{match[1]}{match[2] or ''}" if match is not None else ""
        if match is None or int(number) not in _NUMBERS:
            raise ValueError(
                f"`{word}` is no CUDA architecture; say it as in 121 (compute capability 12.1), or "
                "90;121 for several"
            )
        found.append(f"{number}{match[3]}{match[4] or ''}")
    return tuple(dict.fromkeys(found))


def architectures_of(capabilities: Iterable[str]) -> tuple[str, ...]:
    """Those of devices with these compute capabilities: `12.1` is `121`; each once, in order."""
    numbers = {int(capability.replace(".", "")) for capability in capabilities}
    return tuple(str(number) for number in sorted(numbers))


def read_release(version: str) -> Release | None:
    """Out of `nvcc --version`: `Cuda compilation tools, release 13.0, V13.0.88`."""
    match = re.search(r"release (\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match is not None else None


def read_list(listing: str) -> frozenset[str]:
    """Out of `nvcc --list-gpu-arch`: a line `compute_121` for each."""
    return frozenset(re.findall(r"^compute_(\d+)\s*$", listing, re.MULTILINE))


def why_unfit(architectures: Sequence[str], nvcc: Nvcc) -> str | None:
    """Why `nvcc` cannot compile for all of `architectures`, and what to do; None if it can.

    1. what nvcc itself lists decides, if it lists anything;
    2. else the table of first and last releases; an architecture that is not in it is left to nvcc.
    """
    for architecture in architectures:
        match = re.match(r"\d+", architecture)
        assert match is not None, "it came from parse_architectures"
        number = match[0]
        if nvcc.architectures:  # 1
            if number not in nvcc.architectures:
                return _words(number, nvcc)
        elif nvcc.release is not None and not _within(number, nvcc.release):  # 2
            return _words(number, nvcc)
    return None


def _within(number: str, release: Release) -> bool:
    first, last = FIRST_RELEASE.get(number, release), LAST_RELEASE.get(number, release)
    return first <= release <= last


def _words(number: str, nvcc: Nvcc) -> str:
    said = f"{nvcc.path} (CUDA {nvcc.words or 'of an unknown release'}) cannot compile for sm_"
    said += number
    first, last = FIRST_RELEASE.get(number), LAST_RELEASE.get(number)
    if last is not None and (nvcc.release is None or nvcc.release > last):
        return f"{said}: CUDA {last[0]}.{last[1]} was the last that could; install that one"
    if first is None or (nvcc.release is not None and nvcc.release >= first):
        known = ", ".join(sorted(nvcc.architectures, key=int)) or "none"
        return f"{said}: it knows {known}; name one of them with --cuda-arch"
    better = " (13.0 or newer is made for GB10)" if number == "121" else ""
    return (
        f"{said}: that needs CUDA {first[0]}.{first[1]} or newer{better}; install NVIDIA's "
        f"cuda-toolkit-{max(first, (13, 0))[0]}-0 package and put its bin directory first on PATH"
    )
