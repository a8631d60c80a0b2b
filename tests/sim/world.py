"""Many membership machines, one heap of events, virtual time.

Stands in for the shell: it signs what a machine wants stated, dials where no link is, reports lost
links and refused dials. It checks after every event that no observer's knowledge of an incarnation
went back, and notes every death that was believed of a node that could be reached.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from meshd.ids import NodeId
from meshd.kernel.machine import Tick
from meshd.peers.swim.gossip import (
    Ack,
    Alive,
    DialRefused,
    Digest,
    Event,
    Gossip,
    LinkLost,
    MemberChanged,
    Message,
    MessageReceived,
    Nack,
    NodeMet,
    Ping,
    PingReq,
    SelfStated,
    Send,
    StateSelf,
    Sync,
    encoded_size,
)
from meshd.peers.swim.swim import Swim
from meshd.peers.swim.timing import LAN, Timing
from meshd.view import PeerState
from tests.sim.network import Conditions, Network


@dataclass(frozen=True, slots=True)
class Change:
    """A machine changed its mind about a node."""

    at: float
    observer: int
    subject: int
    old: PeerState | None
    new: PeerState | None


@dataclass(slots=True)
class Node:
    index: int
    id: NodeId
    machine: Swim
    boot: int = 1
    version: int = 1
    up: bool = True
    refuses: bool = False
    """Down in a way that answers: its machine resets connections and refuses dials."""
    broken: set[int] = field(default_factory=set)
    """Peers there is no link to: sending to them dials."""
    wakes_at: float | None = None
    incarnations: dict[NodeId, int] = field(default_factory=dict)

    def word(self, incarnation: int, *, left: bool = False) -> Alive:
        address = f"10.0.{self.index >> 8}.{self.index & 255}:9338"
        return Alive(self.id, incarnation, self.version, (address,), left, b"s" * 64)


class World:
    """`size` nodes that know each other and are linked, but for the last `outsiders`: they are
    running, and know nobody."""

    def __init__(
        self,
        seed: int,
        size: int,
        conditions: Conditions | None = None,
        timing: Timing = LAN,
        *,
        outsiders: int = 0,
    ) -> None:
        self.now = 0.0
        self.timing = timing
        self.chance = random.Random(seed)
        self.network = Network(conditions or Conditions(), random.Random(self.chance.random()))
        self.changes: list[Change] = []
        self.false_deaths: list[Change] = []
        self.messages = 0
        self.bytes = 0
        self.events = 0
        self._trace = hashlib.blake2b(digest_size=16)
        self._heap: list[tuple[float, int, int, int, Event]] = []
        self._count = 0
        self.nodes = [Node(i, _id(i), self._machine(_id(i))) for i in range(size)]
        self._by_id = {node.id: node.index for node in self.nodes}
        insiders = self.nodes[: size - outsiders]
        self._introduce(insiders)
        for node in self.nodes[len(insiders) :]:
            for insider in insiders:
                insider.broken.add(node.index)
            node.broken = {i for i in range(size) if i != node.index}
        for node in self.nodes:
            self.post(node.index, SelfStated(node.word(_first(node))))

    # -- what a test does to it -------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        self.run_until(lambda: False, seconds)

    def run_until(self, condition: Callable[[], bool], within_s: float) -> float | None:
        """Run until `condition`, looked at ten times a second; how long it took, or None."""
        start = self.now
        step = 0
        while not condition():
            if self.now - start >= within_s - 1e-9:
                return None
            step += 1
            self._run_to(min(start + 0.1 * step, start + within_s))
        return self.now - start

    def post(self, index: int, event: Event, delay: float = 0.0) -> None:
        self._count += 1
        entry = (self.now + delay, self._count, index, self.nodes[index].boot, event)
        heapq.heappush(self._heap, entry)

    def dial(self, one: int, other: int) -> None:
        """A link comes up, if both live and can reach each other."""
        a, b = self.nodes[one], self.nodes[other]
        reach = self.network.reaches(one, other) and self.network.reaches(other, one)
        if not (a.up and b.up and reach):
            return
        a.broken.discard(other)
        b.broken.discard(one)
        delay = self.network.latency()
        for node, peer in ((a, b), (b, a)):
            word = peer.machine.statement
            if word is not None:
                self.post(node.index, NodeMet(word), delay)

    def kill(self, index: int) -> None:
        """SIGKILL: the kernel resets its connections and refuses new ones."""
        self._stop(index, refuses=True)
        for peer in self.nodes:
            if peer.up and index not in peer.broken and peer.index != index:
                peer.broken.add(index)
                if self.network.reaches(index, peer.index):
                    self.post(peer.index, LinkLost(self.nodes[index].id), self.network.latency())

    def silence(self, index: int) -> None:
        """Power loss: nothing answers any more."""
        self._stop(index, refuses=False)

    def restart(self, index: int, seeds: Iterable[int]) -> None:
        """A new run with an empty table that dials `seeds`."""
        node = self.nodes[index]
        node.boot += 1
        node.up, node.refuses, node.wakes_at = True, False, None
        node.machine = self._machine(node.id)
        node.incarnations = {}
        node.broken = {i for i in range(len(self.nodes)) if i != index}
        for peer in self.nodes:
            peer.broken.add(index)
        self._handle(node, SelfStated(node.word(_first(node))))
        for seed in seeds:
            self.dial(index, seed)

    def leave(self, index: int) -> None:
        word = self.nodes[index].machine.statement
        assert word is not None
        self.post(index, SelfStated(self.nodes[index].word(word.incarnation, left=True)))

    # -- what a test asks -------------------------------------------------------------------------

    def up(self) -> list[Node]:
        return [node for node in self.nodes if node.up]

    def state(self, observer: int, subject: int) -> PeerState | None:
        member = self.nodes[observer].machine.members.get(self.nodes[subject].id)
        return member.state if member is not None else None

    def all_say(self, subject: int, state: PeerState) -> bool:
        """Whether every other running node says that of `subject`."""
        return all(
            self.state(node.index, subject) is state for node in self.up() if node.index != subject
        )

    def one_view(self, *, settled: bool = True) -> bool:
        """Whether every running node holds exactly the running nodes to be alive, of their present
        run. `settled`: also at their last word, and suspects nobody; under loss there is always a
        suspicion somewhere."""
        running = {n.id: n for n in self.up()}
        for node in running.values():
            if len(node.machine.members) < len(running) - 1:
                return False
            living = 0
            for member in node.machine.members.values():
                if not member.lives:
                    continue
                peer = running.get(member.node)
                if peer is None or member.incarnation >> 20 != peer.boot:
                    return False
                if settled and member.state is PeerState.SUSPECT:
                    return False
                if settled and member.statement != peer.machine.statement:
                    return False
                living += 1
            if living != len(running) - 1:
                return False
        return True

    def trace(self) -> str:
        """Over every event that was handled and every change of mind."""
        return self._trace.hexdigest()

    # -- the machinery ----------------------------------------------------------------------------

    def _introduce(self, nodes: Sequence[Node]) -> None:
        """Have `nodes` know each other, as if they had met long ago."""
        words = tuple(node.word(_first(node)) for node in nodes)
        for node in nodes:
            host = self.nodes[node.index - 1].id
            node.machine.handle(MessageReceived(host, Sync((), words, answer=False)), self.now)

    def _machine(self, node: NodeId) -> Swim:
        return Swim(node, self.timing, random.Random(self.chance.random()))

    def _run_to(self, end: float) -> None:
        heap = self._heap
        while heap and heap[0][0] <= end:
            self.now, _, index, boot, event = heapq.heappop(heap)
            node = self.nodes[index]
            if not node.up or node.boot != boot or self._was_reset(node, event):
                continue
            if type(event) is Tick:
                if node.wakes_at != self.now:
                    continue
                node.wakes_at = None
            self._handle(node, event)
        self.now = end

    def _was_reset(self, node: Node, event: Event) -> bool:
        """Whether the reset of a connection overtook what was on it."""
        if not isinstance(event, MessageReceived):
            return False
        sender = self.nodes[self._by_id[event.sender]]
        return sender.refuses and sender.index in node.broken

    def _handle(self, node: Node, event: Event) -> None:
        queue = [event]
        for current in queue:
            self.events += 1
            self._trace.update(f"{self.now:.9f} {node.index} {type(current).__name__}".encode())
            for effect in node.machine.handle(current, self.now):
                match effect:
                    case Send():
                        self._send(node, effect)
                    case StateSelf():
                        queue.append(SelfStated(node.word(effect.incarnation)))
                    case MemberChanged():
                        self._note(node, effect)
                    case _:
                        pass
            self._check(node, current)
        self._wake(node)

    def _wake(self, node: Node) -> None:
        due = node.machine.due()
        if due is not None and (node.wakes_at is None or due < node.wakes_at):
            node.wakes_at = max(due, self.now)
            self._count += 1
            heapq.heappush(self._heap, (node.wakes_at, self._count, node.index, node.boot, Tick()))

    def _send(self, node: Node, order: Send) -> None:
        self.messages += 1
        self.bytes += message_size(order.message)
        to = self._by_id.get(order.to)
        if to is None:
            return
        peer = self.nodes[to]
        if not peer.up:
            if peer.refuses and self.network.reaches(node.index, to):
                self.post(node.index, DialRefused(peer.id), self.network.latency())
            return
        if to in node.broken:
            self.dial(node.index, to)
        for delay in self.network.arrivals(node.index, to):
            self.post(to, MessageReceived(node.id, order.message), delay + 0.0001)

    def _stop(self, index: int, *, refuses: bool) -> None:
        node = self.nodes[index]
        node.up, node.refuses, node.wakes_at = False, refuses, None

    def _note(self, node: Node, effect: MemberChanged) -> None:
        subject = self._by_id[effect.node]
        change = Change(self.now, node.index, subject, effect.old, effect.new)
        self.changes.append(change)
        self._trace.update(f"{subject} {effect.old} {effect.new} {effect.why}".encode())
        if effect.new is None:
            node.incarnations.pop(effect.node, None)
        reach = self.network.reaches(subject, node.index)
        if effect.new is PeerState.DEAD and self.nodes[subject].up and reach:
            self.false_deaths.append(change)

    def _check(self, node: Node, event: Event) -> None:
        """No observer's knowledge of an incarnation goes back, whatever it heard just now."""
        if not isinstance(event, MessageReceived) or isinstance(event.message, Digest):
            return
        for update in event.message.updates:
            member = node.machine.members.get(update.node)
            if member is not None:
                before = node.incarnations.get(update.node, -1)
                assert member.incarnation >= before, (node.index, update, member)
                node.incarnations[update.node] = member.incarnation


def message_size(message: Message) -> int:
    """About how many bytes it takes as a frame of JSON."""
    match message:
        case Digest():
            return 64 + sum(len(str(n)) + 1 for n in message.buckets)
        case Sync():
            return 80 + sum(map(encoded_size, message.updates))
        case PingReq():
            return 110 + sum(map(encoded_size, message.updates))
        case Ping() | Ack() | Nack() | Gossip():
            return 48 + sum(map(encoded_size, message.updates))


def _id(index: int) -> NodeId:
    digest = hashlib.sha256(str(index).encode()).digest()
    return NodeId(base64.b32encode(digest).decode().lower().rstrip("="))


def _first(node: Node) -> int:
    return node.boot << 20
