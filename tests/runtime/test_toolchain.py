"""Which tools are missing, and what to install."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from meshd.errors import ToolMissing
from meshd.runtime import toolchain
from meshd.runtime.toolchain import find_toolchain, missing_tools
from tests.runtime.fake_engine import program

WHOLE = {"cmake", "ninja", "c++", "cc", "nvcc", "hipcc", "glslc"}


def which(*absent: str) -> toolchain.Which:
    return lambda name: f"/usr/bin/{name}" if name in WHOLE and name not in absent else None


@pytest.mark.parametrize("backend", ["cpu", "cuda", "rocm", "vulkan", "metal"])
def test_nothing_is_missing(backend: str) -> None:
    assert missing_tools(backend, which()) == ()


@pytest.mark.parametrize(
    ("backend", "absent", "words"),
    [
        ("cpu", ("c++",), ["apt install g++"]),
        ("cpu", ("c++", "cc"), ["apt install g++", "apt install gcc"]),
        ("cuda", ("nvcc",), ["apt install nvidia-cuda-toolkit"]),
        ("rocm", ("hipcc",), ["ROCm toolkit's hipcc"]),
        ("vulkan", ("glslc",), ["apt install glslc"]),
        # cmake and ninja are not missing: they can be installed as Python packages.
        ("cpu", ("cmake", "ninja", "nvcc", "hipcc"), []),
    ],
)
def test_what_is_missing_is_named_with_its_package(
    backend: str, absent: tuple[str, ...], words: list[str]
) -> None:
    found = missing_tools(backend, which(*absent))
    assert len(found) == len(words)
    assert all(word in line for word, line in zip(words, found, strict=True))


@pytest.mark.parametrize("name", ["g++", "clang++"])
def test_any_compiler_will_do(name: str) -> None:
    assert missing_tools("cpu", lambda n: n if n in (name, "clang") else None) == ()


@pytest.fixture
def bin_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory of PATH, with compilers and nothing else."""
    directory = tmp_path / "path"
    directory.mkdir()
    for name in ("c++", "cc"):
        program(directory / name, 'echo "toy c++ 1.0"; echo more\n')
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.setattr(toolchain, "TOOLKIT_DIRS", (str(tmp_path / "toolkit"),))
    return directory


def no_interpreter_nearby(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere" / "python"))


def test_tools_on_path(bin_dir: Path, tmp_path: Path) -> None:
    cmake = program(bin_dir / "cmake", "")
    ninja = program(bin_dir / "ninja-build", "")  # Fedora's name
    found = find_toolchain("cpu", tmp_path / "tools")
    assert (found.cmake, found.compiler, found.device_compiler) == (
        *(str(cmake), "toy c++ 1.0"),
        None,
    )
    if not (Path(sys.executable).parent / "ninja").exists():
        assert found.ninja == str(ninja)
    assert not (tmp_path / "tools").exists()


def test_tools_installed_before(
    bin_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_interpreter_nearby(tmp_path, monkeypatch)
    tools = tmp_path / "tools" / "bin"
    tools.mkdir(parents=True)
    cmake, ninja = (str(program(tools / name, "")) for name in ("cmake", "ninja"))
    found = find_toolchain("cpu", tmp_path / "tools")
    assert (found.cmake, found.ninja) == (cmake, ninja)


def test_a_vendors_compiler_that_is_not_on_path(bin_dir: Path, tmp_path: Path) -> None:
    program(bin_dir / "cmake", "")
    program(bin_dir / "ninja", "")
    with pytest.raises(ToolMissing, match="nvidia-cuda-toolkit"):
        find_toolchain("cuda", tmp_path / "tools")
    (tmp_path / "toolkit").mkdir()
    nvcc = program(tmp_path / "toolkit" / "nvcc", "")
    assert find_toolchain("cuda", tmp_path / "tools").device_compiler == str(nvcc)


def test_no_compiler(bin_dir: Path, tmp_path: Path) -> None:
    (bin_dir / "c++").unlink()
    with pytest.raises(ToolMissing, match=r"the build needs a C\+\+ compiler: `apt install g\+\+`"):
        find_toolchain("cpu", tmp_path / "tools")


@pytest.mark.skipif(sys.platform == "darwin", reason="Metal is there")
def test_metal_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ToolMissing, match="on macOS alone"):
        find_toolchain("metal", tmp_path / "tools")


def test_an_installation_that_fails_leaves_nothing_half_done(
    bin_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools"
    python = tools / "bin" / "python"
    python.parent.mkdir(parents=True)
    program(python, 'echo "ERROR: No matching distribution found for cmake" >&2; exit 1\n')
    no_interpreter_nearby(tmp_path, monkeypatch)
    with pytest.raises(ToolMissing, match=r"apt install cmake.*No matching distribution found"):
        find_toolchain("cpu", tools)
    assert not tools.exists()


def test_a_python_that_cannot_make_environments(
    bin_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_interpreter_nearby(tmp_path, monkeypatch)

    def create(*args: object, **kwargs: object) -> None:
        raise OSError("ensurepip is not available")

    monkeypatch.setattr("venv.create", create)
    with pytest.raises(ToolMissing, match="ensurepip is not available"):
        find_toolchain("cpu", tmp_path / "tools")
