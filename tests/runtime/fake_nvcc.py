"""A compiler for CUDA that knows its release and what it compiles for, and compiles nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.runtime.fake_engine import program

_SCRIPT = """case "$1" in
--version)
  echo "nvcc: NVIDIA (R) Cuda compiler driver"
  echo "Copyright (c) 2005-2025 NVIDIA Corporation"
  echo "Cuda compilation tools, release {release}, V{release}.88" ;;
--list-gpu-arch)
  printf 'compute_%s\\n' {architectures} ;;
*)
  echo "nvcc fatal   : Unknown option '$1'" >&2; exit 1 ;;
esac
"""


def make_nvcc(
    directory: Path, *, release: str = "13.0", architectures: Iterable[int] = (90, 100, 121)
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    known = " ".join(str(number) for number in architectures)
    return program(directory / "nvcc", _SCRIPT.format(release=release, architectures=known))
