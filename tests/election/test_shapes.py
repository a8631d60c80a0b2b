"""What deployed models need of memory: who finds it out, how often, and until when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from meshd.election.shapes import BACKOFF_S, Shapes
from meshd.errors import BadReference, HubUnavailable, MeshdError
from meshd.ids import NodeId
from meshd.kernel import ManualClock
from meshd.view import Deployment, ModelState, PeerState, Preparing, Role, WeightsView
from meshd.view.shape import ModelShape
from tests.election.rooms import LLAMA, OTHER, OWN, QWEN, SHAPE, a_peer, a_view, turns

WISH = Deployment(LLAMA, "org/llama", 1, OWN)


class Desk:
    """Shapes over a scripted source, with all that was found."""

    def __init__(self) -> None:
        self.clock = ManualClock(100.0)
        self.answers: list[ModelShape | MeshdError] = []
        """Of `find`, in turn; the last one goes on."""
        self.found: list[tuple[Deployment, ModelShape]] = []
        self.asked: list[str] = []
        self.prepared: list[str] = []
        self.prepare: Callable[[Callable[[Preparing], None]], Awaitable[object]] | None = None
        self.news = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.shapes = Shapes(
            self._find,
            self._prepare,
            clock=self.clock,
            spawn=self._spawn,
            found=lambda deployment, shape: self.found.append((deployment, shape)),
            changed=self._changed,
        )

    async def look(self, *records: Deployment, **changes: object) -> None:
        self.shapes.look(records, replace(a_view(), **changes))  # type: ignore[arg-type]
        await turns()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def _changed(self) -> None:
        self.news += 1

    async def _find(self, ref: str) -> ModelShape:
        self.asked.append(ref)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, MeshdError):
            raise answer
        return answer

    async def _prepare(self, ref: str, moved: Callable[[Preparing], None]) -> object:
        self.prepared.append(ref)
        assert self.prepare is not None
        return await self.prepare(moved)


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    made = Desk()
    yield made
    for task in tuple(made.tasks):
        task.cancel()
    await asyncio.gather(*made.tasks, return_exceptions=True)


async def refuse(moved: Callable[[Preparing], None]) -> object:
    raise HubUnavailable("the hub is away")


async def test_headers_are_enough(desk: Desk) -> None:
    desk.answers = [SHAPE]
    await desk.look(WISH)
    assert desk.found == [(WISH, SHAPE)]
    assert (desk.asked, desk.prepared, desk.news) == (["org/llama"], [], 0)


async def test_weights_are_made_whole_where_headers_cannot_be_read(desk: Desk) -> None:
    desk.answers = [HubUnavailable("no headers"), SHAPE]
    go = asyncio.Event()

    async def prepare(moved: Callable[[Preparing], None]) -> object:
        moved(Preparing(ModelState.FETCHING, "fetching", 0.5))
        return await go.wait()

    desk.prepare = prepare
    await desk.look(WISH)
    assert desk.shapes.preparing(LLAMA) == Preparing(ModelState.FETCHING, "fetching", 0.5)
    assert (desk.news, desk.found) == (1, [])
    await desk.look(WISH)
    assert desk.prepared == ["org/llama"], "it is under way"
    go.set()
    await turns()
    assert desk.found == [(WISH, SHAPE)]
    assert desk.shapes.preparing(LLAMA) is None


async def test_trouble_that_passes_is_waited_for_longer_and_longer(desk: Desk) -> None:
    desk.answers, desk.prepare = [HubUnavailable("no headers")], refuse
    for attempt, wait_s in enumerate((*BACKOFF_S, BACKOFF_S[-1]), start=1):
        await desk.look(WISH)
        problem = desk.shapes.problem(WISH)
        assert problem is not None
        assert (problem.words, problem.attempts) == ("the hub is away", attempt)
        assert problem.retry_at == desk.clock.now() + wait_s
        desk.clock.advance(wait_s - 0.1)
        await desk.look(WISH)
        assert len(desk.prepared) == attempt
        desk.clock.advance(0.2)
    assert desk.shapes.changes == len(BACKOFF_S) + 1
    desk.answers = [SHAPE]
    await desk.look(WISH)
    assert desk.found == [(WISH, SHAPE)]
    assert desk.shapes.problem(WISH) is None


async def test_a_hub_that_says_when_is_not_asked_before(desk: Desk) -> None:
    async def busy(moved: Callable[[Preparing], None]) -> object:
        raise HubUnavailable("too many requests", retry_after_s=90.0)

    desk.answers, desk.prepare = [HubUnavailable("no headers")], busy
    await desk.look(WISH)
    problem = desk.shapes.problem(WISH)
    assert problem is not None
    assert problem.retry_at == desk.clock.now() + 90.0


async def test_trouble_that_does_not_pass_ends_with_a_new_record(desk: Desk) -> None:
    async def never(moved: Callable[[Preparing], None]) -> object:
        raise BadReference("no such repository")

    desk.answers, desk.prepare = [BadReference("no such repository")], never
    await desk.look(WISH)
    problem = desk.shapes.problem(WISH)
    assert problem is not None
    assert problem.retry_at is None
    desk.clock.advance(1e6)
    await desk.look(WISH)
    assert len(desk.prepared) == 1
    renewed = replace(WISH, version=2)
    assert desk.shapes.problem(renewed) is None
    desk.answers = [SHAPE]
    await desk.look(renewed)
    assert desk.found == [(renewed, SHAPE)]


@pytest.mark.parametrize(
    "after",
    [
        (),
        (replace(WISH, version=2, removed=True),),
        (replace(WISH, version=2, shape=SHAPE),),
        (replace(WISH, version=2, ref="other/llama"),),
    ],
    ids=["gone", "removed", "known", "another"],
)
async def test_weights_are_not_fetched_for_what_stands_no_more(
    desk: Desk, after: tuple[Deployment, ...]
) -> None:
    async def fetch(moved: Callable[[Preparing], None]) -> object:
        moved(Preparing(ModelState.FETCHING, "fetching"))
        return await asyncio.Event().wait()

    desk.answers, desk.prepare = [HubUnavailable("no headers")], fetch
    await desk.look(WISH)
    desk.answers = [SHAPE]
    await desk.look(*after)
    assert desk.shapes.preparing(LLAMA) is None
    assert desk.tasks == set()
    assert [(d.ref, s) for d, s in desk.found] == [
        (d.ref, SHAPE) for d in after if d.shape is None and not d.removed
    ]


async def test_problems_of_what_was_unloaded_are_forgotten(desk: Desk) -> None:
    desk.answers, desk.prepare = [HubUnavailable("no headers")], refuse
    await desk.look(WISH)
    await desk.look()
    assert desk.shapes.problem(WISH) is None


async def test_a_new_record_is_read_while_an_old_one_is_under_way(desk: Desk) -> None:
    """Same model, same REF: what is under way serves both."""
    go = asyncio.Event()

    async def fetch(moved: Callable[[Preparing], None]) -> object:
        return await go.wait()

    desk.answers, desk.prepare = [HubUnavailable("no headers"), SHAPE], fetch
    await desk.look(WISH)
    await desk.look(replace(WISH, version=2))
    assert desk.prepared == ["org/llama"]
    go.set()
    await turns()
    assert [s for _, s in desk.found] == [SHAPE]


# -- who reads ------------------------------------------------------------------------------------

BETA = a_peer()
WEIGHTS = WeightsView(LLAMA, "org/llama", "sha256:1", 5)


@pytest.mark.parametrize(
    ("record", "view", "reads"),
    [
        (WISH, {"peers": (BETA,)}, True),
        (replace(WISH, origin=OTHER), {"peers": (BETA,)}, False),
        (replace(WISH, origin=OTHER), {"peers": (BETA,), "weights": (WEIGHTS,)}, True),
        (replace(WISH, origin=OTHER), {}, True),
        (replace(WISH, origin=OTHER), {"peers": (replace(BETA, state=PeerState.DEAD),)}, True),
        (replace(WISH, host=OTHER), {"peers": (BETA,)}, False),
        (replace(WISH, host=OTHER), {}, True),
        (replace(WISH, origin=OTHER, host=OWN), {"peers": (BETA,)}, True),
        (replace(WISH, removed=True), {}, False),
        (replace(WISH, shape=SHAPE), {}, False),
        (WISH, {"node": a_view(role=Role.CLIENT).node}, False),
    ],
    ids=[
        "the writer", "not its own", "who has the weights", "the writer left", "the writer is dead",
        "not the host", "the host is gone", "the host", "removed", "known", "a client",
    ],
)  # fmt: skip
async def test_one_node_reads(
    desk: Desk, record: Deployment, view: dict[str, object], reads: bool
) -> None:
    desk.answers = [SHAPE]
    await desk.look(record, **view)
    assert bool(desk.asked) is reads


async def test_the_first_of_all_nodes_reads_for_one_that_left(desk: Desk) -> None:
    desk.answers = [SHAPE]
    gone = replace(WISH, origin=OTHER)
    before = replace(BETA, id=NodeId("2" * 52))
    await desk.look(gone, peers=(replace(before, role=Role.CLIENT),))
    assert desk.asked == ["org/llama"], "a client reads nothing"
    await desk.look(replace(gone, model=QWEN, ref="org/qwen"), peers=(before,))
    assert desk.asked == ["org/llama"]
