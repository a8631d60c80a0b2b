"""Short stories about a mesh, each with the bounds that it must keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from meshd.view import PeerState
from tests.sim.network import Conditions
from tests.sim.world import World

CALM = Conditions()
ROUGH = Conditions(loss=0.05, duplication=0.05, jitter_s=0.01)
LOSSY = Conditions(loss=0.2, duplication=0.05)

KILL_S = 1.5
"""The goals of the design, on a LAN without loss."""
SILENCE_S = 4.0
HEAL_S = 5.0
LOSS_ALLOWANCE_S = 4.0
"""What a fifth of all messages lost may add."""


@dataclass(frozen=True, slots=True)
class Story:
    seed: int
    size: int
    conditions: Conditions

    @property
    def allowance_s(self) -> float:
        return LOSS_ALLOWANCE_S if self.conditions.loss else 0.0

    def world(self) -> World:
        """Running, at a moment that no timer knows."""
        world = World(self.seed, self.size, self.conditions)
        world.run(1.0 + world.chance.random())
        return world


def killed_and_restarted(story: Story) -> World:
    """SIGKILL is known to all in time, though few have a link that could break; the next run is
    itself again, at once."""
    world = story.world()
    for node in world.nodes[4:]:
        node.broken.add(0)
    world.kill(0)
    _within(world, lambda: world.all_say(0, PeerState.DEAD), KILL_S + story.allowance_s, "death")
    world.run(0.5)
    world.restart(0, seeds=[1])
    _within(world, lambda: _one_view(world, story), 1.5 + story.allowance_s, "return")
    return _checked(world)


def silenced(story: Story) -> World:
    """A node that just stops answering is known dead to all in time."""
    world = story.world()
    world.silence(0)
    _within(world, lambda: world.all_say(0, PeerState.DEAD), SILENCE_S + story.allowance_s, "death")
    return _checked(world)


def split_and_healed(story: Story) -> World:
    """Two halves bury each other, and are one again soon after they can."""
    world = story.world()
    half = story.size // 2
    one, other = list(range(half)), list(range(half, story.size))
    world.network.split(one, other)
    _within(world, lambda: _buried(world, one, other), 12.0, "two views")
    world.run(2.0)
    world.network.heal()
    _within(world, lambda: _one_view(world, story), HEAL_S + story.allowance_s, "one view")
    return _checked(world)


def cut_off(story: Story) -> World:
    """One node loses its network: the others bury it in time, and it them not much later."""
    world = story.world()
    others = list(range(1, story.size))
    world.network.split([0], others)
    _within(world, lambda: world.all_say(0, PeerState.DEAD), SILENCE_S + story.allowance_s, "death")
    _within(world, lambda: _buried(world, [0], others), SILENCE_S + story.allowance_s, "solitude")
    world.run(2.0)
    world.network.heal()
    _within(world, lambda: _one_view(world, story), HEAL_S + story.allowance_s, "one view")
    return _checked(world)


def left(story: Story) -> World:
    """A node that goes is LEFT to all, and nobody takes it for dead."""
    world = story.world()
    world.leave(0)
    world.run(0.6 if story.conditions.loss else 0.05)  # a farewell that is lost is said again
    world.kill(0)
    _within(world, lambda: world.all_say(0, PeerState.LEFT), 1.5 + story.allowance_s, "farewell")
    world.run(2.0)
    assert world.all_say(0, PeerState.LEFT)
    return _checked(world)


def restarted_at_once(story: Story) -> World:
    """A run that follows the one before faster than anyone can bury it."""
    world = story.world()
    world.kill(0)
    world.run(0.05)
    world.restart(0, seeds=[1])
    _within(world, lambda: _one_view(world, story), 1.5 + story.allowance_s, "return")
    return _checked(world)


def half_deaf(story: Story) -> World:
    """One direction between two nodes is cut: the others vouch for them."""
    world = story.world()
    world.network.cut([0], [1])
    world.run(6.0)
    world.network.heal()
    _within(world, lambda: _one_view(world, story), 1.0 + story.allowance_s, "one view")
    return _checked(world)


def troubled(story: Story) -> World:
    """Faults in any order, some over each other; when they end there is one view.

    Here a node may be believed dead that can be reached again by then, so only the end is judged.
    """
    world = story.world()
    everyone = list(range(story.size))
    for _ in range(6):
        match world.chance.randrange(5):
            case 0:
                some = world.chance.sample(everyone, max(1, story.size // 3))
                world.network.split(some, [i for i in everyone if i not in some])
            case 1:
                world.network.heal()
            case 2:
                world.kill(world.chance.choice(everyone))
            case 3:
                world.silence(world.chance.choice(everyone))
            case _:
                index = world.chance.choice(everyone)
                world.restart(index, world.chance.sample(everyone, 2))
        world.run(3.0 * world.chance.random())
    world.network.heal()
    for node in world.nodes:
        others = [i for i in everyone if i != node.index]
        if not node.up:
            world.restart(node.index, others)
        elif not node.machine.members:
            # Restarted while cut off: the shell goes on dialling what it remembers.
            for other in others:
                world.dial(node.index, other)
    limit_s = HEAL_S + SILENCE_S + story.allowance_s
    _within(world, lambda: _one_view(world, story), limit_s, "one view")
    return world


STORIES: tuple[Callable[[Story], World], ...] = (
    killed_and_restarted,
    silenced,
    split_and_healed,
    cut_off,
    left,
    restarted_at_once,
    half_deaf,
    troubled,
)


def _within(world: World, condition: Callable[[], bool], limit_s: float, what: str) -> None:
    assert world.run_until(condition, limit_s) is not None, f"no {what} within {limit_s} s"


def _one_view(world: World, story: Story) -> bool:
    return world.one_view(settled=not story.conditions.loss)


def _buried(world: World, one: list[int], other: list[int]) -> bool:
    return all(
        world.state(a, b) is PeerState.DEAD and world.state(b, a) is PeerState.DEAD
        for a in one
        for b in other
    )


def _checked(world: World) -> World:
    assert not world.false_deaths, world.false_deaths[:3]
    return world
