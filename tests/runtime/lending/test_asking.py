"""An RPC server that was not built here is asked what it speaks, and nothing of it is left."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from meshd.runtime.lending import rpc_words
from meshd.runtime.lending.asking import ask_protocol
from tests.runtime.processes import ended


def script(directory: Path, body: str) -> Path:
    path = directory / "ggml-rpc-server"
    path.write_text(f"#!/bin/sh\necho $$ > {directory}/pid\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.mark.engine
def test_a_real_one_says_what_it_speaks(engine_dir: Path) -> None:
    before = set(psutil.Process().children())
    assert ask_protocol(engine_dir / "ggml-rpc-server") == rpc_words.PROTOCOL
    assert set(psutil.Process().children()) <= before


@pytest.mark.parametrize("binary", ["nothing", "."])
def test_one_that_cannot_be_executed_says_nothing(tmp_path: Path, binary: str) -> None:
    assert ask_protocol(tmp_path / binary) is None


def test_one_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    began = time.monotonic()
    assert ask_protocol(script(tmp_path, "exit 1"), limit_s=60.0) is None
    assert time.monotonic() - began < 30.0


def test_one_that_never_listens_is_ended(tmp_path: Path) -> None:
    assert ask_protocol(script(tmp_path, "exec sleep 60"), limit_s=1.0) is None
    assert ended(int((tmp_path / "pid").read_text()))


def test_it_is_told_to_listen_on_the_loopback_address_only(tmp_path: Path) -> None:
    binary = script(tmp_path, f'echo "$@" > {tmp_path}/said')
    assert ask_protocol(binary) is None
    words = (tmp_path / "said").read_text().split()
    assert words[:3] == ["-H", "127.0.0.1", "-p"]
    assert words[3].isdigit()
    assert len(words) == 4


def test_one_that_speaks_nonsense_says_nothing(tmp_path: Path) -> None:
    listens = (
        "exec python3 -c 'import socket, sys; s = socket.create_server((sys.argv[2], "
        'int(sys.argv[4])))\nwhile True: c, _ = s.accept(); c.sendall(b"x" * 64); c.close()\' "$@"'
    )
    assert ask_protocol(script(tmp_path, listens), limit_s=3.0) is None
    assert ended(int((tmp_path / "pid").read_text()))
