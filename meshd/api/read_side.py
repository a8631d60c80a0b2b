"""What can be read: models, health, metrics, the mesh, the console."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import cached_property
from importlib import resources
from typing import Any

import orjson
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import Response, StreamResponse

from meshd.api import metrics, refusals, status
from meshd.api.events import EventHub
from meshd.api.relay import Relay
from meshd.api.route import find, route
from meshd.errors import InvalidRequest, MeshdError, NotFound
from meshd.kernel import Board, Clock
from meshd.view import NodeState, Target, View

MODEL_PREFIX = "/v1/models/"

CONSOLE_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

Handler = Callable[[BaseRequest], Awaitable[StreamResponse]]


class ReadSide:
    def __init__(
        self,
        board: Board[View],
        relay: Relay,
        events: EventHub,
        clock: Clock,
        mesh: str,
        source: metrics.MetricSource | None,
        plan: Callable[[str], dict[str, Any]] | None,
    ) -> None:
        self._board = board
        self._relay = relay
        self._events = events
        self._clock = clock
        self._mesh = mesh
        self._source = source
        self._plan = plan

    def handlers(self) -> Mapping[str, Handler]:
        """By path, for GET and HEAD."""
        return {
            "/": self._console,
            "/livez": self._livez,
            "/readyz": self._readyz,
            "/metrics": self._metrics,
            "/v1/models": self._models,
            "/mesh/status": self._status,
            "/mesh/peers": self._peers,
            "/mesh/models": self._mesh_models,
            "/mesh/events": self._mesh_events,
            "/mesh/plan": self._mesh_plan,
        }

    def status(self) -> dict[str, Any]:
        return status.status(
            self._board.current, self._mesh, self._clock.now(), self._relay.own_slots_in_use()
        )

    async def model(self, request: BaseRequest) -> Response:
        """`/v1/models/{id}`; an id may contain slashes."""
        name = request.path.removeprefix(MODEL_PREFIX)
        view = self._board.current
        model = find(name, view.models)
        if model is None:
            outcome = route(name, view.models, {}, self._relay.rng)
            assert not isinstance(outcome, Target)
            raise refusals.of_route(name, outcome)
        return _json(status.model_entry(view, model))

    async def _models(self, request: BaseRequest) -> Response:
        return _json(status.model_list(self._board.current))

    async def _livez(self, request: BaseRequest) -> Response:
        return _json({"status": "alive"})

    async def _readyz(self, request: BaseRequest) -> Response:
        state = self._board.current.node.state
        draining = self._relay.draining
        ready = state is NodeState.READY and not draining
        said = NodeState.DRAINING if draining else state
        return _json({"status": said.value}, 200 if ready else 503)

    async def _metrics(self, request: BaseRequest) -> Response:
        text = metrics.render(self._board.current, self._relay, self._source)
        return Response(body=text, headers={"Content-Type": metrics.CONTENT_TYPE})

    async def _status(self, request: BaseRequest) -> Response:
        return _json(self.status())

    async def _peers(self, request: BaseRequest) -> Response:
        return _json(status.peers(self._board.current))

    async def _mesh_models(self, request: BaseRequest) -> Response:
        return _json(status.models(self._board.current, self._relay.own_slots_in_use()))

    async def _mesh_events(self, request: BaseRequest) -> StreamResponse:
        return await self._events.stream(request, {})

    async def _mesh_plan(self, request: BaseRequest) -> Response:
        if self._plan is None:
            raise NotFound("this node places no models")
        ref = request.query.get("model")
        if not ref:
            raise InvalidRequest("`/mesh/plan?model=REF` needs a `model`", param="model")
        return _json(self._plan(ref))

    async def _console(self, request: BaseRequest) -> Response:
        page = self._page
        if page is None:
            raise _no_console()
        return Response(
            body=page, headers={**CONSOLE_HEADERS, "Content-Type": "text/html; charset=utf-8"}
        )

    @cached_property
    def _page(self) -> bytes | None:
        """Read once, at the first visit; a few KiB."""
        try:
            return resources.files("meshd.console").joinpath("page.html").read_bytes()
        except (FileNotFoundError, ModuleNotFoundError):
            return None


def _no_console() -> MeshdError:
    return NotFound("this build has no console; /mesh/status has the same as JSON")


def _json(value: Any, code: int = 200) -> Response:
    return Response(body=orjson.dumps(value), status=code, content_type="application/json")
