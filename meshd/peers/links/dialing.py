"""Whom to dial and when: bounded in parallel, with back-off, and only as far as it is needed.

A pure machine over two kinds of wishes. A *seed* is an address somebody proposed (an invite, the
command line, the LAN, memory of last time): it is tried again with growing pauses until a link to
whoever answers there stands, and forgotten when it turns out to be this node itself. A *call* is
for one node of the mesh whose link is needed now: its addresses are tried one after the other,
once; membership asks again if it still wants to.

Rules, in order:

1. Never more than `parallel` dials at once, never two to one address, never one to a node that has
   a link.
2. Calls go before seeds.
3. A seed that failed waits `RETRY_MIN_S`, doubling up to `RETRY_MAX_S`; while other members are
   reachable it waits `RETRY_MAX_S` at once: the mesh itself will tell of the others.
4. A node that was just dialled without success is not called again for `CALL_PAUSE_S`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias, assert_never

from meshd.ids import NodeId
from meshd.kernel.machine import Tick

RETRY_MIN_S: Final = 0.5
RETRY_MAX_S: Final = 30.0
CALL_PAUSE_S: Final = 0.1
MAX_SEEDS: Final = 512
"""Addresses that are proposed by others (mDNS above all); the oldest proposal makes way."""
MAX_CALLS: Final = 1024


@dataclass(frozen=True, slots=True)
class Proposed:
    """Somebody may listen at `address`. `asked`: by a person, so it is never pushed out."""

    address: str
    asked: bool = False


@dataclass(frozen=True, slots=True)
class Called:
    """A link to `node` is needed; `addresses`: HOST:PORT, most promising first."""

    node: NodeId
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DialSucceeded:
    """The dial of `address` reached `node`; a link to it stands."""

    address: str
    node: NodeId


@dataclass(frozen=True, slots=True)
class DialFailed:
    address: str
    for_good: bool = False
    """It is this node's own address, or the node there refused this one: do not try it again."""
    refused: bool = False
    """The machine answered that nobody listens there."""


@dataclass(frozen=True, slots=True)
class LinkCame:
    """A link to `node` stands, whoever dialled it."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class LinkWent:
    node: NodeId


Event: TypeAlias = Proposed | Called | DialSucceeded | DialFailed | LinkCame | LinkWent | Tick


@dataclass(frozen=True, slots=True)
class Dial:
    """Start a dial; it ends in exactly one DialSucceeded or DialFailed of that address."""

    address: str
    expected: NodeId | None
    """Who must answer there; None for a seed."""


@dataclass(frozen=True, slots=True)
class NobodyListens:
    """Every address `node` was called at answered that nobody listens: one that did so alone may
    be somebody else's."""

    node: NodeId


Effect: TypeAlias = Dial | NobodyListens


@dataclass(slots=True)
class _Seed:
    asked: bool
    next_at: float
    pause_s: float = RETRY_MIN_S
    reached: NodeId | None = None


@dataclass(slots=True)
class _Call:
    waiting: list[str]
    current: str | None = None
    all_refused: bool = True
    rest_until: float = 0.0


@dataclass(slots=True)
class Dialing:
    """See the module's docstring."""

    parallel: int = 8
    _seeds: OrderedDict[str, _Seed] = field(default_factory=OrderedDict)
    _calls: OrderedDict[NodeId, _Call] = field(default_factory=OrderedDict)
    _dialling: dict[str, NodeId | None] = field(default_factory=dict)
    _linked: set[NodeId] = field(default_factory=set)

    def handle(self, event: Event, now: float) -> Sequence[Effect]:
        ended: list[Effect] = []
        match event:
            case Proposed():
                self._propose(event, now)
            case Called():
                self._call(event, now)
            case DialSucceeded():
                self._succeeded(event)
            case DialFailed():
                ended = self._failed(event, now)
            case LinkCame():
                self._linked.add(event.node)
                self._calls.pop(event.node, None)
            case LinkWent():
                self._went(event.node, now)
            case Tick():
                pass
            case _:
                assert_never(event)
        return [*ended, *self._start(now)]

    def due(self) -> float | None:
        if len(self._dialling) >= self.parallel:
            return None
        return min(
            (s.next_at for a, s in self._seeds.items() if self._idle_seed(a, s)), default=None
        )

    @property
    def seeds(self) -> tuple[str, ...]:
        """Every address that is still proposed."""
        return tuple(self._seeds)

    # -- steps ------------------------------------------------------------------------------------

    def _propose(self, event: Proposed, now: float) -> None:
        seed = self._seeds.get(event.address)
        if seed is not None:
            seed.asked = seed.asked or event.asked
            return
        if len(self._seeds) >= MAX_SEEDS:
            victim = next((a for a, s in self._seeds.items() if not s.asked), None)
            if victim is None:
                return
            del self._seeds[victim]
        self._seeds[event.address] = _Seed(event.asked, now)

    def _call(self, event: Called, now: float) -> None:
        if event.node in self._linked:
            return
        call = self._calls.get(event.node)
        if call is None:
            if len(self._calls) >= MAX_CALLS:
                self._calls.popitem(last=False)
            call = self._calls[event.node] = _Call([])
        if call.current is None and not call.waiting and now >= call.rest_until:
            call.waiting = list(event.addresses)
            call.all_refused = True

    def _succeeded(self, event: DialSucceeded) -> None:
        self._dialling.pop(event.address, None)
        seed = self._seeds.get(event.address)
        if seed is not None:
            seed.reached, seed.pause_s = event.node, RETRY_MIN_S
        self._linked.add(event.node)
        self._calls.pop(event.node, None)

    def _failed(self, event: DialFailed, now: float) -> list[Effect]:
        expected = self._dialling.pop(event.address, None)
        seed = self._seeds.get(event.address)
        if seed is not None:
            if event.for_good:
                del self._seeds[event.address]
            else:
                seed.next_at = now + (RETRY_MAX_S if self._linked else seed.pause_s)
                seed.pause_s = min(RETRY_MAX_S, 2 * seed.pause_s)
        call = self._calls.get(expected) if expected is not None else None
        if call is None or expected is None:
            return []
        call.current = None
        call.all_refused = call.all_refused and event.refused
        if call.waiting:
            return []
        call.rest_until = now + CALL_PAUSE_S
        return [NobodyListens(expected)] if call.all_refused else []

    def _went(self, node: NodeId, now: float) -> None:
        self._linked.discard(node)
        for seed in self._seeds.values():
            if seed.reached == node:
                seed.reached, seed.next_at = None, now + RETRY_MIN_S

    def _start(self, now: float) -> list[Effect]:
        dials: list[Effect] = []
        for node, call in self._calls.items():  # 2
            while call.current is None and call.waiting and self._room():
                address = call.waiting.pop(0)
                if address not in self._dialling:
                    call.current = address
                    dials.append(self._dial(address, node))
        for address, seed in self._seeds.items():
            if not self._room():
                break
            if self._idle_seed(address, seed) and seed.next_at <= now:
                dials.append(self._dial(address, None))
        return dials

    def _room(self) -> bool:
        return len(self._dialling) < self.parallel  # 1

    def _idle_seed(self, address: str, seed: _Seed) -> bool:
        return address not in self._dialling and seed.reached not in self._linked

    def _dial(self, address: str, expected: NodeId | None) -> Dial:
        self._dialling[address] = expected
        return Dial(address, expected)
