"""From the flags of `meshd run` to the configuration the node starts with."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshd import node
from meshd.cli.main import main
from meshd.config import Config, Loaded


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Config]:
    """The configurations of nodes that were started; none is."""
    configs: list[Config] = []

    def run(loaded: Loaded) -> int:
        configs.append(loaded.config)
        return 0

    monkeypatch.setattr(node, "run", run)
    monkeypatch.setenv("MESHD_DATA_DIR", str(tmp_path))
    return configs


def run(*flags: str) -> object:
    with pytest.raises(SystemExit) as left:
        main(["run", *flags])
    return left.value.code


def test_flags_of_a_mesh(started: list[Config]) -> None:
    code = run(
        *("--join", "home", "--join", "10.0.0.7:9338", "--mesh", "home", "--client", "--no-mdns"),
        *("--advertise", "a.example:1", "--advertise", "[fd00::1]:2"),
        *("--peer-listen", "[::]:9338"),
    )
    assert code == 0
    (config,) = started
    assert config.join == ("home", "10.0.0.7:9338")
    assert (config.mesh, config.client, config.mdns) == ("home", True, False)
    assert config.advertise == ("a.example:1", "[fd00::1]:2")
    assert config.peer_listen_address == ("::", 9338)


def test_flags_that_were_not_given_leave_the_environment_alone(
    started: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESHD_CLIENT", "true")
    monkeypatch.setenv("MESHD_MDNS", "false")
    monkeypatch.setenv("MESHD_JOIN", "home, 10.0.0.7:9338")
    monkeypatch.setenv("MESHD_ADVERTISE", "a.example:1")
    assert run() == 0
    (config,) = started
    assert (config.client, config.mdns) == (True, False)
    assert config.join == ("home", "10.0.0.7:9338")
    assert config.advertise == ("a.example:1",)


def test_flags_of_placement(started: list[Config]) -> None:
    flags = ("--auto", "--on-demand", "--idle-unload", "900", "--max-vram", "40GiB")
    assert run("--model", "builtin", *flags) == 0
    (config,) = started
    assert (config.model, config.auto, config.on_demand) == (("builtin",), True, True)
    assert (config.idle_unload_s, config.max_vram) == (900.0, "40GiB")


def test_placement_can_be_configured_without_flags(started: list[Config], tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        'auto = true\non_demand = true\nidle_unload_s = 60\nmax_vram = "8GB"\n'
    )
    assert run() == 0
    (config,) = started
    assert (config.auto, config.on_demand) == (True, True)
    assert (config.idle_unload_s, config.max_vram) == (60.0, "8GB")


def test_what_cannot_work_starts_nothing(started: list[Config]) -> None:
    assert run("--join", "meshd1-cutoff") == 78
    assert run("--mesh", "with space") == 78
    assert run("--peer-listen", "9338") == 78
    assert run("--join") == 2
    assert run("--idle-unload", "9") == 78
    assert run("--idle-unload", "soon") == 2
    assert run("--max-vram", "plenty") == 78
    assert started == []
