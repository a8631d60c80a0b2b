"""The C programs of the benchmarks, compiled when first used and when their source changed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from bench.processes import BenchError

SOURCE_DIR = Path(__file__).with_name("native")
BINARY_DIR = SOURCE_DIR / "bin"


def binary(name: str) -> Path:
    """Path of the compiled `native/<name>.c`. Raises BenchError without a compiler."""
    source, target = SOURCE_DIR / f"{name}.c", BINARY_DIR / name
    if target.exists() and target.stat().st_mtime >= source.stat().st_mtime:
        return target
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        raise BenchError(f"{source} cannot be compiled: no C compiler (Debian: apt install gcc)")
    BINARY_DIR.mkdir(exist_ok=True)
    # Not written in place: two benchmarks may start at once.
    fresh = target.with_name(f"{name}.{os.getpid()}")
    argv = [compiler, "-O2", "-Wall", "-Wextra", "-o", str(fresh), str(source)]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"{' '.join(argv)} failed:\n{done.stderr}")
    fresh.replace(target)
    return target
