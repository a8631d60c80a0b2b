"""The failure this project exists to end, and what happens instead.

A download of a model in four shards was interrupted in the third. A node is asked for the model:
it says what is wrong, mends exactly that, and answers. If it cannot be mended, no engine is
started, and the reason says which shard, where, what was expected and found, and what to do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from meshd.cache.builtin import write_model
from meshd.cache.chunks import CHUNK_BYTES
from meshd.cache.transfer.header_reading import LATER_FIRST_BYTES
from meshd.cache.verdict import exact_size
from tests.conftest import wait_until
from tests.hub import LocalHub, Slow
from tests.models import split_model
from tests.node.conftest import Daemon, DaemonFactory

pytestmark = [pytest.mark.engine, pytest.mark.slow]

REPO = "owner/four-GGUF"
REF = f"{REPO}:F16"
MODEL = "four-F16"
THIRD = "*-00003-of-00004.gguf"
COMMAND_LIMIT_S = 60.0


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, engine_dir: Path) -> list[Path]:
    """Four of some 10 MB: three chunks each."""
    whole = tmp_path_factory.mktemp("four") / "four-F16.gguf"
    write_model(whole, layers=8, width=512, feed_forward=1024, name="four")
    shards = split_model(whole, engine_dir, tensors_per_shard=19)
    assert len(shards) == 4
    return shards


@pytest.fixture
def hub(shards: list[Path]) -> Iterator[LocalHub]:
    with LocalHub() as hub:
        hub.add(REPO, {path.name: path for path in shards})
        yield hub


class Machine:
    """A Hugging Face cache, the programs that use it, and what a daemon on it says."""

    def __init__(self, home: Path, data_dir: Path, hub: LocalHub) -> None:
        self.data_dir = data_dir
        self.environment = hub.environment(home) | {"XDG_CACHE_HOME": str(home / "cache")}
        self.blobs = home / "hub" / "models--owner--four-GGUF" / "blobs"
        self._hub = hub

    def meshd(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "meshd", *words, "--data-dir", str(self.data_dir)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_LIMIT_S,
        )

    def interrupt_in_third(self, command: list[str]) -> None:
        """Run a download, and kill -9 it when some of the third shard, and all else, is there."""
        self._hub.faults.add(THIRD, Slow(bytes_per_s=2e6), times=None)
        with subprocess.Popen(
            command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as download:
            wait_until(lambda: len(self.whole_blobs()) == 3, what="three shards")
            self._hub.wait_sent(THIRD, CHUNK_BYTES + 2_000_000)
            children = psutil.Process(download.pid).children(recursive=True)
            download.kill()
            download.wait()
        wait_until(lambda: not any(c.is_running() for c in children), what="its children gone")
        assert len(self.whole_blobs()) == 3
        self._hub.wait_idle()
        self._hub.faults.clear()
        self._hub.forget_requests()

    def whole_blobs(self) -> list[Path]:
        try:
            return [path for path in self.blobs.iterdir() if "." not in path.name]
        except FileNotFoundError:
            return []


@pytest.fixture
def machine(tmp_path: Path, short_dir: Path, hub: LocalHub) -> Machine:
    return Machine(tmp_path / "home", short_dir / "n0", hub)


Interruption = Callable[[Machine], list[str]]


@pytest.mark.parametrize(
    ("command", "resumes"),
    [
        pytest.param(
            lambda m: [
                *(sys.executable, "-m", "meshd", "cache", "pull", REF),
                *("--data-dir", str(m.data_dir)),
            ],
            1_000_000,  # at least the last chunk, which is smaller, was there
            id="meshd",
        ),
        pytest.param(
            lambda _: [str(Path(sys.executable).with_name("hf")), "download", REPO],
            0,  # it writes in larger blocks
            id="hf",
        ),
    ],
)
def test_an_interrupted_download_is_mended_and_serves(
    make_daemon: DaemonFactory,
    machine: Machine,
    hub: LocalHub,
    shards: list[Path],
    command: Interruption,
    resumes: int,
) -> None:
    machine.interrupt_in_third(command(machine))
    daemon = make_daemon("--no-mdns", data_dir=machine.data_dir, **machine.environment).start()
    hub.faults.add(THIRD, Slow(bytes_per_s=5e6), times=None)  # to see it while it is mended

    asked = machine.meshd("load", "--no-wait", REF)
    assert asked.returncode == 0, asked.stderr
    seen: dict[str, Any] = {}

    def is_mended() -> bool:
        seen.update(daemon.model(MODEL))
        return bool(seen["state"] == "fetching" and seen["progress"])

    wait_until(is_mended, what="fetching")
    assert 0 < seen["progress"] < 1
    assert 0 < seen["fetch"]["done_bytes"] < seen["fetch"]["total_bytes"]
    assert seen["reason"]
    assert "\n" not in seen["reason"]
    status, _, body = _chat(daemon)
    assert (status, json.loads(body)["error"]["meshd"]["state"]) == (503, "fetching")

    loaded = machine.meshd("load", REF)
    assert (loaded.returncode, loaded.stdout.strip()) == (0, f"{MODEL} is ready"), loaded.stderr
    status, _, body = _chat(daemon)
    assert status == 200, body
    assert json.loads(body)["choices"][0]["message"]["content"]
    assert daemon.model(MODEL)["fetch"] is None

    hub.wait_idle()
    fetched = {request.subject for request in hub.content_requests()}
    assert fetched == {shards[2].name}  # nothing that was there is fetched again
    # Its header may be read before, to know what it takes.
    assert hub.sent() <= shards[2].stat().st_size - resumes + LATER_FIRST_BYTES
    assert sorted(path.stat().st_size for path in machine.whole_blobs()) == sorted(
        shard.stat().st_size for shard in shards
    )
    assert daemon.stop() == 0
    _in_order(
        [line for line in daemon.stderr().splitlines() if MODEL in line],
        f"shard 00003-of-00004 {machine.blobs.parent}",
        "the weights are whole",
        f"engine of {MODEL} is ready",
    )


def test_what_cannot_be_mended_fails_with_all_that_helps(
    make_daemon: DaemonFactory, machine: Machine, hub: LocalHub, shards: list[Path]
) -> None:
    pulled = machine.meshd("cache", "pull", REF)
    assert pulled.returncode == 0, pulled.stderr
    third = _blob_of(machine, shards[2])
    size = third.stat().st_size
    os.truncate(third, size // 2)
    hub.close()  # and there are no peers
    daemon = make_daemon("--no-mdns", data_dir=machine.data_dir, **machine.environment).start()

    loaded = machine.meshd("load", REF)
    assert loaded.returncode == 1
    reason = daemon.model(MODEL)["reason"]
    assert daemon.model(MODEL)["state"] == "failed"
    assert reason in loaded.stderr
    for part in (
        "shard 00003-of-00004",
        str(machine.blobs.parent / "snapshots"),
        shards[2].name,
        f"expected {exact_size(size)}",
        f"found {exact_size(size // 2)}",
        f"`meshd cache repair {REF}`",
    ):
        assert part in reason
    assert "\n" not in reason
    status, _, body = _chat(daemon)
    assert status == 503
    assert "shard 00003-of-00004" in json.loads(body)["error"]["message"]
    assert daemon.engines() == []
    # What is right of it is kept, under whichever name, until there is a replacement.
    kept = shards[2].read_bytes()[:CHUNK_BYTES]
    assert any(path.read_bytes().startswith(kept) for path in machine.blobs.glob(f"{third.name}*"))
    assert daemon.stop() == 0
    _in_order(
        [line for line in daemon.stderr().splitlines() if MODEL in line],
        f"model {MODEL}: shard 00003-of-00004",
        f"model {MODEL} cannot be loaded: shard 00003-of-00004",
    )


def _blob_of(machine: Machine, shard: Path) -> Path:
    (link,) = (machine.blobs.parent / "snapshots").rglob(shard.name)
    return link.resolve()


def _chat(daemon: Daemon) -> tuple[int, dict[str, str], bytes]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    return daemon.request("POST", "/v1/chat/completions", body)


def _in_order(lines: list[str], *parts: str) -> None:
    """Each of `parts` stands in a line of its own, in that order."""
    left = iter(lines)
    for part in parts:
        assert any(part in line for line in left), f"{part!r} not in order in {lines}"
