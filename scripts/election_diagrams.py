"""The state diagrams in docs/election.md, found by asking the machine.

Drives the real `Election` of one node through what can happen to one model beside one other node,
step by step until nothing new follows, and notes which event led from which state to which.
`python -m scripts.election_diagrams` writes the diagrams into the document.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from meshd.election.election import Election
from meshd.election.words import (
    CapacityMeasured,
    DeploymentsSeen,
    DrainAsked,
    EpochSaved,
    Event,
    HostReported,
    NodesSeen,
    Offer,
    OffersMade,
    SaveEpoch,
    Standing,
    StartHost,
    StopHost,
)
from meshd.ids import ModelId, NodeId
from meshd.kernel.machine import Tick
from meshd.view import Bid, Claim, ClaimState, Deployment, ModelState, Suits

DOCUMENT = Path(__file__).parent.parent / "docs" / "election.md"
NOBODY = "[*]"
"""No entry, no claim."""
MOST_STEPS = 20
"""Twice as many as it takes until nothing new follows."""

Transitions = Mapping[tuple[str, str], set[str]]
"""From which state to which, by which events."""

_M, _OWN, _OTHER = ModelId("m"), NodeId("own"), NodeId("other")
_WHOLE, _TOO_MUCH = {"GPU": 4}, {"GPU": 5}
_BID = Bid(_M, 9, Suits.YES)
_RECORDS = {
    "asked for": Deployment(_M, "ref", 1, _OWN),
    "with other options": Deployment(_M, "ref", 2, _OWN, context=4096),
    "pinned elsewhere": Deployment(_M, "ref", 3, _OWN, host=_OTHER),
    "unloaded": Deployment(_M, "ref", 4, _OWN, removed=True),
}
_SEEN = {
    "no other node": NodesSeen(()),
    "better candidate": NodesSeen(
        (Standing(_OTHER, "other", {_M: replace(_BID, weights=True)}, {}),)
    ),
    "another host": NodesSeen(
        (Standing(_OTHER, "other", {}, {_M: Claim(_M, 1000, ClaimState.READY, 0)}),)
    ),
}
_OFFERS = {
    "can host": OffersMade((Offer(_BID, _WHOLE),)),
    "cannot host": OffersMade((Offer(replace(_BID, suits=Suits.NO)),)),
    "bid too high": OffersMade((Offer(_BID, _TOO_MUCH),)),
}
_REPORTS = (ModelState.LOADING, ModelState.READY, ModelState.FAILED, ModelState.ABSENT)


@dataclass(frozen=True, slots=True)
class _Around:
    """What a machine was told last, and what it waits for."""

    record: str = ""
    seen: str = ""
    offers: str = ""
    drains: bool = False
    saving: int | None = None
    """The epoch that is on its way to the disk."""
    engine: str = ""
    """`runs`, `stops`, or nothing."""


@dataclass(slots=True)
class _Scene:
    """A machine after a story. It cannot be copied, so it is told the story again."""

    story: tuple[tuple[Event, float], ...] = ()
    around: _Around = _Around()
    now: float = 0.0
    machine: Election = field(init=False)

    def __post_init__(self) -> None:
        self.machine = Election(_OWN, "own", {})
        self.machine.handle(CapacityMeasured(_WHOLE), 0.0)
        for event, at in self.story[:-1]:
            self.machine.handle(event, at)
        for event, at in self.story[-1:]:
            for effect in self.machine.handle(event, at):
                match effect:
                    case SaveEpoch(_, epoch):
                        self.around = replace(self.around, saving=epoch)
                    case StartHost():
                        self.around = replace(self.around, engine="runs")
                    case StopHost():
                        self.around = replace(self.around, engine="stops")
                    case _:
                        pass

    @property
    def phase(self) -> str:
        hosted = self.machine.hosted.get(_M)
        return NOBODY if hosted is None else str(hosted.phase)

    @property
    def claim(self) -> str:
        hosted = self.machine.hosted.get(_M)
        said = None if hosted is None else hosted.claim
        return NOBODY if said is None else str(said.state)

    def key(self) -> object:
        """Equal for scenes from which the same can follow."""
        hosted = self.machine.hosted.get(_M)
        inside = None
        if hosted is not None:
            raising = hosted.raising is not None
            inside = hosted.phase, hosted.engine, raising, hosted.deployment.version
        around = replace(self.around, saving=None), self.around.saving is not None
        due = self.machine.due() is not None
        return inside, around, due, self.machine.ledger.holds(_M)

    def happenings(self) -> Iterator[tuple[str, Event, _Around]]:
        """What can happen next: in words, as an event, and how things stand then."""
        around = self.around
        for word, record in _RECORDS.items():
            if word != around.record:
                known = DeploymentsSeen((record,))
                yield word, known, replace(around, record=word)
        for word, seen in _SEEN.items():
            if word != around.seen:
                yield word, seen, replace(around, seen=word)
        for word, offers in _OFFERS.items():
            yield word, offers, replace(around, offers=word)
        drains = not around.drains
        yield "drain" if drains else "undrain", DrainAsked(drains), replace(around, drains=drains)
        if around.saving is not None:
            yield "epoch saved", EpochSaved(_M, around.saving), replace(around, saving=None)
        for state in _REPORTS if around.engine else ():
            gone = "" if state is ModelState.ABSENT else around.engine
            yield f"engine {state}", HostReported(_M, state), replace(around, engine=gone)
        if self.machine.due() is not None:
            yield "time", Tick(), around

    def after(self, event: Event, around: _Around) -> _Scene:
        due = self.machine.due() if isinstance(event, Tick) else None
        now = self.now if due is None else due
        return _Scene((*self.story, (event, now)), around, now)


def explored() -> tuple[Transitions, Transitions]:
    """Of the phases of a node's own entry, and of its claim as the others see it."""
    phases: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    claims: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    first = _Scene()
    known, edge = {first.key()}, [first]
    for _ in range(MOST_STEPS):
        found = []
        for scene in edge:
            for word, event, around in scene.happenings():
                after = scene.after(event, around)
                if after.phase != scene.phase:
                    phases[scene.phase, after.phase].add(word)
                if after.claim != scene.claim:
                    claims[scene.claim, after.claim].add(word)
                if (key := after.key()) not in known:
                    known.add(key)
                    found.append(after)
        if not found:
            return phases, claims
        edge = found
    raise RuntimeError(f"after {MOST_STEPS} steps there is still something new")


def diagram(transitions: Transitions) -> str:
    """In the words of Mermaid."""
    lines = [
        f"    {source} --> {target}: {', '.join(sorted(words))}"
        for (source, target), words in sorted(transitions.items())
    ]
    return "\n".join(("stateDiagram-v2", *lines)) + "\n"


def with_diagrams(text: str) -> str:
    """`text` with the diagrams between its markers made anew."""
    for name, transitions in zip(("phases", "claims"), explored(), strict=True):
        begin, end = (
            f"<!-- {name}: generated by scripts/election_diagrams.py -->",
            f"<!-- /{name} -->",
        )
        before, _, rest = text.partition(begin)
        _, marker, after = rest.partition(end)
        if not marker:
            raise ValueError(f"no place for {name}: {begin} … {end}")
        text = f"{before}{begin}\n```mermaid\n{diagram(transitions)}```\n{end}{after}"
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(with_diagrams(DOCUMENT.read_text()))
