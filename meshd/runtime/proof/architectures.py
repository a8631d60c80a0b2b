"""Whether code built for some CUDA architectures runs on a device. Pure.

CMake's notation (`CMAKE_CUDA_ARCHITECTURES`): `90` is machine code for compute capability 9.0 and
PTX of it; `90-real` the code alone, `90-virtual` the PTX alone. NVIDIA's rules (CUDA C++
Programming Guide, Compute Capabilities; nvcc, Virtual Architecture Features): machine code runs on
its major version, from its minor one on; PTX is compiled by the driver for any later device; `121a`
runs on 12.1 alone and `100f` on its family, here taken as its major version.
"""

from __future__ import annotations

import re

_ARCHITECTURE = re.compile(r"(\d+)(\d)([af]?)(?:-(real|virtual))?")
ALL = ("all", "all-major")
OF_THE_BUILDER = "native"


def runs_on(capability: str, architectures: str) -> bool:
    """Whether a device of `capability` (`12.1`) runs what was built for `architectures`.

    `native` does: it is the device of the machine that built it, which `Registry` checks no
    further. Anything that cannot be read does not.
    """
    match = re.fullmatch(r"(\d+)\.(\d)", capability)
    if match is None:
        return False
    device = (int(match[1]), int(match[2]))
    return any(_one(device, word.strip()) for word in re.split("[;,]", architectures))


def _one(device: tuple[int, int], word: str) -> bool:
    if word in ALL or word == OF_THE_BUILDER:
        return True
    match = _ARCHITECTURE.fullmatch(word)
    if match is None:
        return False
    built, special, form = (int(match[1]), int(match[2])), match[3], match[4]
    if special == "a":
        return device == built
    same_major = device[0] == built[0] and device[1] >= built[1]
    if special == "f":
        return same_major
    return (form != "virtual" and same_major) or (form != "real" and device >= built)
