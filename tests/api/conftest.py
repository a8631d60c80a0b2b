"""Fixtures of the API's tests; what they are made of is in scripted.py."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from meshd.config import ApiSettings, Config
from tests.api.links import Links
from tests.api.scripted import Api, Engine

Starter = Callable[..., Awaitable[Api]]


@pytest.fixture
async def start_api(tmp_path: Path) -> AsyncIterator[Starter]:
    """`await start_api(api_setting=…, api_key=…)`: a running server with one ready model, `m`."""
    running: list[Api] = []

    async def start(**settings: Any) -> Api:
        top = {
            key: settings.pop(key)
            for key in ("api_key", "drain_s", "listen", "name")
            if key in settings
        }
        wiring = {key: settings.pop(key, None) for key in ("connect_remote", "usage", "plan")}
        config = Config(
            **{"name": "node1", "listen": "127.0.0.1:0", **top},
            data_dir=tmp_path,
            cache_dir=tmp_path,
            api=ApiSettings(**settings),
        )
        engine = Engine(tmp_path / f"e{len(running)}.sock")
        await engine.start()
        api = Api(config, engine, **wiring)
        await api.start()
        api.ready()
        running.append(api)
        return api

    yield start
    for api in running:
        await api.stop()
        await api.engine.stop()


@pytest.fixture
async def links(tmp_path: Path) -> AsyncIterator[Links]:
    made = Links(tmp_path)
    yield made
    await made.close()


@pytest.fixture
async def api(start_api: Starter) -> Api:
    return await start_api()


def pytest_asyncio_loop_factories(config: Any, item: Any) -> dict[str, Any]:
    """The loop the daemon runs on."""
    return {"uvloop": uvloop.new_event_loop}
