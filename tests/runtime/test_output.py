"""What an engine printed: lines, the ring, the file and a disk that is full."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.runtime.output import (
    BACKUPS,
    LINE_BYTES,
    REOPEN_S,
    RING_LINES,
    LineSplitter,
    OutputLog,
)

LIMIT = 64 * 1024


@given(
    lines=st.lists(st.text(st.characters(exclude_characters="\r\n"), max_size=40)), data=st.data()
)
def test_lines_are_the_same_however_they_come(lines: list[str], data: st.DataObject) -> None:
    raw = "".join(f"{line}\n" for line in lines).encode(errors="replace")
    splitter, got = LineSplitter(), []
    while raw:
        size = data.draw(st.integers(1, len(raw)))
        got += splitter.feed(raw[:size])
        raw = raw[size:]
    got += splitter.end()
    assert got == [line.encode(errors="replace").decode() for line in lines]


def test_a_line_without_end_is_cut_and_not_kept() -> None:
    splitter = LineSplitter()
    parts = [part for _ in range(10) for part in splitter.feed(b"x" * LINE_BYTES)]
    assert len(splitter._rest) <= LINE_BYTES
    parts += splitter.end()
    assert "".join(parts) == "x" * LINE_BYTES * 10
    assert {len(p) for p in parts} == {LINE_BYTES}


def test_carriage_returns_and_odd_bytes() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"a\r\n\xff\xfe\n\n") == ["a", "\ufffd\ufffd", ""]
    assert splitter.feed(b"rest") == []
    assert splitter.end() == ["rest"]
    assert splitter.end() == []


def test_the_ring_holds_the_last_lines(tmp_path: Path) -> None:
    output = OutputLog(tmp_path / "m.log", limit_bytes=LIMIT)
    for number in range(RING_LINES + 5):
        output.add(f"line {number}", 0.0)
    assert output.last(2) == (f"line {RING_LINES + 3}", f"line {RING_LINES + 4}")
    assert output.last(RING_LINES + 99)[0] == "line 5"
    assert output.last(0) == ()
    output.close()


def test_the_file_has_times_and_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "m.log"
    for text in ("über", "zwei"):
        output = OutputLog(path, limit_bytes=LIMIT)
        output.add(text, 1_700_000_000.5)
        output.close()
    assert path.read_text(encoding="utf-8").splitlines() == [
        "2023-11-14T22:13:20.500+00:00 über",
        "2023-11-14T22:13:20.500+00:00 zwei",
    ]


def test_a_line_is_on_disk_at_once(tmp_path: Path) -> None:
    output = OutputLog(tmp_path / "m.log", limit_bytes=LIMIT)
    output.add("now", 0.0)
    assert output.path.read_bytes().endswith(b" now\n")
    output.close()


def test_files_are_rotated_and_few(tmp_path: Path) -> None:
    output = OutputLog(tmp_path / "m.log", limit_bytes=LIMIT)
    line = "ü" * 500
    for number in range(600):
        output.add(f"{number} {line}", 0.0)
    output.close()
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["m.log", *(f"m.log.{n}" for n in range(1, BACKUPS + 1))]
    assert all(p.stat().st_size < LIMIT + LINE_BYTES for p in tmp_path.iterdir())
    newest = output.path.read_text(encoding="utf-8").splitlines()
    assert newest[-1].split()[1] == "599"
    last_rotated = (tmp_path / "m.log.1").read_text(encoding="utf-8").splitlines()[-1]
    assert int(newest[0].split()[1]) == int(last_rotated.split()[1]) + 1


def test_a_full_disk_costs_lines_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "m.log"
    path.symlink_to("/dev/full")
    output = OutputLog(path, limit_bytes=LIMIT)
    with caplog.at_level(logging.WARNING):
        for number in range(5):
            output.add(f"line {number}", 100.0 + number)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "No space left" in caplog.text
    assert output.last(1) == ("line 4",)

    path.unlink()  # there is room again
    output.add("too early", 101.0 + REOPEN_S - 0.5)
    output.add("again", 101.0 + REOPEN_S)
    assert path.read_text().splitlines()[0].endswith(" again")
    output.close()


def test_a_directory_that_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    output = OutputLog(tmp_path / "file" / "m.log", limit_bytes=LIMIT)
    output.add("x", 0.0)
    assert output.last(1) == ("x",)
    assert "cannot be written" in caplog.text
    output.close()


def test_nothing_is_written_after_the_end(tmp_path: Path) -> None:
    output = OutputLog(tmp_path / "m.log", limit_bytes=LIMIT)
    output.close()
    output.add("late", 0.0)
    output.add("later", 1000.0)
    assert output.path.read_bytes() == b""
    assert output.last(1) == ("later",)
