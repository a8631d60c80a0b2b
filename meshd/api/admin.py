"""The admin side: what changes a node, on a unix socket only its owner can open."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from meshd.errors import InvalidRequest, MeshdError, NoMesh
from meshd.ids import ModelId
from meshd.kernel import FlightRecorder, Service
from meshd.view import Role

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


class InviteBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    ttl_s: float = Field(86_400, ge=60, le=30 * 86_400)
    """How long it may be redeemed."""
    uses: int = Field(1, ge=1, le=1000)
    """How many nodes it may admit."""
    role: Role = Role.MEMBER
    issuer: bool = False
    """Whether who joins with it may invite others: it is given the mesh's key."""

    @model_validator(mode="after")
    def _clients_do_not_issue(self) -> InviteBody:
        if self.issuer and self.role is Role.CLIENT:
            raise ValueError("a client cannot be an issuer; invite it as a member")
        return self


class RevokeBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    node: str = Field(min_length=1, max_length=256)
    """Name, id, or the beginning of an id that only one node has."""


class NoBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MeshControls(Protocol):
    """What the admin side can ask of the mesh; `node.py` provides it. Each may raise MeshdError."""

    async def invite(self, body: InviteBody) -> dict[str, Any]:
        """{token, expires_at (Unix time), command}."""

    async def revoke(self, node: str) -> dict[str, Any]:
        """{node (its name), id}, once the deny list that names it is on disk."""

    async def leave(self) -> dict[str, Any]:
        """{mesh (name)}, once the others were told and the certificate is gone."""

    async def drain(self) -> dict[str, Any]:
        """{state}: take no new requests for local engines."""

    async def undrain(self) -> dict[str, Any]:
        """{state}."""


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
        mesh: MeshControls | None = None,
    ) -> None:
        super().__init__()
        self._path = path
        self._load = load
        self._unload = unload
        self._status = status
        self._recorder = recorder
        self._mesh = mesh

    async def main(self) -> None:
        application = web.Application(middlewares=[_errors], client_max_size=MAX_BODY_BYTES)
        application.router.add_get("/status", self._get_status)
        application.router.add_get("/flight", self._get_flight)
        application.router.add_post("/load", self._post_load)
        application.router.add_post("/unload", self._post_unload)
        application.router.add_post("/invite", self._post_invite)
        application.router.add_post("/revoke", self._post_revoke)
        application.router.add_post("/leave", self._post_leave)
        application.router.add_post("/drain", self._post_drain)
        application.router.add_post("/undrain", self._post_undrain)
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

    async def _post_invite(self, request: web.Request) -> web.Response:
        body = _parse(InviteBody, await request.read())
        return _json(await self._controls().invite(body))

    async def _post_revoke(self, request: web.Request) -> web.Response:
        body = _parse(RevokeBody, await request.read())
        return _json(await self._controls().revoke(body.node))

    async def _post_leave(self, request: web.Request) -> web.Response:
        _parse(NoBody, await request.read() or b"{}")
        return _json(await self._controls().leave())

    async def _post_drain(self, request: web.Request) -> web.Response:
        _parse(NoBody, await request.read() or b"{}")
        return _json(await self._controls().drain())

    async def _post_undrain(self, request: web.Request) -> web.Response:
        _parse(NoBody, await request.read() or b"{}")
        return _json(await self._controls().undrain())

    def _controls(self) -> MeshControls:
        if self._mesh is None:
            raise NoMesh("this node belongs to no mesh; `meshd run --join TOKEN` joins one")
        return self._mesh


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
