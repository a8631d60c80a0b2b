"""A real llama-server on two real RPC servers of this machine, under `ModelHost`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from meshd.runtime import prober
from meshd.runtime.hosting_events import LoadOptions
from meshd.view import ModelState
from tests.conftest import wait_until
from tests.models import small_model
from tests.runtime.conftest import wait_for
from tests.runtime.house import House
from tests.runtime.lender import PLAN, FakeLender

pytestmark = pytest.mark.engine

SPLIT = LoadOptions(context=512, parallel=1, split=PLAN)
LOST = "worker c was lost: its rpc-server ended"


class RpcServer:
    """A ggml-rpc-server on the CPU, at a free port."""

    def __init__(self, engine_dir: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self._port = taken.getsockname()[1]
        where = ("-H", "127.0.0.1", "-p", str(self._port))
        program = engine_dir / "ggml-rpc-server"
        self.process = subprocess.Popen(
            [program, *where, "-d", "CPU", "-t", "1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self._port}"

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def servers(engine_dir: Path) -> Iterator[list[RpcServer]]:
    servers = [RpcServer(engine_dir) for _ in PLAN.parts]
    try:
        for server in servers:
            wait_until(server.listens, what="an RPC server listens")
        yield servers
    finally:
        for server in servers:
            server.end()


@pytest.fixture
async def lender(servers: list[RpcServer]) -> FakeLender:
    return FakeLender(tuple(server.endpoint for server in servers))


@pytest.fixture
async def house(short_dir: Path, engine_dir: Path, lender: FakeLender) -> AsyncIterator[House]:
    weights = small_model(short_dir / "m.gguf")
    server = engine_dir / "llama-server"
    house = House(short_dir, lender=lender, server=server, weights=weights)
    await house.start()
    yield house
    await house.stop()


def engines() -> list[int]:
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if child.name() == "llama-server"]


async def answer(house: House, tokens: int = 8) -> str | None:
    """Greedy; None if none came."""
    assert house.view is not None
    path = house.view.targets[0].socket_path
    asked = {"prompt": "1 2 3", "n_predict": tokens, "temperature": 0.0, "ignore_eos": True}
    found = await prober._ask(path, "POST", "/completion", json.dumps(asked).encode(), 20.0)
    if found is None:
        return None
    assert found.status == 200
    return str(found.json()["content"])


async def test_a_split_model_answers_as_it_does_alone(house: House) -> None:
    house.host.load("m.gguf", SPLIT)
    ready = await house.until(ModelState.READY)
    (host,) = ready.hosts
    assert [(w.name, w.bytes) for w in host.workers] == [("b", 1 << 20), ("c", 2 << 20)]
    taken = house.host.taken(ready.id)
    assert taken is not None
    assert set(taken.devices) == {"CPU"}
    split = await answer(house)
    assert split
    house.host.unload("m", 5.0)
    await wait_for(lambda: house.view is None, "gone")
    house.host.load("m.gguf", LoadOptions(context=512, parallel=1))
    await house.until(ModelState.READY)
    assert split == await answer(house)


async def test_layers_lie_where_the_plan_says(
    house: House, lender: FakeLender, short_dir: Path
) -> None:
    house.host.load("m.gguf", SPLIT)
    await house.until(ModelState.READY)
    log = (short_dir / "logs" / "m.log").read_text()
    for endpoint in lender.endpoints:
        assert f"RPC0[{endpoint}] KV buffer size" in log
    assert "offloaded 3/3 layers" in log
    order = [log.index(f"using device RPC{n} ({e})") for n, e in enumerate(lender.endpoints)]
    assert order == sorted(order)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_the_loss_of_an_rpc_server_ends_all(
    house: House,
    lender: FakeLender,
    servers: list[RpcServer],
    short_dir: Path,
    how: signal.Signals,
) -> None:
    """One that says nothing any more leaves the engine hanging in a read."""
    house.host.load("m.gguf", SPLIT)
    await house.until(ModelState.READY)
    (engine,) = engines()
    os.kill(servers[1].process.pid, how)
    log = short_dir / "logs" / "m.log"
    lines = log.read_text().count("processing task")
    asking = asyncio.create_task(answer(house))
    await wait_for(lambda: log.read_text().count("processing task") > lines, "its work")
    began = time.monotonic()
    lender.lost(LOST)
    failed = await house.until(ModelState.FAILED)
    assert (failed.reason, failed.targets) == (LOST, ())
    await wait_for(lambda: not psutil.pid_exists(engine), "the end of the engine")
    await wait_for(lambda: lender.ended, "giving back")
    assert await asking is None
    assert time.monotonic() - began < 2.0
    house.host.unload("m", 0.0)
    await wait_for(lambda: house.view is None, "gone")
    assert (lender.ended, engines()) == ([LOST], [])


async def test_an_engine_that_aborts_first_is_told_by_its_lost_worker(
    house: House, lender: FakeLender, servers: list[RpcServer]
) -> None:
    house.host.load("m.gguf", SPLIT)
    await house.until(ModelState.READY)
    servers[1].end()
    assert await answer(house, tokens=1) is None
    aborted = await house.until(ModelState.LOADING)
    assert (aborted.reason, aborted.targets) == ("a worker's rpc-server went away", ())
    lender.lost(LOST)
    failed = await house.until(ModelState.FAILED)
    assert failed.reason == LOST
    assert any("Remote RPC server crashed" in line for line in failed.evidence)
    assert failed.hosts[0].workers == tuple(part.shown for part in PLAN.parts)


async def test_servers_that_are_gone_before_the_start_are_the_reason(
    house: House, lender: FakeLender, servers: list[RpcServer]
) -> None:
    servers[0].end()
    house.host.load("m.gguf", SPLIT)
    failed = await house.until(ModelState.FAILED)
    assert failed.reason == "a worker's rpc-server does not answer"
    await wait_for(lambda: lender.ended, "giving back")
    assert house.host.restarts == 0
