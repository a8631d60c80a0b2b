"""Architectures, and which nvcc can compile for them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from meshd.runtime.nvcc import (
    FIRST_RELEASE,
    Nvcc,
    Release,
    architectures_of,
    parse_architectures,
    read_list,
    read_release,
    why_unfit,
)

VERSION_13 = """nvcc: NVIDIA (R) Cuda compiler driver
Copyright (c) 2005-2025 NVIDIA Corporation
Built on Wed_Aug_20_01:58:59_PM_PDT_2025
Cuda compilation tools, release 13.0, V13.0.88
Build cuda_13.0.r13.0/compiler.36424714_0
"""
LIST_13 = "\n".join(f"compute_{n}" for n in (75, 80, 86, 87, 88, 89, 90, 100, 110, 103, 120, 121))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("121", ("121",)),
        ("90;100", ("90", "100")),
        ("90, 121 90", ("90", "121")),
        ("sm_121a", ("121a",)),
        ("12.1", ("121",)),
        ("9.0-virtual", ("90-virtual",)),
        ("80-virtual;86-real", ("80-virtual", "86-real")),
    ],
)
def test_architectures_as_people_write_them(text: str, found: tuple[str, ...]) -> None:
    assert parse_architectures(text) == found


@pytest.mark.parametrize("text", ["", "blackwell", "5", "12100", "90b", "all", "9.0.1"])
def test_words_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no CUDA architecture; say it as in 121"):
        parse_architectures(text)


def test_architectures_of_devices() -> None:
    assert architectures_of(["12.1", "9.0", "12.1", "8.6"]) == ("86", "90", "121")
    assert architectures_of([]) == ()


def test_what_nvcc_says() -> None:
    assert read_release(VERSION_13) == (13, 0)
    assert read_release("nvcc: command not found") is None
    listed = read_list(LIST_13)
    assert {"75", "121"} <= listed
    assert len(listed) == 12
    assert read_list("nvcc fatal   : Unknown option '--list-gpu-arch'") == frozenset()


def test_what_nvcc_lists_decides() -> None:
    nvcc = Nvcc("/cuda/bin/nvcc", (13, 0), read_list(LIST_13))
    assert why_unfit(("90", "121a", "120-virtual"), nvcc) is None
    assert why_unfit(("90", "70"), nvcc) == (
        "/cuda/bin/nvcc (CUDA 13.0) cannot compile for sm_70: CUDA 12.9 was the last that could; "
        "install that one"
    )
    found = why_unfit(("130",), nvcc)
    assert found is not None
    assert "it knows 75, 80, 86" in found
    assert "name one of them with --cuda-arch" in found


@pytest.mark.parametrize("listed", [frozenset({"80", "90"}), frozenset()])
@pytest.mark.parametrize("release", [(12, 4), (12, 8)])
def test_too_old_for_gb10(listed: frozenset[str], release: Release) -> None:
    found = why_unfit(("121",), Nvcc("nvcc", release, listed))
    assert found is not None
    assert "cannot compile for sm_121: that needs CUDA 12.9 or newer" in found
    assert "13.0 or newer is made for GB10" in found
    assert "install NVIDIA's cuda-toolkit-13-0" in found


@pytest.mark.parametrize(("number", "first"), FIRST_RELEASE.items())
def test_the_table_where_nvcc_does_not_list(number: str, first: Release) -> None:
    assert why_unfit((number,), Nvcc("nvcc", first, frozenset())) is None
    older = (first[0] - 1, 9) if first[1] == 0 else (first[0], first[1] - 1)
    found = why_unfit((number,), Nvcc("nvcc", older, frozenset()))
    assert found is not None
    assert f"needs CUDA {first[0]}.{first[1]} or newer" in found


def test_the_table_of_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    rows = re.search(r"nvcc of CUDA \|\n\|[-|]+\n((?:\|.*\n)+)", text)
    assert rows is not None
    told: dict[str, str] = {}
    for line in rows[1].splitlines():
        _, _, architectures, releases, _ = line.split("|")
        told |= {a.strip(): releases for a in architectures.split(";")}
    assert len(told) == 9
    for number, releases in told.items():
        assert "{}.{}".format(*FIRST_RELEASE[number]) in releases


def test_what_nobody_knows_is_left_to_nvcc() -> None:
    assert why_unfit(("150",), Nvcc("nvcc", (15, 0), frozenset())) is None
    assert why_unfit(("121",), Nvcc("nvcc", None, frozenset())) is None
