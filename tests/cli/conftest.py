"""The command line against a scripted daemon."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from meshd.cli.main import main
from tests.cli.scripted import Cli, Daemon, Result, listening


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with listening() as scripted:
        yield scripted


@pytest.fixture
def cli(daemon: Daemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("MESHD_DATA_DIR", str(daemon.data_dir))

    def call(*words: str) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as leave:
            main(list(words))
        said = capsys.readouterr()
        return Result(leave.value.code, said.out, said.err)

    return call
