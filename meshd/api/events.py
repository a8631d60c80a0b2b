"""`/mesh/events`: one JSON object per change of the view."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import orjson
from aiohttp.web_request import BaseRequest
from aiohttp.web_response import StreamResponse

from meshd.api.status import fetch
from meshd.ids import NodeId
from meshd.view import Claim, ClaimState, ModelView, PeerState, PeerView, View

QUEUE_LIMIT = 256
"""Events a subscriber may be behind. Full-policy: it gets one `dropped` event and its stream ends;
it connects again and reads `/mesh/status` first."""
KEEP_ALIVE_S = 15.0

DROPPED: dict[str, Any] = {
    "type": "dropped",
    "reason": f"more than {QUEUE_LIMIT} events were waiting; connect again and read /mesh/status",
}


def changes(old: View, new: View) -> list[dict[str, Any]]:
    """What happened between two views, oldest view first. Pure.

    Called at every change of the view; numbers that change all the time (slots, round trips) are
    no events.
    """
    found: list[dict[str, Any]] = []
    if new.node.state != old.node.state:
        found.append(
            {"type": "node", "node": new.node.name, "state": new.node.state.value}
            | {"previous": old.node.state.value}
        )
    if new.mesh.state != old.mesh.state or new.mesh.reason != old.mesh.reason:
        found.append(
            {
                "type": "mesh",
                "mesh": new.mesh.name,
                "state": new.mesh.state.value,
                "previous": old.mesh.state.value,
                "reason": new.mesh.reason,
            }
        )
    if new.runtime is not old.runtime and new.runtime is not None:
        before = "cpu" if old.runtime is None else old.runtime.backend
        if new.runtime.backend != before:
            found.append(
                {
                    "type": "runtime",
                    "node": new.node.name,
                    "backend": new.runtime.backend,
                    "previous": before,
                    "reason": new.runtime.proof.problem,
                }
            )
    if new.peers is not old.peers:
        found.extend(_peer_changes(old.peers, new.peers))
    if new.claims is not old.claims or new.peers is not old.peers:
        found.extend(_host_changes(old, new))
    if new.models is not old.models:
        found.extend(_model_changes(old, new))
    return found


def _peer_changes(old: tuple[PeerView, ...], new: tuple[PeerView, ...]) -> Iterator[dict[str, Any]]:
    before = {peer.id: peer for peer in old}
    for peer in new:
        last = before.pop(peer.id, None)
        if last is None or (last.state, last.draining) != (peer.state, peer.draining):
            yield {
                "type": "peer",
                "peer": peer.name,
                "id": peer.id,
                "state": peer.state.value,
                "previous": None if last is None else last.state.value,
                "draining": peer.draining,
            }
        if peer.backend != ("cpu" if last is None else last.backend):
            yield {
                "type": "peer_runtime",
                "peer": peer.name,
                "id": peer.id,
                "backend": peer.backend,
                "previous": "cpu" if last is None else last.backend,
                "reason": None if peer.proof is None else peer.proof.problem,
            }
    for gone in before.values():
        yield {
            "type": "peer_removed",
            "peer": gone.name,
            "id": gone.id,
            "previous": gone.state.value,
        }


_REACHABLE = (PeerState.ALIVE, PeerState.SUSPECT)


def _host_changes(old: View, new: View) -> Iterator[dict[str, Any]]:
    """Of the claims of this node and of those that can be reached."""
    before = {p.id: (p.name, p.claims) for p in old.peers if p.state in _REACHABLE}
    before[old.node.id] = (old.node.name, old.claims)
    after = {p.id: (p.name, p.claims) for p in new.peers if p.state in _REACHABLE}
    after[new.node.id] = (new.node.name, new.claims)
    states = {p.id: p.state.value for p in new.peers if p.state not in _REACHABLE}
    for node_id, (name, claims) in after.items():
        _, last = before.pop(node_id, ("", ()))
        if claims is not last:
            yield from _claim_changes(name, node_id, last, claims)
    for node_id, (name, last) in before.items():
        why = f"node `{name}` is {states.get(node_id, 'no member of the mesh any more')}"
        for claim in last:
            yield _gone(name, node_id, claim, why)


def _claim_changes(
    node: str, node_id: NodeId, old: tuple[Claim, ...], new: tuple[Claim, ...]
) -> Iterator[dict[str, Any]]:
    before = {claim.model: claim for claim in old}
    for claim in new:
        last = before.pop(claim.model, None)
        if last is None or _claimed(last) != _claimed(claim):
            previous = None if last is None else last.state.value
            yield _host_event(node, node_id, claim, claim.state.value, previous, claim.reason)
    for gone in before.values():
        why = gone.reason if gone.state is ClaimState.DRAINING else None
        yield _gone(node, node_id, gone, why)


def _claimed(claim: Claim) -> tuple[object, ...]:
    """What an event is made for."""
    return (claim.epoch, claim.state, claim.reason)


def _gone(node: str, node_id: NodeId, claim: Claim, why: str | None) -> dict[str, Any]:
    return _host_event(node, node_id, claim, "gone", claim.state.value, why)


def _host_event(
    node: str, node_id: NodeId, claim: Claim, state: str, previous: str | None, reason: str | None
) -> dict[str, Any]:
    return {
        "type": "host",
        "model": claim.model,
        "node": node,
        "node_id": node_id,
        "epoch": claim.epoch,
        "state": state,
        "previous": previous,
        "reason": reason or None,
    }


def _model_changes(old: View, new: View) -> Iterator[dict[str, Any]]:
    for model_id, model in new.models.items():
        before = old.models.get(model_id)
        if before is None or _told(before) != _told(model):
            yield {
                "type": "model",
                "model": model_id,
                "state": model.state.value,
                "previous": None if before is None else before.state.value,
                "reason": model.reason,
                "progress": model.progress,
                "fetch": None if model.fetch is None else fetch(model.fetch),
            }
    for model_id, model in old.models.items():
        if model_id not in new.models:
            yield {"type": "model_removed", "model": model_id, "previous": model.state.value}


def _told(model: ModelView) -> tuple[object, ...]:
    """What an event is made for; progress in whole per cent, so that it does not flood."""
    progress = None if model.progress is None else round(model.progress, 2)
    return (model.state, model.reason, progress)


class EventHub:
    """Fans changes out to subscribers. Synchronous; never waits for one of them."""

    def __init__(self, view: View, wall: Callable[[], float]) -> None:
        self._view = view
        self._wall = wall
        self._subscribers: set[asyncio.Queue[dict[str, Any]]] = set()
        self._closed = False

    def apply(self, view: View) -> None:
        found = changes(self._view, view)
        self._view = view
        for change in found:
            event = {**change, "at": round(self._wall(), 3)}
            for queue in tuple(self._subscribers):
                try:
                    queue.put_nowait(event)
                except asyncio.QueueFull:
                    self._subscribers.discard(queue)
                    queue.get_nowait()
                    queue.put_nowait(DROPPED)

    def close(self) -> None:
        """End every stream."""
        self._closed = True
        for queue in tuple(self._subscribers):
            self._subscribers.discard(queue)
            if queue.full():
                queue.get_nowait()
            queue.put_nowait({"type": "end", "reason": "this node is shutting down"})

    async def stream(self, request: BaseRequest, headers: dict[str, str]) -> StreamResponse:
        answer = StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store", **headers}
        )
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(QUEUE_LIMIT)
        if not self._closed:
            self._subscribers.add(queue)
        try:
            await answer.prepare(request)
            if request.method == "HEAD":
                return answer
            await answer.write(b": meshd\n\n")
            while queue in self._subscribers or not queue.empty():
                try:
                    async with asyncio.timeout(KEEP_ALIVE_S):
                        event = await queue.get()
                except TimeoutError:
                    await answer.write(b": still here\n\n")
                    continue
                await answer.write(
                    b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event))
                )
            await answer.write_eof()
        except ConnectionResetError:
            pass  # it went while we wrote
        finally:
            self._subscribers.discard(queue)
        return answer
