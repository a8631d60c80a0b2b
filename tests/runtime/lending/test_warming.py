"""Warming: of a real server, in whose cache a real load then finds what it wants."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from meshd.cache.builtin import write_model
from meshd.cache.gguf_header import parse_header
from meshd.kernel import Pool
from meshd.runtime.lending import rpc_words, warming
from meshd.runtime.lending.extents import TensorExtent, offered_by_hash
from meshd.runtime.lending.ports import LOOPBACK
from meshd.runtime.lending.rpc_client import probe
from meshd.runtime.lending.rpc_server import RpcServer
from meshd.runtime.lending.tensor_cache import TensorCache, TensorCaches
from meshd.runtime.lending.warming import Warmed, warm
from meshd.runtime.process import ChildProcess
from tests.runtime.conftest import wait_for
from tests.runtime.lending.conftest import Start

DIGEST = "c" * 64
HEADER_BYTES = 1 << 20
NOWHERE = (TensorExtent("blk.0.x", "/nowhere", 0, 1 << 30),)
PROMPT = orjson.dumps(
    {"prompt": "the mesh", "n_predict": 24, "temperature": 0, "cache_prompt": False}
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, 116 MiB each: three tensors of 30 MiB, two of 10.1 MiB, two of 5 MiB."""
    path = tmp_path_factory.mktemp("weights") / "m.gguf"
    write_model(path, layers=2, width=2304, feed_forward=6912, seed=3)
    return path


@pytest.fixture(scope="module")
def tensors(weights: Path) -> tuple[TensorExtent, ...]:
    with weights.open("rb") as file:
        header = parse_header(file.read(HEADER_BYTES), weights.stat().st_size)
    return tuple(TensorExtent(t.name, str(weights), t.offset, t.size) for t in header.tensors)


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> tuple[TensorExtent, ...]:
    """Eight tensors of 11 MiB and a small one."""
    path, size = tmp_path_factory.mktemp("noise") / "w", 11 << 20
    path.write_bytes(os.urandom(8 * size + 100))
    small = TensorExtent("blk.0.attn_norm.weight", str(path), 8 * size, 100)
    return (*(TensorExtent(f"blk.{n}.x", str(path), n * size, size) for n in range(8)), small)


@pytest.fixture
def caches(tmp_path: Path) -> TensorCaches:
    return TensorCaches(tmp_path / "tensors", 1 << 30)


def opened(caches: TensorCaches) -> TensorCache:
    cache = caches.directory(DIGEST, 0)
    assert cache is not None
    return cache


Warm = Callable[..., Awaitable[Warmed]]


@pytest.fixture
def fill(pool: Pool) -> Warm:
    async def fill(
        cache: TensorCache,
        port: int,
        tensors: tuple[TensorExtent, ...],
        moved: Callable[[str], None] = lambda _: None,
    ) -> Warmed:
        return await warm(cache, port, tensors, rpc_protocol="7.0.0", pool=pool, moved=moved)

    return fill


@asynccontextmanager
async def llama_server(engine_dir: Path, directory: Path, *argv: str) -> AsyncIterator[Path]:
    """A real engine, once it answers; the path of its socket."""
    lines: list[str] = []
    exited = asyncio.Event()
    argv = (str(engine_dir / "llama-server"), "--host", "e.sock", *argv, "--parallel", "1")
    argv = (*argv, "--ctx-size", "256", "--threads", "1", "--no-warmup")
    process = await ChildProcess.spawn(
        argv, cwd=directory, on_line=lines.append, on_exit=lambda _: exited.set()
    )
    try:
        async with asyncio.timeout(60):
            while await ask(directory / "e.sock", "GET", "/health") is None:
                assert not exited.is_set(), lines[-10:]
                await process.wait_exit(0.05)
        yield directory / "e.sock"
    finally:
        process.signal_group(signal.SIGKILL)
        assert await process.wait_exit(5.0)
        (directory / "e.sock").unlink(missing_ok=True)


async def ask(path: Path, method: str, target: str, body: bytes = b"") -> bytes | None:
    """The body of a 200."""
    try:
        reader, writer = await asyncio.open_unix_connection(str(path))
    except OSError:
        return None
    head = f"{method} {target} HTTP/1.1\r\nHost: e\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    try:
        answer = await reader.read(-1)
    finally:
        writer.close()
    status, _, rest = answer.partition(b"\r\n")
    return rest.partition(b"\r\n\r\n")[2] if b" 200 " in status else None


async def text_of(engine: Path) -> str:
    answer = await ask(engine, "POST", "/completion", PROMPT)
    assert answer is not None
    return str(orjson.loads(answer)["content"])


@pytest.mark.engine
@pytest.mark.slow
async def test_a_warmed_load_pushes_nothing_and_computes_the_same(
    start: Start,
    caches: TensorCaches,
    weights: Path,
    tensors: tuple[TensorExtent, ...],
    fill: Warm,
    engine_dir: Path,
    short_dir: Path,
) -> None:
    model = ("--model", str(weights))
    async with llama_server(engine_dir, short_dir, *model, "--device", "none") as alone:
        expected = await text_of(alone)
    cache = opened(caches)
    large = sum(t.size for t in offered_by_hash(tensors))

    async def pushed_by_a_load(warmed: bool) -> int:
        """Starts a server, perhaps warms it, loads the model over it, and compares its text."""
        server = await start(cache_dir=cache.path)
        if warmed:
            assert await fill(cache, server.port, tensors) == Warmed(large, large)
        before = cache.files()
        split = ("--rpc", server.endpoint, "--device", "RPC0", "--n-gpu-layers", "99")
        async with llama_server(engine_dir, short_dir, *model, *split) as engine:
            assert await text_of(engine) == expected
        assert await server.stop()  # its host has left it
        return cache.measure(before, whole=True)

    assert await pushed_by_a_load(warmed=True) == 0
    assert cache.lacking(offered_by_hash(tensors), "7.0.0") == ()

    for path in (cache.path / "rpc").iterdir():
        path.unlink()
    assert await pushed_by_a_load(warmed=False) == large

    cache = opened(caches)  # what was pushed is known to be whole, and found again
    assert await pushed_by_a_load(warmed=False) == 0


@pytest.mark.engine
async def test_what_was_warmed_is_not_sent_again(
    start: Start,
    caches: TensorCaches,
    noise: tuple[TensorExtent, ...],
    fill: Warm,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(warming, "TELL_EVERY_S", 0.0)
    cache, large = opened(caches), noise[:-1]
    server = await start(cache_dir=cache.path)
    told: list[str] = []
    total = sum(t.size for t in large)
    assert await fill(cache, server.port, noise, moved=told.append) == Warmed(total, total)
    assert told[-1] == "warming tensors: 88 of 88 MiB"
    files = sorted((cache.path / "rpc").iterdir())
    assert {path.read_bytes() for path in files} == {_data(t) for t in large}

    assert await fill(cache, server.port, noise) == Warmed(0, total)
    await server.stop()

    with files[3].open("r+b") as file:
        file.truncate(large[3].size - 1)
    cache = opened(caches)
    server = await start(cache_dir=cache.path)
    assert await fill(cache, server.port, noise) == Warmed(large[3].size, total)
    assert {path.read_bytes() for path in files} == {_data(t) for t in large}
    await probe(server.endpoint, "7.0.0")  # its connection is free again


@pytest.mark.engine
async def test_tensors_of_the_same_bytes_share_a_file(
    start: Start, caches: TensorCaches, noise: tuple[TensorExtent, ...], fill: Warm
) -> None:
    twins = (noise[0], replace(noise[0], name="blk.9.x"))
    cache = opened(caches)
    server = await start(cache_dir=cache.path)
    await fill(cache, server.port, twins)
    assert len(cache.files()) == 1
    assert await fill(cache, server.port, twins) == Warmed(0, 2 * noise[0].size)


@pytest.mark.engine
async def test_a_server_that_dies_meanwhile_fails_nobody(
    start: Start,
    caches: TensorCaches,
    noise: tuple[TensorExtent, ...],
    fill: Warm,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(warming, "TELL_EVERY_S", 0.0)
    cache = opened(caches)
    exited: list[str] = []
    server = await start(cache_dir=cache.path, on_exit=exited.append)

    told: list[str] = []

    def moved(words: str) -> None:
        if not told:
            os.kill(server.pid, signal.SIGKILL)
        told.append(words)

    warmed = await fill(cache, server.port, noise, moved=moved)
    assert warmed.held < warmed.sent < sum(t.size for t in noise)
    await wait_for(lambda: exited, "its end is told")
    assert {f.size for f in opened(caches).files().values()} <= {noise[0].size}


@pytest.mark.engine
async def test_a_cancelled_warming_ends_in_its_thread(
    start: Start,
    caches: TensorCaches,
    noise: tuple[TensorExtent, ...],
    fill: Warm,
    monkeypatch: pytest.MonkeyPatch,
    pool: Pool,
) -> None:
    monkeypatch.setattr(warming, "TELL_EVERY_S", 0.0)
    cache = opened(caches)
    server = await start(cache_dir=cache.path)
    told: list[str] = []
    task = asyncio.ensure_future(fill(cache, server.port, noise, moved=told.append))
    await wait_for(lambda: told, "it began")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(5):
        await pool.run(lambda: None)  # its only thread is free
    await probe(server.endpoint, "7.0.0")


@pytest.mark.engine
async def test_weights_that_end_too_early_fail_nobody(
    start: Start, caches: TensorCaches, fill: Warm, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    short.write_bytes(bytes(1000))
    extent = TensorExtent("blk.0.x", str(short), 0, rpc_words.HASHED_OVER_BYTES + 1)
    cache = opened(caches)
    server: RpcServer = await start(cache_dir=cache.path)
    assert await fill(cache, server.port, (extent,)) == Warmed(1000, 0)
    assert await fill(cache, server.port, (replace(extent, path="/nowhere"),)) == Warmed(0, 0)
    await probe(server.endpoint, "7.0.0")
    assert cache.files() == {}


async def test_of_an_unknown_protocol_nothing_is_said(caches: TensorCaches, pool: Pool) -> None:
    with socket.create_server((LOOPBACK, 0)) as listener:
        port = listener.getsockname()[1]
        warmed = await warm(
            opened(caches), port, NOWHERE, rpc_protocol="8.0.0", pool=pool, moved=pytest.fail
        )
        assert warmed == Warmed(0, 0)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


async def test_a_pool_without_room_fails_nobody(caches: TensorCaches) -> None:
    pool = Pool("test", workers=1, backlog=-1)
    warmed = await warm(
        opened(caches), 1, NOWHERE, rpc_protocol="7.0.0", pool=pool, moved=pytest.fail
    )
    assert warmed == Warmed(0, 0)
    pool.close()


def _data(tensor: TensorExtent) -> bytes:
    with Path(tensor.path).open("rb") as file:
        file.seek(tensor.offset)
        return file.read(tensor.size)
