"""A CMake project shaped like llama.cpp that builds in a second, and packages made of it."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

from meshd.runtime.sources import MARKER, PinnedSource
from tests.runtime.fake_engine import HELP, NO_DEVICES

GATE = "TOY_GATE"
"""Environment variable: while the file it names exists, the build does not get past it."""

_CMAKE = """
cmake_minimum_required(VERSION 3.14)
project(toy CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
option(GGML_RPC "" OFF)
add_library(ggml-toy SHARED lib.cpp)
set_target_properties(ggml-toy PROPERTIES VERSION 0.1 SOVERSION 0)
add_custom_command(OUTPUT gated.h
  COMMAND sh -c "echo $$ > \\"$TOY_GATE.pid\\"; while [ -e \\"$TOY_GATE\\" ]; do sleep 0.05; done"
  COMMAND ${CMAKE_COMMAND} -E touch gated.h DEPENDS ggml-toy VERBATIM)
add_executable(llama-server server.cpp gated.h)
target_link_libraries(llama-server ggml-toy)
option(GGML_CUDA "" OFF)
if(GGML_CUDA)
  add_library(ggml-cuda SHARED lib.cpp)
  target_link_libraries(llama-server ggml-cuda)
endif()
foreach(tool ggml-rpc-server llama-gguf-split llama-bench)
  add_executable(${tool} tool.cpp)
endforeach()
"""
_LIB = "const char *words() { return VERSION_WORDS; }\n"
_SERVER = """
#include <cstdio>
#include <cstring>
const char *words();
int main(int argc, char **argv) {
  if (argc > 1 && !strcmp(argv[1], "--version")) puts(words());
  else if (argc > 1 && !strcmp(argv[1], "--help")) puts(HELP_WORDS);
  else puts(DEVICE_WORDS);
}
"""
_PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
_BACKEND = """
from pathlib import Path
METADATA = "Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n"
def prepare_metadata_for_build_wheel(directory, settings=None):
    info = Path(directory, "{stem}-{version}.dist-info")
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "WHEEL").write_text("Wheel-Version: 1.0\\nGenerator: toy\\nRoot-Is-Purelib: true\\n"
                                "Tag: py3-none-any\\n")
    return info.name
def get_requires_for_build_wheel(settings=None):
    return []
def build_wheel(*args, **kwargs):
    raise SystemExit("it must not be built")
"""


def toy_files(
    *, version: str = "version: 0.1 (build 1, commit toy)", help_text: str = HELP
) -> dict[str, str]:
    """Path below the project's root to content."""
    return {
        "CMakeLists.txt": _CMAKE,
        MARKER.as_posix(): "".join(
            f"#define RPC_PROTO_{part}_VERSION {number}\n"
            for part, number in (("MAJOR", 7), ("MINOR", 1), ("PATCH", 2))
        ),
        "lib.cpp": f"#define VERSION_WORDS {_quoted(version)}\n{_LIB}",
        "server.cpp": f"#define HELP_WORDS {_quoted(help_text)}\n"
        f"#define DEVICE_WORDS {_quoted(NO_DEVICES)}\n{_SERVER}",
        "tool.cpp": "int main() {}\n",
        "docs/long.md": "words",
        "models/vocab.txt": "a model",
        "tools/x.gguf": "a model",
    }


def toy_tree(directory: Path, files: dict[str, str] | None = None) -> Path:
    for name, content in (files or toy_files()).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return directory


def toy_archive(
    path: Path, files: dict[str, str], *, top: str = "toy-1", comment: str | None = None
) -> Path:
    """A tar archive of `files` below `top`; `comment` goes where `git archive` puts the commit."""
    headers = {"comment": comment} if comment else {}
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
        for name, content in files.items():
            data = content.encode()
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def toy_package(
    index: Path, *, name: str = "toy-engine", version: str = "1.0", broken: bool = False
) -> PinnedSource:
    """A source distribution in the folder `index` (for PIP_FIND_LINKS), and its pin."""
    stem = name.replace("-", "_")
    values = {"name": name, "version": version, "stem": stem}
    backend = _BACKEND
    for key, value in values.items():
        backend = backend.replace(f"{{{key}}}", value)
    files = {
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "pyproject.toml": _PYPROJECT,
        "CMakeLists.txt": "# the package's own",
        "backend.py": backend,
        **{f"vendor/llama.cpp/{path}": content for path, content in toy_files().items()},
    }
    index.mkdir(parents=True, exist_ok=True)
    path = toy_archive(index / f"{stem}-{version}.tar.gz", files, top=f"{stem}-{version}")
    digest = "0" * 64 if broken else hashlib.sha256(path.read_bytes()).hexdigest()
    return PinnedSource(name, version, digest, "feedbee", "vendor/llama.cpp")


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
