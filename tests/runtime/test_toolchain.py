"""Which tools are missing, and what to install."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from meshd.errors import ToolMissing
from meshd.runtime import toolchain
from meshd.runtime.toolchain import ask_nvcc, can_link_driver, find_toolchain, missing_tools
from tests.runtime.fake_engine import program
from tests.runtime.fake_nvcc import make_nvcc

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
        ("cuda", ("nvcc",), ["dnf install cuda-toolkit-13-0"]),
        ("cuda", ("nvcc",), ["pacman -S cuda"]),
        ("rocm", ("hipcc",), ["ROCm toolkit's hipcc: `apt install hipcc hipblas-dev"]),
        ("vulkan", ("glslc",), ["apt install glslc"]),
        ("vulkan", ("glslc",), ["dnf install glslc"]),
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


def test_what_nvcc_says_of_itself(tmp_path: Path) -> None:
    nvcc = make_nvcc(tmp_path, release="13.0", architectures=(90, 121))
    found = ask_nvcc(str(nvcc))
    assert (found.release, found.words) == ((13, 0), "13.0")
    assert found.architectures == {"90", "121"}


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ('echo "nvcc: libnvvm.so.4: cannot open shared object file" >&2; exit 1\n', "libnvvm.so.4"),
        ("exit 0\n", "no output"),
    ],
)
def test_an_nvcc_that_does_not_work(tmp_path: Path, script: str, words: str) -> None:
    nvcc = program(tmp_path / "nvcc", script)
    with pytest.raises(ToolMissing, match=f"does not work as CUDA's compiler.*{words}"):
        ask_nvcc(str(nvcc))


def test_a_compiler_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_ANSWER_LIMIT_S", 0.2)
    nvcc = program(tmp_path / "nvcc", "exec sleep 600\n")
    with pytest.raises(ToolMissing, match="no answer within 0 s"):
        ask_nvcc(str(nvcc))


@pytest.mark.skipif(sys.platform != "linux", reason="named as on Linux")
def test_the_driver_is_linked_only_where_it_can_be_loaded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "TOOLKIT_DIRS", ())
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    nvcc = str(make_nvcc(home / "bin"))
    stub = home / "lib64" / "stubs" / "libcuda.so"
    stub.parent.mkdir(parents=True)
    stub.touch()
    monkeypatch.setattr(toolchain, "DRIVER", "libcuda-of-nobody.so.1")
    assert not can_link_driver(nvcc), "an image build: the toolkit's stub is there, no driver"
    monkeypatch.setattr(toolchain, "DRIVER", "libc.so.6")  # one that is loaded anyway
    assert can_link_driver(nvcc)
    stub.unlink()
    monkeypatch.setattr(toolchain, "_SYSTEM_LIBRARIES", (str(tmp_path),))
    assert not can_link_driver(nvcc), "a driver without anything to link"


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
