"""What the tests of lending share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from meshd.ids import LoanId, ModelId
from meshd.kernel import Pool
from meshd.runtime.lending.rpc_server import RpcServer, RpcSpec
from meshd.runtime.supervisor import EnginePlaces
from tests.runtime.conftest import short_dir

__all__ = ["short_dir"]

Start = Callable[..., Awaitable[RpcServer]]


@pytest.fixture
def places(tmp_path: Path) -> EnginePlaces:
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700)
    return EnginePlaces(run_dir, tmp_path / "logs")


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool("test", workers=1)
    yield pool
    pool.close()


def spec_of(binary: Path) -> RpcSpec:
    return RpcSpec(
        loan=LoanId("loan-" + "0" * 32),
        model=ModelId("m"),
        binary=str(binary),
        devices=("CPU",),
        rpc_protocol="7.0.0",
        threads=1,
    )


@pytest.fixture
async def start(places: EnginePlaces, engine_dir: Path) -> AsyncIterator[Start]:
    """Starts a real server, which is stopped when the test ends."""
    started: list[RpcServer] = []

    async def start(
        *, on_exit: Callable[[str], None] = lambda _: None, **changes: object
    ) -> RpcServer:
        spec = replace(spec_of(engine_dir / "ggml-rpc-server"), **changes)  # type: ignore[arg-type]
        server = await RpcServer.start(spec, places=places, log_bytes=65_536, on_exit=on_exit)
        started.append(server)
        return server

    yield start
    for server in started:
        await server.stop()
