"""What a build needs from the machine: found, installed as Python packages, or named."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from meshd.config import environment_of_children
from meshd.errors import ToolMissing
from meshd.runtime.nvcc import Nvcc, read_list, read_release

COMPILERS = ("c++", "g++", "clang++")
C_COMPILERS = ("cc", "gcc", "clang")
NAMES = {"cmake": ("cmake",), "ninja": ("ninja", "ninja-build")}
"""Tools that are also wheels on the package index, with the names systems give them."""
TOOLKIT_DIRS = ("/usr/local/cuda/bin", "/opt/cuda/bin", "/opt/rocm/bin")
"""Where the vendors' installers put compilers without telling PATH."""
INSTALL_LIMIT_S = 600.0

DRIVER = "libcuda.so.1"
"""The CUDA driver's library, as an engine that is linked to it asks for it."""
_ANSWER_LIMIT_S = 30.0
_SYSTEM_LIBRARIES = ("/usr/lib", "/usr/lib64", f"/usr/lib/{platform.machine()}-linux-gnu")

Which = Callable[[str], str | None]
"""Name of a program to its path; None if there is none."""

_PACKAGES = {
    "c++": "a C++ compiler: `apt install g++`, `dnf install gcc-c++` or `pacman -S gcc`",
    "cc": "a C compiler: `apt install gcc`, `dnf install gcc` or `pacman -S gcc`",
    "nvcc": "the CUDA toolkit's nvcc: `apt install nvidia-cuda-toolkit`, `pacman -S cuda`, or from "
    "NVIDIA's repository `apt install cuda-toolkit-13-0` or `dnf install cuda-toolkit-13-0`, with "
    "its bin directory on PATH",
    "hipcc": "the ROCm toolkit's hipcc: `apt install hipcc hipblas-dev rocblas-dev`, `dnf install "
    "hipcc hipblas-devel rocblas-devel` or `pacman -S rocm-hip-sdk`, with its bin directory on "
    "PATH",
    "glslc": "the Vulkan shader compiler and headers: `apt install glslc libvulkan-dev "
    "spirv-headers`, `dnf install glslc vulkan-devel spirv-headers-devel` or `pacman -S shaderc "
    "vulkan-devel`",
}
_BACKEND_TOOLS = {"cuda": ("nvcc",), "rocm": ("hipcc",), "vulkan": ("glslc",)}


@dataclass(frozen=True, slots=True)
class Toolchain:
    cmake: str
    ninja: str
    compiler: str
    """First line of the compiler's `--version`."""
    device_compiler: str | None = None
    """Path of nvcc, hipcc or glslc, where the backend needs one."""
    device_release: str = ""
    """Of the CUDA toolkit, as in `13.0`, once nvcc was asked."""


def missing_tools(backend: str, which: Which) -> tuple[str, ...]:
    """Words for each tool `backend` needs that `which` does not find and nobody can install."""
    missing = []
    if not any(which(name) for name in COMPILERS):
        missing.append(_PACKAGES["c++"])
    if not any(which(name) for name in C_COMPILERS):
        missing.append(_PACKAGES["cc"])
    missing += [_PACKAGES[t] for t in _BACKEND_TOOLS.get(backend, ()) if which(t) is None]
    return tuple(missing)


def find_toolchain(backend: str, tools_dir: Path) -> Toolchain:
    """The tools for a build, cmake and ninja installed into `tools_dir` if the system has none.

    Blocking; minutes if something is installed. Raises ToolMissing naming the package to install.
    """
    if backend == "metal" and sys.platform != "darwin":
        raise ToolMissing("Metal is Apple's: that backend can be built on macOS alone")
    missing = missing_tools(backend, _which)
    if missing:
        raise ToolMissing("the build needs " + "; and ".join(missing))
    cmake, ninja = (_python_tool(name, tools_dir) for name in ("cmake", "ninja"))
    compiler = next(c for c in COMPILERS if _which(c))
    needed = _BACKEND_TOOLS.get(backend, ())
    return Toolchain(cmake, ninja, _first_line(compiler), _which(needed[0]) if needed else None)


def ask_nvcc(path: str) -> Nvcc:
    """What the compiler at `path` says of itself. Blocking, a second at most as a rule.

    Raises ToolMissing if it does not run.
    """
    version = _answer([path, "--version"])
    release = read_release(version)
    if release is None:
        last = (version.strip().splitlines() or ["no output"])[-1]
        raise ToolMissing(
            f"{path} does not work as CUDA's compiler: its --version says `{last}`; put the bin "
            "directory of a CUDA toolkit first on PATH"
        )
    return Nvcc(path, release, read_list(_answer([path, "--list-gpu-arch"])))


def can_link_driver(nvcc_path: str) -> bool:
    """Whether the CUDA driver's library can be loaded here and, as itself or as the toolkit's
    stub, be linked. Build machines and image builds have no driver as a rule."""
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return False
    homes = [Path(nvcc_path).resolve().parent.parent]
    homes += [Path(directory).parent for directory in TOOLKIT_DIRS]
    found = [Path(directory) / "libcuda.so" for directory in _SYSTEM_LIBRARIES]
    for home in homes:
        found += home.glob("lib*/stubs/libcuda.so")
        found += home.glob("targets/*/lib/stubs/libcuda.so")
    return any(path.exists() for path in found)


def _which(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(TOOLKIT_DIRS))


def _python_tool(name: str, tools_dir: Path) -> str:
    """On PATH, beside this interpreter, or in a private environment made for it."""
    beside = os.pathsep.join((str(Path(sys.executable).parent), str(tools_dir / "bin")))
    for candidate in NAMES[name]:
        found = shutil.which(candidate) or shutil.which(candidate, path=beside)
        if found is not None:
            return found
    try:
        _install(name, tools_dir)
        found = shutil.which(name, path=str(tools_dir / "bin"))
        words = "it brought no program"
    except (subprocess.SubprocessError, OSError) as error:
        # What is half there would be taken for whole next time.
        shutil.rmtree(tools_dir, ignore_errors=True)
        output = getattr(error, "stderr", None) or getattr(error, "output", None) or str(error)
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        found, words = None, (text.strip().splitlines() or ["no output"])[-1]
    if found is None:
        package = "ninja-build" if name == "ninja" else name
        raise ToolMissing(
            f"the build needs {name}: `apt install {package}`; installing it from the Python "
            f"package index failed too ({words})"
        )
    return found


def _install(package: str, tools_dir: Path) -> None:
    if not (tools_dir / "bin" / "python").exists():
        venv.create(tools_dir, with_pip=True)
    python = str(tools_dir / "bin" / "python")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package],
        capture_output=True,
        text=True,
        timeout=INSTALL_LIMIT_S,
        stdin=subprocess.DEVNULL,
        env=environment_of_children(),
        check=True,
    )


def _first_line(compiler: str) -> str:
    return (_answer([compiler, "--version"]).splitlines() or [compiler])[0]


def _answer(command: list[str]) -> str:
    """Both outputs of `command`; words for why there are none if it does not run."""
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=_ANSWER_LIMIT_S,
            env=environment_of_children(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_ANSWER_LIMIT_S:.0f} s"
    except OSError as error:
        return f"it cannot be executed: {error.strerror}"
    return done.stdout
