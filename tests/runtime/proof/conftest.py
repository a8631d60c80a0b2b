"""The compiled engines of these tests, made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.runtime.conftest import short_dir
from tests.runtime.proof.native import compile_engine

__all__ = ["short_dir"]


@pytest.fixture(scope="session")
def cpu_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _compiled(tmp_path_factory.mktemp("cpu"), "cpu")


@pytest.fixture(scope="session")
def cuda_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _compiled(tmp_path_factory.mktemp("cuda"), "cuda", "cpu")


def _compiled(directory: Path, *backends: str) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler: the engine cannot be a program of its own")
    compile_engine(directory, *backends)
    return directory
