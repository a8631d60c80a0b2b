"""The admin side: what changes a node, on a unix socket only its owner can open."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meshd.errors import InvalidRequest, MeshdError
from meshd.ids import ModelId
from meshd.kernel import FlightRecorder, Service

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 * 1024

B = TypeVar("B", bound=BaseModel)


class LoadBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    ref: str = Field(min_length=1, max_length=4096)
    context: int | None = Field(None, ge=128, le=1 << 24)
    parallel: int | None = Field(None, ge=1, le=1024)


class UnloadBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str = Field(min_length=1, max_length=4096)
    drain_s: float | None = Field(None, ge=0, le=86_400)


class AdminServer(Service):
    """HTTP on `<data-dir>/admin.sock`, mode 0600. Errors have the shape of the API's."""

    name = "admin"

    def __init__(
        self,
        path: Path,
        *,
        load: Callable[[LoadBody], ModelId],
        unload: Callable[[UnloadBody], ModelId],
        status: Callable[[], dict[str, Any]],
        recorder: FlightRecorder,
    ) -> None:
        super().__init__()
        self._path = path
        self._load = load
        self._unload = unload
        self._status = status
        self._recorder = recorder

    async def main(self) -> None:
        application = web.Application(middlewares=[_errors], client_max_size=MAX_BODY_BYTES)
        application.router.add_get("/status", self._get_status)
        application.router.add_get("/flight", self._get_flight)
        application.router.add_post("/load", self._post_load)
        application.router.add_post("/unload", self._post_unload)
        runner = web.AppRunner(
            application, access_log=None, handler_cancellation=True, shutdown_timeout=1.0
        )
        await runner.setup()
        # The lock of the data directory is held: a socket found here is a dead daemon's.
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        try:
            await web.UnixSite(runner, str(self._path)).start()
            self._path.chmod(0o600)
            self.ready.set()
            await self.stopping.wait()
        finally:
            await runner.cleanup()
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()

    async def _get_status(self, request: web.Request) -> web.Response:
        return _json(self._status())

    async def _get_flight(self, request: web.Request) -> web.Response:
        return _json({"lines": self._recorder.render().splitlines()})

    async def _post_load(self, request: web.Request) -> web.Response:
        return _json({"model": self._load(_parse(LoadBody, await request.read()))})

    async def _post_unload(self, request: web.Request) -> web.Response:
        return _json({"model": self._unload(_parse(UnloadBody, await request.read()))})


def _parse(kind: type[B], body: bytes) -> B:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "body"
        raise InvalidRequest(f"{where}: {problem['msg']}", param=where) from None


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except MeshdError as error:
        return _json({"error": {"message": error.message, "code": error.code}}, error.status)
    except web.HTTPException as error:
        return _json({"error": {"message": error.reason, "code": "not_found"}}, error.status)
