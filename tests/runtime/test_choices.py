"""What a build chooses, and that it is noticed when CMake does otherwise."""

from __future__ import annotations

import pytest

from meshd.runtime.choices import (
    BACKENDS,
    BuildOptions,
    backend_library,
    cmake_args,
    not_taken,
    read_cache,
)

CUDA = cmake_args(BuildOptions("cuda", cuda_arch="121"), "0c1e570")
CACHE = """# This is the CMakeCache file.
//Choose the type of build
CMAKE_BUILD_TYPE:STRING=Release
CMAKE_CUDA_ARCHITECTURES:UNINITIALIZED=121
CMAKE_CUDA_COMPILER:FILEPATH=/usr/local/cuda/bin/nvcc
CMAKE_CXX_COMPILER:FILEPATH=/usr/bin/c++
BUILD_SHARED_LIBS:BOOL=ON
//ggml: use CUDA
GGML_CUDA:BOOL=ON
GGML_CUDA_FA:BOOL=ON
GGML_CUDA_FA_ALL_QUANTS:BOOL=ON
GGML_CUDA_NCCL:BOOL=OFF
GGML_CUDA_NO_VMM:BOOL=OFF
GGML_CUDA-ADVANCED:INTERNAL=1
GGML_NATIVE:BOOL=ON
GGML_OPENMP:BOOL=ON
GGML_CCACHE:BOOL=OFF
GGML_RPC:BOOL=TRUE
GGML_AVAILABLE_BACKENDS:INTERNAL=ggml-cpu;ggml-cuda;ggml-rpc
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_rpc_is_always_built(backend: str) -> None:
    assert "-DGGML_RPC=ON" in cmake_args(BuildOptions(backend, cuda_arch="90"), "x")


def test_only_the_cpu_is_nothing_without_a_library() -> None:
    assert {b: backend_library(b) for b in BACKENDS} == {
        "cpu": None,
        "cuda": "libggml-cuda",
        "rocm": "libggml-hip",
        "vulkan": "libggml-vulkan",
        "metal": "libggml-metal",
    }


def test_the_entries_that_say_what_was_built() -> None:
    kept = read_cache(CACHE)
    assert kept["CMAKE_CUDA_ARCHITECTURES"] == "121"
    assert kept["CMAKE_CUDA_COMPILER"] == "/usr/local/cuda/bin/nvcc"
    assert kept["GGML_CUDA_FA_ALL_QUANTS"] == "ON"
    assert kept["GGML_AVAILABLE_BACKENDS"] == "ggml-cpu;ggml-cuda;ggml-rpc"
    assert not {"BUILD_SHARED_LIBS", "CMAKE_CXX_COMPILER", "GGML_CUDA-ADVANCED"} & set(kept)


def test_all_choices_taken() -> None:
    assert not_taken(CUDA, "cuda", CACHE) == ()


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            *("CMAKE_CUDA_ARCHITECTURES:UNINITIALIZED=121", "CMAKE_CUDA_ARCHITECTURES:STRING=90"),
            "CMAKE_CUDA_ARCHITECTURES is 90, asked for was 121",
        ),
        ("GGML_CUDA:BOOL=ON", "GGML_CUDA:BOOL=OFF", "GGML_CUDA is OFF, asked for was ON"),
        ("GGML_RPC:BOOL=TRUE\n", "", "GGML_RPC is nothing, asked for was ON"),
        ("GGML_RPC:BOOL=TRUE", "GGML_RPC:UNINITIALIZED=ON", "this source has no option GGML_RPC"),
        (
            *("GGML_CUDA:BOOL=ON", "GGML_CUDA:UNINITIALIZED=ON"),
            "this source has no option GGML_CUDA",
        ),
        ("FA_ALL_QUANTS:BOOL=ON", "FA_ALL_QUANTS:BOOL=OFF", "GGML_CUDA_FA_ALL_QUANTS is OFF"),
        ("ggml-cpu;ggml-cuda;", "ggml-cpu;", "it will build ggml-cpu, ggml-rpc, but not ggml-cuda"),
    ],
)
def test_a_choice_that_was_not_taken(before: str, after: str, words: str) -> None:
    assert before in CACHE
    (finding,) = not_taken(CUDA, "cuda", CACHE.replace(before, after))
    assert words in finding
