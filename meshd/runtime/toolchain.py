"""What a build needs from the machine: found, installed as Python packages, or named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from meshd.config import environment_of_children
from meshd.errors import ToolMissing

COMPILERS = ("c++", "g++", "clang++")
PYTHON_TOOLS = ("cmake", "ninja")
"""Tools that are also wheels on the package index."""
INSTALL_LIMIT_S = 600.0

_PACKAGES = {
    "c++": "a C++ compiler: `apt install g++`, `dnf install gcc-c++` or `pacman -S gcc`",
    "cc": "a C compiler: `apt install gcc`, `dnf install gcc` or `pacman -S gcc`",
    "nvcc": "the CUDA toolkit's nvcc: `apt install nvidia-cuda-toolkit`, or NVIDIA's cuda-toolkit "
    "package, with its bin directory on PATH",
    "hipcc": "the ROCm toolkit's hipcc, with its bin directory on PATH",
    "glslc": "the Vulkan shader compiler: `apt install glslc libvulkan-dev`",
}
_BACKEND_TOOLS = {"cuda": ("nvcc",), "rocm": ("hipcc",), "vulkan": ("glslc",)}


@dataclass(frozen=True, slots=True)
class Toolchain:
    cmake: str
    ninja: str
    compiler: str
    """First line of the compiler's `--version`."""


def missing_tools(backend: str, which: Callable[[str], str | None]) -> tuple[str, ...]:
    """Words for each tool `backend` needs that `which` does not find and nobody can install."""
    missing = []
    if not any(which(name) for name in COMPILERS):
        missing.append(_PACKAGES["c++"])
    if not any(which(name) for name in ("cc", "gcc", "clang")):
        missing.append(_PACKAGES["cc"])
    missing += [_PACKAGES[t] for t in _BACKEND_TOOLS.get(backend, ()) if which(t) is None]
    return tuple(missing)


def find_toolchain(backend: str, tools_dir: Path) -> Toolchain:
    """The tools for a build, cmake and ninja installed into `tools_dir` if the system has none.

    Raises ToolMissing naming the package to install.
    """
    missing = missing_tools(backend, shutil.which)
    if missing:
        raise ToolMissing("the build needs " + "; and ".join(missing))
    cmake, ninja = (_python_tool(name, tools_dir) for name in PYTHON_TOOLS)
    compiler = next(c for c in COMPILERS if shutil.which(c))
    return Toolchain(cmake, ninja, _first_line(compiler))


def _python_tool(name: str, tools_dir: Path) -> str:
    """On PATH, beside this interpreter, or in a private environment made for it."""
    beside = os.pathsep.join((str(Path(sys.executable).parent), str(tools_dir / "bin")))
    found = shutil.which(name) or shutil.which(name, path=beside)
    if found is not None:
        return found
    if not (tools_dir / "bin" / "python").exists():
        venv.create(tools_dir, with_pip=True)
    command = [str(tools_dir / "bin" / "python"), "-m", "pip", "install", "--quiet", name]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=INSTALL_LIMIT_S,
        env=environment_of_children(),
        check=False,
    )
    found = shutil.which(name, path=str(tools_dir / "bin"))
    if done.returncode != 0 or found is None:
        words = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ToolMissing(
            f"the build needs {name}; installing it from the Python package index failed "
            f"({words}); `apt install {name if name == 'cmake' else 'ninja-build'}` has it too"
        )
    return found


def _first_line(compiler: str) -> str:
    done = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=30, check=False
    )
    return (done.stdout.splitlines() or [compiler])[0]
