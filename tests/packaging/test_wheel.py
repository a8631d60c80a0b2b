"""The wheel as the documentation makes and installs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

import meshd

ROOT = Path(__file__).parents[2]
LIMIT_S = 110.0


def run(script: str, cwd: Path, environ: Mapping[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=cwd,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def block(name: str) -> str:
    """The commands of that name in docs/install.md."""
    page = (ROOT / "docs" / "install.md").read_text()
    (found,) = re.findall(rf"<!-- {name}: .*? -->\n```sh\n(.*?)```", page, flags=re.DOTALL)
    return str(found)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dist")
    run(f"'{sys.executable}' -m pip wheel -q --no-deps -w '{directory}' .", ROOT, {})
    (path,) = directory.iterdir()
    return path


@pytest.mark.slow
def test_what_is_no_code_is_in_it_too(wheel: Path) -> None:
    tracked = run("git ls-files meshd", ROOT, {}).split()
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {path for path in tracked if not path.endswith(".py")} <= names
    for path in ("cache/catalog.json", "cli/units/system.service", "console/page.html", "py.typed"):
        assert f"meshd/{path}" in names
    assert not {name for name in names if name.startswith(("tests/", "bench/"))}
    (licence,) = (name for name in names if name.endswith("LICENSE"))
    assert ".dist-info/" in licence


@pytest.mark.slow
def test_the_documented_commands_make_and_install_it(tmp_path: Path) -> None:
    """`~` is a directory of the test. The dependencies, which pip would fetch, are those of this
    environment; meshd itself is not found there (an editable install is no directory on a path)."""
    dependencies = str(Path(psutil.__file__).parent.parent)
    make, install = block("wheel").split("\n", 1)
    run(make, ROOT, {"HOME": str(tmp_path)})
    settings = {"HOME": str(tmp_path), "PIP_NO_DEPS": "1", "PYTHONPATH": dependencies}
    said = run(install, ROOT, settings)
    assert meshd.__version__ in said
    (site,) = (tmp_path / "meshd").glob("lib/python3*/site-packages")
    python = tmp_path / "meshd" / "bin" / "python"
    place = run(f"'{python}' -c 'import meshd; print(meshd.__file__)'", tmp_path, settings)
    assert Path(place.strip()).is_relative_to(site)
