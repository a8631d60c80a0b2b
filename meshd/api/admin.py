"""The admin side: what changes a node, on a unix socket only its owner can open."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from meshd.api.admin_cache import CacheControls, RefBody, add_cache_routes
from meshd.api.admin_exchange import NoBody, error_answers, json_answer, parse_body
from meshd.errors import NoMesh
from meshd.ids import ModelId
from meshd.kernel import FlightRecorder, Service
from meshd.view import Role

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 * 1024
MAX_REPLICAS = 4096


def _replicas(value: object) -> object:
    if value is None or value == "auto" or (type(value) is int and 1 <= value <= MAX_REPLICAS):
        return value
    raise ValueError(f'a number from 1 to {MAX_REPLICAS}, or "auto"')


class LoadBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    ref: str = Field(min_length=1, max_length=4096)
    context: int | None = Field(None, ge=128, le=1 << 24)
    parallel: int | None = Field(None, ge=1, le=1024)
    replicas: Annotated[int | Literal["auto"] | None, PlainValidator(_replicas)] = None
    """Nodes that are to host it; `auto`: as many as it is asked for; None: not said."""
    host: str | None = Field(None, min_length=1, max_length=256)
    """The only node that may host it: name, id, or the beginning of an id."""
    split: bool = False
    """To lie on several nodes even if one could hold it."""


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
    """HTTP on `<data-dir>/admin.sock`, mode 0600. Errors have the shape of the API's.

    `load` and `unload` answer with the model's name. `plan`: for a REF, where it would go, and why.
    """

    name = "admin"

    def __init__(
        self,
        path: Path,
        *,
        load: Callable[[LoadBody], Awaitable[ModelId]],
        unload: Callable[[UnloadBody], Awaitable[ModelId]],
        status: Callable[[], dict[str, Any]],
        recorder: FlightRecorder,
        mesh: MeshControls | None = None,
        cache: CacheControls | None = None,
        plan: Callable[[str], Awaitable[dict[str, Any]]] | None = None,
    ) -> None:
        super().__init__()
        self._path = path
        self._load = load
        self._unload = unload
        self._status = status
        self._recorder = recorder
        self._mesh = mesh
        self._cache = cache
        self._plan = plan

    async def main(self) -> None:
        application = web.Application(middlewares=[error_answers], client_max_size=MAX_BODY_BYTES)
        application.router.add_get("/status", self._get_status)
        application.router.add_get("/flight", self._get_flight)
        application.router.add_post("/load", self._post_load)
        application.router.add_post("/unload", self._post_unload)
        application.router.add_post("/invite", self._post_invite)
        application.router.add_post("/revoke", self._post_revoke)
        application.router.add_post("/leave", self._post_leave)
        application.router.add_post("/drain", self._post_drain)
        application.router.add_post("/undrain", self._post_undrain)
        if self._plan is not None:
            application.router.add_post("/plan", self._post_plan)
        if self._cache is not None:
            add_cache_routes(application, self._cache)
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
        return json_answer(self._status())

    async def _get_flight(self, request: web.Request) -> web.Response:
        return json_answer({"lines": self._recorder.render().splitlines()})

    async def _post_load(self, request: web.Request) -> web.Response:
        body = parse_body(LoadBody, await request.read())
        return json_answer({"model": await self._load(body)})

    async def _post_unload(self, request: web.Request) -> web.Response:
        body = parse_body(UnloadBody, await request.read())
        return json_answer({"model": await self._unload(body)})

    async def _post_plan(self, request: web.Request) -> web.Response:
        assert self._plan is not None, "there is no such route without it"
        return json_answer(await self._plan(parse_body(RefBody, await request.read()).ref))

    async def _post_invite(self, request: web.Request) -> web.Response:
        body = parse_body(InviteBody, await request.read())
        return json_answer(await self._controls().invite(body))

    async def _post_revoke(self, request: web.Request) -> web.Response:
        body = parse_body(RevokeBody, await request.read())
        return json_answer(await self._controls().revoke(body.node))

    async def _post_leave(self, request: web.Request) -> web.Response:
        parse_body(NoBody, await request.read() or b"{}")
        return json_answer(await self._controls().leave())

    async def _post_drain(self, request: web.Request) -> web.Response:
        parse_body(NoBody, await request.read() or b"{}")
        return json_answer(await self._controls().drain())

    async def _post_undrain(self, request: web.Request) -> web.Response:
        parse_body(NoBody, await request.read() or b"{}")
        return json_answer(await self._controls().undrain())

    def _controls(self) -> MeshControls:
        if self._mesh is None:
            raise NoMesh("this node belongs to no mesh; `meshd run --join TOKEN` joins one")
        return self._mesh
