"""Small pieces of the command line: sizes, durations, tails of logs, errors to exit codes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from meshd.cli.client import AdminClient, AdminRefused
from meshd.cli.logs import tail
from meshd.cli.main import main
from meshd.cli.options import duration, size
from meshd.errors import DaemonNotRunning
from tests.conftest import wait_until


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (123_456_789, "117.7 MiB"),
        (5 * 1024**4, "5.0 TiB"),
    ],
)
def test_sizes(count: int | None, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.9, "0s"), (59, "59s"), (61, "1m 1s"), (3725, "1h 2m"), (90_000, "1d 1h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_last_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("".join(f"line {n}\n" for n in range(10)))
    assert list(tail(path, 2, follow=False)) == ["line 8\n", "line 9\n"]
    assert list(tail(path, 0, follow=False)) == []


def test_following_goes_on_after_a_rotation(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("old\n")
    seen: list[str] = []

    def follow() -> None:
        for line in tail(path, 10, follow=True):
            seen.append(line)
            if line == "end\n":
                return

    reader = threading.Thread(target=follow)
    reader.start()
    wait_until(lambda: seen == ["old\n"], what="the first line")
    with path.open("a") as file:
        file.write("more\n")
    wait_until(lambda: seen[-1] == "more\n", what="a line that was added")
    path.rename(tmp_path / "x.log.1")
    path.write_text("new\nend\n")
    reader.join(10)
    assert seen == ["old\n", "more\n", "new\n", "end\n"]


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["version"], 0),
        (["--help"], 0),
        (["nonsense"], 2),
        (["load"], 2),
        (["status", "--data-dir", "/nonexistent/meshd"], 3),
        (["config", "show", "--config", "/nonexistent/c.toml"], 78),
        (["logs", "--data-dir", "/nonexistent/meshd"], 1),
    ],
)
def test_exit_codes(argv: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == code
    captured = capsys.readouterr()
    if code not in (0, 2):
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


def test_config_show_hides_secrets_and_names_origins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESHD_API_KEY", "very-secret")
    with pytest.raises(SystemExit):
        main(["config", "show"])
    out = capsys.readouterr().out
    assert "very-secret" not in out
    assert "api_key = '(set)'    # environment MESHD_API_KEY" in out
    assert "listen = '127.0.0.1:9337'\n" in out


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(DaemonNotRunning, match="meshd run"):
        AdminClient(tmp_path / "admin.sock").get("/status")


def test_a_refusal_without_shape_is_still_words() -> None:
    assert AdminRefused(None, 500).message == "the daemon answered 500"
    assert AdminRefused({"error": {"message": "no"}}, 400).message == "no"
