"""docs/install.md says nothing that is not run somewhere, or says why it is not."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from meshd.cli.main import COMMANDS, commands
from meshd.config import known_keys

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "install.md").read_text()
BLOCKS = re.findall(r"(?:<!-- (\w+): (.*?) -->\n)?```sh\n(.*?)```", PAGE, flags=re.DOTALL)
"""(name, who runs it, commands) of each block."""


@pytest.mark.parametrize(("name", "by", "commands"), BLOCKS)
def test_each_block_says_who_runs_it(name: str, by: str, commands: str) -> None:
    assert name, f"nothing is said of who runs\n{commands}"
    match = re.fullmatch(r"run by (\S+)|not run, wants .+; .+ run by (\S+)", by)
    assert match, by
    runner = ROOT / (match[1] or match[2])
    assert runner.exists()
    if match[1] and runner.suffix == ".py":
        assert f'"{name}"' in runner.read_text(), f"{runner} does not run the block {name}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    code = "".join(block for _, _, block in BLOCKS)
    said = re.findall(r"(?:^|sudo )make ([a-z0-9 -]+)", code, flags=re.MULTILINE)
    targets = {target for words in said for target in words.split()}
    assert targets == {"venv", "engine", "wheel", "arm64-test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_meshd_commands_and_settings_exist() -> None:
    used = re.findall(r"meshd meshd ([a-z]+)|(?:first|bin/)(?: ?meshd) ([a-z]+)", PAGE)
    names = {a or b for a, b in used}
    assert {"gpus", "load", "status", "invite", "peers", "run"} <= names
    context = click.Context(commands)
    for name in names:
        assert name in COMMANDS
        assert commands.get_command(context, name) is not None
    settings = set(re.findall(r"MESHD_([A-Z_]+[A-Z])\b", PAGE)) - {"VERSION", "DATA_DIR"}
    assert {setting.lower() for setting in settings} <= set(known_keys())


def test_packages_named_are_those_the_scripts_install() -> None:
    script = (ROOT / "scripts" / "system-packages.sh").read_text()
    (debian,) = re.findall(r"`sudo apt install ([a-z0-9+ -]+)`", PAGE)
    for package in debian.split():
        assert package in script, package


def test_build_arguments_and_their_defaults_are_those_of_the_image() -> None:
    dockerfile = (ROOT / "Dockerfile.cuda-arm64").read_text()
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)$", dockerfile, flags=re.MULTILINE))
    rows = re.findall(r"^\| (`[A-Z_`, ]+`) \| ([^|]+) \|", PAGE, flags=re.MULTILINE)
    said: dict[str, str] = {}
    for names, values in rows:
        said |= dict(zip(re.findall(r"\w+", names), values.split(", "), strict=True))
    assert set(said) == set(defaults)
    for name, value in said.items():
        if name != "MESHD_VERSION":
            assert value.strip(" `") == defaults[name]
