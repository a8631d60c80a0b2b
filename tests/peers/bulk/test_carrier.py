"""The carrier process by itself: the daemon's part is played by two sockets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from meshd.peers.bulk.carrier import NICENESS, give_way
from meshd.peers.bulk.words import NUMBER_BYTES
from meshd.peers.links.frames import FrameReader, frame, parse


@dataclass
class Run:
    process: subprocess.Popen[bytes]
    handover: socket.socket
    control: socket.socket

    def ended(self) -> int:
        return self.process.wait(10)


@pytest.fixture
def run() -> Iterator[Run]:
    handover, its_handover = socket.socketpair()
    control, its_control = socket.socketpair()
    with handover, control:
        with its_handover, its_control:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.peers.bulk.carrying"],
                stdin=its_handover.fileno(),
                stdout=its_control.fileno(),
            )
        control.settimeout(10)
        yield Run(process, handover, control)
    try:
        process.wait(10)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("which", ["handover", "control"])
def test_it_ends_with_either_socket(run: Run, which: str) -> None:
    getattr(run, which).close()
    assert run.ended() == 0


def test_it_ends_in_the_middle_of_a_connection(run: Run) -> None:
    """Its threads may wait for somebody who says nothing."""
    silent, theirs = socket.socketpair()
    with silent:
        with theirs:
            socket.send_fds(run.handover, [(1).to_bytes(NUMBER_BYTES)], [theirs.fileno()])
        run.control.close()
        assert run.ended() == 0
        assert silent.recv(1) == b""


def test_every_connection_has_an_end(run: Run) -> None:
    """One without TLS, and one that was lost on its way."""
    run.control.sendall(frame({"t": "from-the-future"}))
    silent, theirs = socket.socketpair()
    with silent, theirs:
        socket.send_fds(run.handover, [(7).to_bytes(NUMBER_BYTES)], [theirs.fileno()])
        theirs.close()
        run.handover.sendall((8).to_bytes(NUMBER_BYTES))
        first = parse(_frames(run.control, 1)[0])
        assert (first["t"], first["id"]) == ("ended", 8)
        run.control.sendall(
            frame(
                {
                    "t": "credentials",
                    "ca_der": "",
                    "certificate_path": "/nowhere",
                    "key_path": "/nowhere",
                    "mesh_id": "",
                }
            )
        )
        # Credentials that cannot be used are the daemon's bug: the process says so and ends.
        assert run.ended() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_a_thread_that_gives_way_does_so_alone() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = niceness()
    with ThreadPoolExecutor(1) as threads:
        threads.submit(give_way).result()
        assert threads.submit(niceness).result() == min(before + NICENESS, 19)
    assert niceness() == before


def _frames(control: socket.socket, count: int) -> list[bytes]:
    reader, found = FrameReader(1 << 16), list[bytes]()
    while len(found) < count:
        found += reader.feed(control.recv(1 << 16))
    return found
