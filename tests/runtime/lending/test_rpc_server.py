"""RPC servers: real ones, and scripts in their place that go wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from meshd.errors import ModelFailed, UpstreamFailed
from meshd.runtime.lending import ports, rpc_server, rpc_words
from meshd.runtime.lending.rpc_client import probe
from meshd.runtime.lending.rpc_server import RpcServer, rpc_argv
from meshd.runtime.orphans import end_orphans
from meshd.runtime.supervisor import EnginePlaces
from tests.runtime.conftest import wait_for
from tests.runtime.lending.conftest import Start, spec_of
from tests.runtime.processes import ended


def script(directory: Path, body: str) -> Path:
    path = directory / "rpc-server"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


async def failure(binary: Path, places: EnginePlaces) -> str:
    with pytest.raises(ModelFailed) as caught:
        await RpcServer.start(
            spec_of(binary), places=places, log_bytes=65_536, on_exit=lambda _: pytest.fail("told")
        )
    assert list(places.run_dir.iterdir()) == []
    return caught.value.message


def test_the_command_line() -> None:
    spec = spec_of(Path("/e/rpc-server"))
    assert rpc_argv(spec, 7) == (
        *("/e/rpc-server", "-H", "127.0.0.1", "-p", "7", "-d", "CPU", "-t", "1"),
    )


async def test_one_that_ends_says_why(places: EnginePlaces, tmp_path: Path) -> None:
    binary = script(tmp_path, "echo error: unknown device: CUDA7; exit 1")
    message = await failure(binary, places)
    assert "ended with status 1; its last words: error: unknown device: CUDA7" in message
    assert "unknown device" in (places.log_dir / "rpc-m.log").read_text()


async def test_one_that_is_not_there(places: EnginePlaces, tmp_path: Path) -> None:
    assert "cannot be executed" in await failure(tmp_path / "nothing", places)


async def test_a_port_that_is_always_taken(places: EnginePlaces, tmp_path: Path) -> None:
    binary = script(tmp_path, f'echo "$4" >> {tmp_path}/ports; echo {rpc_server.PORT_TAKEN}')
    assert "found no port to listen on, 5 times" in await failure(binary, places)
    assert len((tmp_path / "ports").read_text().split()) == 5


async def test_one_that_never_listens_is_ended(
    places: EnginePlaces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc_server, "START_LIMIT_S", 1.5)
    binary = script(tmp_path, f"echo $$ > {tmp_path}/pid; echo thinking; exec sleep 60")
    assert "did not listen within 1.5 s; its last words: thinking" in await failure(binary, places)
    assert ended(int((tmp_path / "pid").read_text()))


async def test_a_start_that_is_cancelled_leaves_nothing(
    places: EnginePlaces, tmp_path: Path
) -> None:
    binary = script(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 60")
    starting = asyncio.create_task(failure(binary, places))
    await wait_for((tmp_path / "pid").exists, "the script runs")
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert list(places.run_dir.iterdir()) == []


@pytest.mark.engine
async def test_a_server_is_proved_and_ended(start: Start, places: EnginePlaces) -> None:
    told: list[str] = []
    server = await start(on_exit=told.append)
    assert ports.listens(server.pid, server.port) is True
    await probe(server.endpoint, "7.0.0")
    assert server.strangers() == frozenset()
    assert [path.name for path in places.run_dir.iterdir()] == [f"{server.spec.loan}.pid"]
    began = time.monotonic()
    assert await server.stop() is True
    assert time.monotonic() - began < rpc_server.END_LIMIT_S
    assert not psutil.pid_exists(server.pid)
    assert await server.stop() is True
    assert told == []
    assert list(places.run_dir.iterdir()) == []


@pytest.mark.engine
async def test_its_environment(start: Start, tmp_path: Path) -> None:
    server = await start(cache_dir=tmp_path / "cache")
    environment = psutil.Process(server.pid).environ()
    assert environment["LLAMA_CACHE"] == str(tmp_path / "cache")
    assert environment["GGML_RPC_NO_RDMA"] == "1"
    assert (tmp_path / "cache" / "rpc").is_dir()


@pytest.mark.engine
async def test_one_that_is_killed_is_told_of_once(start: Start) -> None:
    told: list[str] = []
    server = await start(on_exit=told.append)
    os.kill(server.pid, signal.SIGKILL)
    await wait_for(lambda: told, "the exit is told")
    assert await server.stop() is False
    assert told == ["the rpc-server of m ended with status -9"]


@pytest.mark.engine
async def test_one_that_serves_somebody_is_not_at_rest(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc_server, "REST_LIMIT_S", 0.05)
    server = await start()
    with socket.create_connection((ports.LOOPBACK, server.port)):
        served = rpc_server.SERVES
        await wait_for(lambda: _count(server, served) == 2, "it serves, after the probe")
        assert await server.stop() is False
    assert not psutil.pid_exists(server.pid)


@pytest.mark.engine
async def test_a_stop_waits_a_moment_for_whoever_is_leaving(start: Start) -> None:
    server = await start()
    with socket.create_connection((ports.LOOPBACK, server.port)):
        await wait_for(lambda: _count(server, rpc_server.SERVES) == 2, "it serves")
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0)
        assert not stopping.done()
    assert await stopping is True


@pytest.mark.engine
async def test_whoever_waits_for_his_turn_does_not_get_it_if_it_is_stopped_at_once(
    start: Start,
) -> None:
    server = await start()
    here = ports.LOOPBACK, server.port
    with socket.create_connection(here) as served, socket.create_connection(here) as next_one:
        await wait_for(lambda: _count(server, rpc_server.SERVES) == 2, "it serves the first")
        next_one.sendall(rpc_words.hello())
        stopping = asyncio.create_task(server.stop(at_once=True))
        await asyncio.sleep(0)
        served.close()
        assert await stopping is False
        with pytest.raises(ConnectionResetError):
            next_one.recv(1)


@pytest.mark.engine
async def test_a_stop_that_is_cancelled_has_killed_it(start: Start) -> None:
    exited: list[str] = []
    server = await start(on_exit=exited.append)
    with socket.create_connection((ports.LOOPBACK, server.port)):
        await wait_for(lambda: _count(server, rpc_server.SERVES) == 2, "it serves")
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        await wait_for(lambda: ended(server.pid), "it is gone")
    assert await server.stop() is False
    assert exited == []


def _count(server: RpcServer, words: str) -> int:
    return sum(words in line for line in server.evidence())


@pytest.mark.engine
async def test_another_port_is_chosen_if_somebody_was_faster(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server((ports.LOOPBACK, 0)) as somebody:
        taken = somebody.getsockname()[1]
        chosen = iter([taken, taken])
        free_port = ports.free_port
        monkeypatch.setattr(ports, "free_port", lambda: next(chosen, None) or free_port())
        server = await start()
        assert server.port != taken
        assert next(chosen, None) is None  # it was tried


@pytest.mark.engine
async def test_another_protocol_is_refused(start: Start) -> None:
    with pytest.raises(ModelFailed, match=r"speaks protocol 7\.0\.0, not 6\.9\.9"):
        await start(rpc_protocol="6.9.9")
    server = await start()
    with pytest.raises(UpstreamFailed, match=r"7\.0\.0, not 7\.0\.1"):
        await probe(server.endpoint, "7.0.1")


@pytest.mark.engine
async def test_a_device_it_does_not_have(start: Start) -> None:
    with pytest.raises(ModelFailed, match="unknown device: CUDA7"):
        await start(devices=("CUDA7",))


@pytest.mark.engine
async def test_without_a_kernel_that_tells_its_own_words_prove_it(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "listens", lambda *_: None)
    server = await start()
    assert any(rpc_server.SERVES in line for line in server.evidence())


@pytest.mark.engine
async def test_without_a_kernel_that_tells_a_stranger_on_the_port_is_not_believed(
    start: Start, places: EnginePlaces, engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = await start()
    monkeypatch.setattr(ports, "listens", lambda *_: None)
    monkeypatch.setattr(ports, "free_port", lambda: stranger.port)
    with pytest.raises(ModelFailed, match="found no port"):
        await start()
    assert await _still_serves(stranger)


async def _still_serves(server: RpcServer) -> bool:
    await probe(server.endpoint, "7.0.0")
    return True


@pytest.mark.engine
@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a socket away")
async def test_a_strangers_connection_is_seen(start: Start) -> None:
    server = await start()
    with socket.create_connection((ports.LOOPBACK, server.port)) as connection:
        assert server.strangers() == frozenset()
        os.fchown(connection.fileno(), 65534, -1)
        assert server.strangers() == {65534}
    assert server.strangers() == frozenset()


@pytest.mark.engine
async def test_one_left_over_by_a_daemon_that_died_is_ended(
    start: Start, places: EnginePlaces
) -> None:
    exited: list[str] = []
    server = await start(on_exit=exited.append)
    loop = asyncio.get_running_loop()
    assert await loop.run_in_executor(None, end_orphans, places.run_dir) == 1
    await wait_for(lambda: exited, "it is gone")
    assert ended(server.pid)
    await loop.shutdown_default_executor()
