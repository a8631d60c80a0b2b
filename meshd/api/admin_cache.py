"""The admin side of the model cache: lists as JSON, long work as a stream of lines."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol, TypeAlias

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field

from meshd.api.admin_exchange import NoBody, answer_lines, json_answer, parse_body

Events: TypeAlias = AsyncGenerator[dict[str, Any], None]


class RefBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    ref: str = Field(min_length=1, max_length=4096)


class VerifyBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    ref: str | None = Field(None, min_length=1, max_length=4096)
    """None: everything."""


class RemoveBody(RefBody):
    force: bool = False


class PruneBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    dry_run: bool = False
    force: bool = False


class CacheControls(Protocol):
    """What the admin side can ask of the cache; `node.py` provides it. Each may raise MeshdError;
    leaving an iteration early cancels its work."""

    async def ls(self) -> dict[str, Any]: ...

    def pull(self, ref: str) -> Events: ...

    def verify(self, ref: str | None) -> Events: ...

    def repair(self, ref: str) -> Events: ...

    async def rm(self, ref: str, *, force: bool) -> dict[str, Any]: ...

    async def prune(self, *, dry_run: bool, force: bool) -> dict[str, Any]: ...


def add_cache_routes(application: web.Application, cache: CacheControls) -> None:
    """Let `application` answer `POST /cache/ls|rm|prune` with JSON, and `/cache/pull|verify|repair`
    with events, one a line; who hangs up cancels the work."""

    async def ls(request: web.Request) -> web.StreamResponse:
        parse_body(NoBody, await request.read() or b"{}")
        return json_answer(await cache.ls())

    async def rm(request: web.Request) -> web.StreamResponse:
        body = parse_body(RemoveBody, await request.read())
        return json_answer(await cache.rm(body.ref, force=body.force))

    async def prune(request: web.Request) -> web.StreamResponse:
        body = parse_body(PruneBody, await request.read() or b"{}")
        return json_answer(await cache.prune(dry_run=body.dry_run, force=body.force))

    async def pull(request: web.Request) -> web.StreamResponse:
        body = parse_body(RefBody, await request.read())
        return await answer_lines(request, cache.pull(body.ref))

    async def verify(request: web.Request) -> web.StreamResponse:
        body = parse_body(VerifyBody, await request.read() or b"{}")
        return await answer_lines(request, cache.verify(body.ref))

    async def repair(request: web.Request) -> web.StreamResponse:
        body = parse_body(RefBody, await request.read())
        return await answer_lines(request, cache.repair(body.ref))

    handlers: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]]
    handlers = {
        "ls": ls, "rm": rm, "prune": prune, "pull": pull, "verify": verify, "repair": repair
    }  # fmt: skip
    for name, handler in handlers.items():
        application.router.add_post(f"/cache/{name}", handler)
