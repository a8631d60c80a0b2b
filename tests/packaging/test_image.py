"""The image's files against each other and against meshd; no Docker is needed.

The steps themselves run in `make arm64-test`; those that need no privileges also here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # types would be another dependency for one file

import meshd
from meshd.cli.service_unit import unit_text
from meshd.config import known_keys
from tests.runtime.fake_engine import program

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile.cuda-arm64"
IMAGE = ROOT / "packaging" / "image"
COMPOSE = ROOT / "packaging" / "compose.yaml"


def instructions() -> list[tuple[str, str]]:
    """(instruction, its words) of the Dockerfile, lines joined, comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [(word, rest) for word, rest in pairs]


def last_stage() -> list[tuple[str, str]]:
    found = instructions()
    start = max(index for index, (word, _) in enumerate(found) if word == "FROM")
    return found[start:]


def environment() -> dict[str, str]:
    """ENV of the image."""
    (words,) = (rest for word, rest in last_stage() if word == "ENV")
    return dict(pair.split("=", 1) for pair in shlex.split(words))


def test_each_step_is_a_script_of_the_repository() -> None:
    steps = [rest for word, rest in instructions() if word == "RUN"]
    called = [command.split()[0] for step in steps for command in step.split(" && ")]
    assert len(called) == 6
    for path in called:
        script = IMAGE / Path(path).name
        assert os.access(script, os.X_OK), path


def test_the_emulated_check_runs_every_step_of_the_image() -> None:
    text = "".join((ROOT / "scripts" / "arm64" / n).read_text() for n in ("check.sh", "stages.sh"))
    assert {p.name for p in IMAGE.iterdir() if p.name not in text} == set()


def test_what_is_copied_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    assert "*" in ignored
    copied = [rest.split()[:-1] for word, rest in instructions() if word == "COPY"]
    sources = {s for words in copied if not words[0].startswith("--from") for s in words} - {"."}
    for source in sources:
        assert (ROOT / source).exists()
        assert any(source == k or source.startswith(f"{k}/") for k in kept), source
    assert all((ROOT / path).exists() for path in kept)


def test_the_version_is_that_of_meshd() -> None:
    given = [rest for word, rest in instructions() if rest.startswith("MESHD_VERSION=")]
    assert given == [f"MESHD_VERSION={meshd.__version__}"] * 2


def test_the_image_ends_as_a_user_with_an_entry_a_health_check_and_volumes() -> None:
    stage = dict(last_stage())  # the last of each instruction
    owner = next(n for n in re.findall(r"user\.sh (\d+)", DOCKERFILE.read_text()))
    assert stage["USER"] == f"{owner}:{owner}"
    assert int(owner) > 0
    assert json.loads(stage["VOLUME"]) == ["/var/lib/meshd", "/var/cache/meshd"]
    assert stage["EXPOSE"] == "9337 9338"
    assert json.loads(stage["ENTRYPOINT"]) == ["tini", "--", "/opt/meshd/entrypoint.sh"]
    check = stage["HEALTHCHECK"].partition("CMD ")[2]
    assert json.loads(check) == ["meshd", "status", "--json"]


def test_a_gpu_is_required_and_the_directories_are_the_services() -> None:
    env = environment()
    assert env["MESHD_REQUIRE_GPU"] == "true"
    unit = unit_text("system", ("meshd",), ())
    for name in ("XDG_CACHE_HOME", "HF_HOME", "CUDA_CACHE_PATH"):
        assert f"{name}={env[name].replace('/var/cache', '%C')}" in unit


def test_the_compose_file_starts_two_nodes_that_get_into_nobodys_way() -> None:
    compose: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    first, second = compose["services"]["first"], compose["services"]["second"]
    for node in (first, second):
        assert node["environment"]["MESHD_LISTEN"].startswith("127.0.0.1:")
        (device,) = node["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        mounted = {v.split(":")[1] for v in node["volumes"]}
        assert mounted == {"/var/lib/meshd", "/var/cache/meshd"}
        assert {v.split(":")[0] for v in node["volumes"]} <= set(compose["volumes"])
        keys = {k.removeprefix("MESHD_").lower() for k in node["environment"] if "MESHD" in k}
        assert keys <= set(known_keys())
    assert not set(first["volumes"]) & set(second["volumes"])
    for setting in ("MESHD_LISTEN", "MESHD_PEER_LISTEN", "MESHD_NAME"):
        assert first["environment"].get(setting) != second["environment"].get(setting)
    assert (COMPOSE.parent / first["build"]["context"]).resolve() == ROOT
    assert (ROOT / first["build"]["dockerfile"]).is_file()


def test_the_engines_of_the_image_are_shown_and_older_ones_are_not(tmp_path: Path) -> None:
    cache, engines = tmp_path / "a cache", tmp_path / "runtimes"
    shown = cache / "meshd" / "runtimes"
    (engines / "cuda-1").mkdir(parents=True)
    (shown / "cpu-own").mkdir(parents=True)
    (shown / "cuda-0").symlink_to(engines / "cuda-0")  # of an image that is gone
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin" / "meshd", f'echo "$@" > "{tmp_path}/words"\n')
    env = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "XDG_CACHE_HOME": str(cache),
        "ENGINES": str(engines),
    }
    for _ in range(2):  # a container starts again
        subprocess.run([IMAGE / "entrypoint.sh", "run", "--auto"], env=env, check=True, timeout=10)
        assert (tmp_path / "words").read_text() == "run --auto\n"
        assert {path.name for path in shown.iterdir()} == {"cuda-1", "cpu-own"}
        assert (shown / "cuda-1").resolve() == engines / "cuda-1"


def test_an_image_without_an_engine_still_starts(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin" / "meshd", "exit 0\n")
    env = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "XDG_CACHE_HOME": str(tmp_path),
        "ENGINES": str(tmp_path / "none"),
    }
    subprocess.run([IMAGE / "entrypoint.sh"], env=env, check=True, timeout=10)
    assert list((tmp_path / "meshd" / "runtimes").iterdir()) == []


def test_a_stage_that_does_not_exist_is_refused() -> None:
    done = subprocess.run([IMAGE / "packages.sh", "other"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no stage is called other" in done.stderr


@pytest.mark.parametrize("script", sorted(p.name for p in IMAGE.iterdir()))
def test_scripts_stop_at_the_first_mistake(script: str) -> None:
    text = (IMAGE / script).read_text()
    assert text.startswith("#!/bin/sh\n")
    assert "\nset -eu\n" in text
