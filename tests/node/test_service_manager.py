"""What a node says to the service manager and looks at first; what a reload changes."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from meshd import config
from meshd.config import Config
from meshd.errors import BadConfig
from meshd.ids import ModelId, NodeId
from meshd.kernel import Board, MonotonicClock
from meshd.kernel.notify import Notifier
from meshd.kernel.watchdog import Watchdog
from meshd.node.reload import reload
from meshd.node.service_manager import ServiceManager, answers, moves, status_line
from meshd.view import (
    ModelState,
    ModelView,
    NodeState,
    NodeView,
    PeerState,
    PeerView,
    Role,
    View,
)

NODE = NodeView(NodeId("n"), "n", "1", "member", NodeState.STARTING, 0.0, "127.0.0.1:9337", None)


def peer(name: str, state: PeerState) -> PeerView:
    return PeerView(NodeId(name), name, state, Role.MEMBER)


def models(*states: ModelState) -> MappingProxyType[ModelId, ModelView]:
    return MappingProxyType(
        {ModelId(f"m{i}"): ModelView(ModelId(f"m{i}"), "r", s, None) for i, s in enumerate(states)}
    )


def test_status_line() -> None:
    view = View(NODE)
    assert status_line(view) == "starting; the API listens on 127.0.0.1:9337"
    view = replace(view, node=replace(NODE, state=NodeState.READY))
    assert status_line(view) == "ready; no model loaded; alone in its mesh"
    view = replace(
        view,
        local=models(ModelState.READY, ModelState.LOADING, ModelState.ABSENT),
        peers=(peer("a", PeerState.ALIVE), peer("b", PeerState.DEAD)),
    )
    assert status_line(view) == "ready; 1 of 2 models ready; 1 other node alive"


def test_the_state_is_told_when_it_changes(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(path)
        channel.settimeout(5)
        board = Board(View(NODE))
        manager = ServiceManager(board, Notifier(path))
        manager.follow()
        board.publish(replace(board.current, peers=(peer("a", PeerState.DEAD),)))  # same words
        board.publish(replace(board.current, node=replace(NODE, state=NodeState.READY)))
        manager.ready()
        got = [channel.recv(4096).decode() for _ in range(3)]
    assert got == [
        "STATUS=starting; the API listens on 127.0.0.1:9337",
        "STATUS=ready; no model loaded; 0 other nodes alive",
        "READY=1",
    ]


def test_a_watchdog_only_where_one_is_meant_for_us(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(limit: str, pid: str | None = None, address: str | None = "/run/x") -> bool:
        monkeypatch.setenv("WATCHDOG_USEC", limit)
        if pid is None:
            monkeypatch.delenv("WATCHDOG_PID", raising=False)
        else:
            monkeypatch.setenv("WATCHDOG_PID", pid)
        manager = ServiceManager(Board(View(NODE)), Notifier(address))
        found = manager.watchdog(lambda: 0.0, clock=MonotonicClock())
        return isinstance(found, Watchdog)

    assert made("30000000")
    assert made("30000000", str(os.getpid()))
    assert not made("30000000", "1")
    assert not made("0")
    assert not made("soon")
    assert not made("30000000", address=None)


def test_children_do_not_speak_for_us(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.setenv(name, "1")
    inherited = config.environment_of_children()
    assert not [n for n in inherited if n.startswith(("NOTIFY", "WATCHDOG"))]


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", None),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", None),  # full, and alive
        (b"SSH-2.0-x\r\n", "answers b'SSH-2.0-x"),
        (b"", "answers b''"),
    ],
)
async def test_the_api_is_asked_through_its_port(answer: bytes, fault: str | None) -> None:
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        found = await answers(f"0.0.0.0:{port}")
    assert asked == [b"GET /livez HTTP/1.1\r\n"]
    assert found is None if fault is None else fault in (found or "")


async def test_nobody_listens() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        found = await answers(f"127.0.0.1:{closed.getsockname()[1]}")
    assert found is not None
    assert "does not answer" in found


async def test_supervision_that_stands_still() -> None:
    assert await moves(9.0) is None
    assert await moves(12.4) == "12 s behind"


# -- reload ---------------------------------------------------------------------------------------


def configured(tmp_path: Path, **changes: object) -> Config:
    return Config(name="n", data_dir=tmp_path, cache_dir=tmp_path).model_copy(update=changes)


def test_a_reload_takes_what_it_may_and_names_the_rest(tmp_path: Path) -> None:
    running = configured(tmp_path)
    new = reload(running, configured(tmp_path, log_level="debug", api_key="k" * 8, drain_s=5.0))
    assert new.config == configured(tmp_path, log_level="debug", api_key="k" * 8)
    assert new.words() == "changed api_key, log_level; after a restart: drain_s"
    assert reload(new.config, new.config).words() == "nothing has changed"


def test_a_reload_does_not_open_an_api_that_others_reach(tmp_path: Path) -> None:
    """The address of the new file is not the one it listens on."""
    running = configured(tmp_path, listen="0.0.0.0:9337", api_key="k" * 8)
    with pytest.raises(BadConfig, match="can be reached from other machines"):
        reload(running, configured(tmp_path, listen="127.0.0.1:9337"))


def test_reading_again_sees_the_file_and_keeps_the_flags(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('log_level = "warning"\n')
    flags = {"data_dir": str(tmp_path), "name": "typed"}
    loaded = config.load(flags, file=file, environ={"HOME": str(tmp_path)})
    file.write_text('log_level = "debug"\nname = "filed"\n')
    again = loaded.again().config
    assert (again.log_level, again.name) == ("debug", "typed")
