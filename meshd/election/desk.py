"""What is asked of the mesh from outside: load, unload, plan, and models that requests name.

It writes records; who hosts is for the election of each node.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final, Literal

from meshd.election.appraisal import Appraiser
from meshd.election.bidding import BUILTIN, names_a_file
from meshd.election.deployments import Written
from meshd.election.explain import explain
from meshd.election.fit import budgets
from meshd.election.offering import NodeFacts, offers
from meshd.election.shapes import Shapes
from meshd.election.standings import myself, others
from meshd.election.table import Table
from meshd.election.words import Standing
from meshd.errors import BadReference, InvalidRequest, MeshdError, ModelNotFound
from meshd.ids import ModelId, NodeId
from meshd.kernel import Board
from meshd.view import Bid, Cause, ClaimState, Deployment, ModelState, PeerView, Role, View
from meshd.view.shape import ModelShape

log = logging.getLogger(__name__)

SHAPE_WAIT_S: Final = 1.0
"""How long a load waits for what the model needs before it is written without."""
FILE_ELSEWHERE: Final = "whether it has the file is not known before that is loaded"


@dataclass(frozen=True, slots=True)
class Wish:
    """What an operator asks for; see `Deployment`."""

    ref: str
    context: int | None = None
    parallel: int | None = None
    replicas: int | Literal["auto"] | None = None
    """None: as many as before, else one."""
    host: str | None = None
    """Name of a node, or its id."""
    split: bool = False


class Desk:
    """`identify`: REF to the name clients use, and to the one way of writing that REF; raises
    BadReference. `find_node`: name to id; raises NotFound. `bid`: of this node, for what need not
    be deployed."""

    def __init__(
        self,
        board: Board[View],
        table: Table,
        shapes: Shapes,
        appraiser: Appraiser,
        *,
        on_demand: bool,
        identify: Callable[[str], tuple[ModelId, str]],
        find_node: Callable[[str], NodeId],
        demand: Callable[[], Mapping[ModelId, int]],
        bid: Callable[[Deployment], Bid],
    ) -> None:
        self._board = board
        self._table = table
        self._shapes = shapes
        self._appraiser = appraiser
        self._on_demand = on_demand
        self._identify = identify
        self._find_node = find_node
        self._demand = demand
        self._bid = bid

    async def load(self, wish: Wish, cause: Cause = Cause.OPERATOR) -> ModelId:
        """Deploy a model; where it runs and how far it is, is in the view. Raises BadReference,
        NotFound, InvalidRequest."""
        self._refuse_client()
        model, ref = self._identify(wish.ref)
        host = None if wish.host is None else self._node(wish.host)
        shape = await self._shape(model, ref, elsewhere=host not in (None, self._own))
        before = self._table.book.get(model)  # others may have written meanwhile
        written = self._table.book.load(
            model,
            ref,
            self._own,
            cause=cause,
            replicas=_replicas(wish, before),
            context=wish.context,
            parallel=wish.parallel,
            host=host,
            split=wish.split,
            shape=shape,
        )
        record = self._table.written(written)
        if isinstance(written, Written) and not written.changed and self._failed(record):
            self._table.written(self._table.book.renew(model, self._own))
        return record.model

    def unload(self, name: str) -> ModelId:
        """Let no node serve the model of that name or REF. Raises ModelNotFound."""
        self._refuse_client()
        model = self.deployed(name)
        self._table.written(self._table.book.unload(model, self._own))
        return model

    def deployed(self, name: str) -> ModelId:
        """The model that is deployed under that name or REF. Raises ModelNotFound."""
        record = self._deployed(name)
        if record is None:
            names = ", ".join(r.model for r in self._table.book.records if not r.removed) or "none"
            raise ModelNotFound(f"no model `{name}` is loaded; loaded are: {names}")
        return record.model

    def missing(self, name: str) -> bool:
        """A request named what nobody serves: whether it is going to be served."""
        if self._board.current.node.role == Role.CLIENT.value:
            return False
        record = self._table.book.get(ModelId(name))
        try:
            if record is not None and not record.removed:
                if record.asleep:
                    self._table.written(self._table.book.wake(record.model, self._own))
                return record.asleep
            return self._on_demand and self._load_from_disk(ModelId(name))
        except InvalidRequest as error:
            log.warning("%s cannot be loaded on demand: %s", name, error.message)
            return False

    async def plan(self, ref: str) -> dict[str, Any]:
        """Where a model is, or would be, and why. Raises BadReference, ModelNotFound, and whatever
        keeps what it needs from being known."""
        record = self._deployed(ref)
        view = self._board.current
        nodes = (myself(view), *others(view))
        deployed = record is not None
        if record is None:
            model, ref = self._identify(ref)
            shape = await self._shapes.find(ref)
            record = Deployment(model, ref, 1, self._own, shape=shape)
            nodes = tuple(self._would(record, node) for node in nodes)
        estimate = self._appraiser.counted(record)
        told = None
        if estimate is not None:
            told = {
                "weights_bytes": estimate.weights + estimate.projector,
                "cache_bytes": estimate.cache,
                "compute_bytes": estimate.compute,
                "prompts_bytes": estimate.prompts,
                "context": estimate.context,
                "slots": estimate.slots,
            }
        plan = explain(record, nodes, self._demand()).as_json()
        return {"ref": record.ref, "deployed": deployed, "shape": told, **plan}

    def planned(self, name: str) -> dict[str, Any]:
        """The same for what is deployed, at once. Raises ModelNotFound."""
        record = self._deployed(name)
        if record is None:
            raise ModelNotFound(
                f"`{name}` is not deployed; `meshd plan {name}` says what would become of it"
            )
        view = self._board.current
        plan = explain(record, (myself(view), *others(view)), self._demand())
        return {"ref": record.ref, "deployed": True, **plan.as_json()}

    # -- what is known ----------------------------------------------------------------------------

    @property
    def _own(self) -> NodeId:
        return self._board.current.node.id

    def _refuse_client(self) -> None:
        if self._board.current.node.role == Role.CLIENT.value:
            raise InvalidRequest("a client node hosts no models; load it on a member", param="ref")

    def _node(self, name: str) -> NodeId:
        node = self._board.current.node
        found = node.id if name in (node.name, node.id) else self._find_node(name)
        if any(p.id == found and p.role is Role.CLIENT for p in self._board.current.peers):
            raise InvalidRequest(f"{name} is a client node, which hosts nothing", param="host")
        return found

    def _deployed(self, name: str) -> Deployment | None:
        """By its name or REF."""
        records = [r for r in self._table.book.records if not r.removed]
        for record in records:
            if name in (record.model, record.ref):
                return record
        try:
            model, ref = self._identify(name)
        except BadReference:
            return None
        return next((r for r in records if (r.model, r.ref) == (model, ref)), None)

    def _failed(self, record: Deployment) -> bool:
        view = self._board.current
        claims = [*view.claims, *(c for p in view.peers for c in p.claims)]
        return self._shapes.problem(record) is not None or any(
            c.model == record.model and c.state is ClaimState.FAILED for c in claims
        )

    async def _shape(self, model: ModelId, ref: str, *, elsewhere: bool) -> ModelShape | None:
        """If it is known soon. A file that is not there is no model, unless another node is meant
        by it."""
        known = self._table.book.get(model)
        if known is not None and known.ref == ref and known.shape is not None:
            return known.shape
        try:
            async with asyncio.timeout(SHAPE_WAIT_S):
                return await self._shapes.find(ref)
        except TimeoutError:
            return None
        except BadReference:
            if elsewhere:
                return None
            raise
        except MeshdError as error:
            log.info("what %s needs is not known yet: %s", ref, error.message)
            return None

    def _load_from_disk(self, model: ModelId) -> bool:
        """A node says that it has the weights."""
        seen = self._board.current.models.get(model)
        if seen is None or seen.state is not ModelState.ABSENT:
            return False
        record = self._table.written(
            self._table.book.load(model, seen.ref, self._own, cause=Cause.DEMAND)
        )
        return not record.removed

    def _would(self, deployment: Deployment, node: Standing) -> Standing:
        """`node` with a bid for what is not deployed: its own if it is this one, else made up from
        what it says of its devices."""
        view = self._board.current
        peer = next((p for p in view.peers if p.id == node.node), None)
        bid = self._bid(deployment) if peer is None else self._guess(deployment, peer)
        return replace(node, bids=MappingProxyType({deployment.model: bid}))

    def _guess(self, deployment: Deployment, peer: PeerView) -> Bid:
        memories = budgets(peer.devices)
        digests = {w.digest for w in self._board.current.weights if w.model == deployment.model}
        held = not digests.isdisjoint(peer.weights) or deployment.model == BUILTIN
        facts = NodeFacts(
            capacity={memory.device: memory.usable for memory in memories},
            weights=(deployment.model,) if held else (),
        )
        (offer,) = offers(
            (deployment,),
            facts,
            lambda _, free: self._appraiser.fit(deployment, memories, free, digest=None, engine=""),
            0.0,
            bar=FILE_ELSEWHERE if names_a_file(deployment.ref) else None,
        )
        return offer.bid


def _replicas(wish: Wish, before: Deployment | None) -> int | None:
    if wish.replicas == "auto":
        return None
    if wish.replicas is None:
        return 1 if before is None or before.removed else before.replicas
    return wish.replicas
