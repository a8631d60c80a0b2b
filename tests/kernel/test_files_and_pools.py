"""Files that survive crashes, locks that do not, pools that are bounded, logs that parse."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from meshd.errors import DataDirectoryBusy
from meshd.kernel import DirectoryLock, Pool, write_atomic
from meshd.kernel.logs import configure_logging, model, request_id
from meshd.kernel.pool import PoolFull


def test_write_atomic_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_atomic(path, b"one")
    write_atomic(path, b"two", mode=0o640)
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_write_atomic_leaves_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    write_atomic(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_is_locked_by_one_process_until_it_dies(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from meshd.kernel import DirectoryLock\n"
        "lock = DirectoryLock(pathlib.Path(sys.argv[1])); print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(DataDirectoryBusy, match=f"pid {holder.pid}"):
            DirectoryLock(tmp_path)
        holder.kill()
    DirectoryLock(tmp_path).release()


async def test_a_pool_refuses_what_it_cannot_queue() -> None:
    pool = Pool("test", workers=1, backlog=1)
    release = threading.Event()
    try:
        calls = [asyncio.create_task(pool.run(release.wait, 5)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(PoolFull):
            await pool.run(int)
        release.set()
        assert await asyncio.gather(*calls) == [True, True]
        await asyncio.sleep(0)
        assert await pool.run(int, "12") == 12
    finally:
        release.set()
        pool.close()


async def test_a_pool_hands_exceptions_on_and_survives_cancelling() -> None:
    pool = Pool("test", workers=1, backlog=4)
    release = threading.Event()
    try:
        with pytest.raises(ValueError, match="invalid literal"):
            await pool.run(int, "x")
        call = asyncio.create_task(pool.run(release.wait, 5))
        await asyncio.sleep(0)
        call.cancel()
        release.set()
        assert await pool.run(int, "3") == 3
    finally:
        pool.close()


def test_json_logs_are_one_object_a_line_with_context(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = logging.getLogger().handlers[:]
    level = logging.getLogger().level
    try:
        for handler in before:
            logging.getLogger().removeHandler(handler)
        configure_logging("info", "json", tmp_path)
        tokens = (request_id.set("req-1"), model.set("m"))
        try:
            raise KeyError("broken\nline")
        except KeyError:
            logging.getLogger("x").exception("it %s", "failed")
        finally:
            request_id.reset(tokens[0])
            model.reset(tokens[1])
        logging.getLogger("x").debug("not shown")
        configure_logging("info", "text", None, journal=True)
        logging.getLogger("x").info("plain")
    finally:
        root = logging.getLogger()
        for handler in root.handlers[:]:
            root.removeHandler(handler)
            handler.close()
        for handler in before:
            root.addHandler(handler)
        root.setLevel(level)
        logging.raiseExceptions = True
    first, second = capfd.readouterr().err.splitlines()
    entry = json.loads(first)
    assert (entry["level"], entry["logger"], entry["message"]) == ("error", "x", "it failed")
    assert (entry["request_id"], entry["model"]) == ("req-1", "m")
    assert "KeyError" in entry["exception"]
    assert entry["time"].endswith("+00:00")
    assert second == "INFO    x: plain"
    assert json.loads((tmp_path / "meshd.log").read_text()) == entry
