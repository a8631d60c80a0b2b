"""Very many nodes and models without much trouble: what it costs, and whether it comes to rest."""

from __future__ import annotations

from collections.abc import Callable

from meshd.election.deployments import DeploymentBook, Rejected, Written
from meshd.ids import ModelId, NodeId
from tests.sim.placement.engines import Luck
from tests.sim.placement.judge import complaints
from tests.sim.placement.world import World

LOOK_S = 0.5
"""A thousand nodes have news all the time; each looks at it twice a second at most."""
LIMIT_S = 60.0
KILLED = 10


def crowd(seed: int, *, nodes: int, models: int) -> str:
    """All models are deployed at once on one node; when all are ready, `KILLED` hosts die
    together. How long both took in virtual time, in words; starts beyond what was needed are
    claims that crossed."""
    world = World(seed, nodes, look_s=LOOK_S, exchange_s=30.0)
    world.late = 0.0
    world.luck = Luck(slow=0.0, fail=0.0, crash=0.0, swell=0.0)
    world.begin(met=True)
    world.run(3.0)
    first = world.stations[0]
    first.write(lambda book: _load_all(book, models, first.id))
    loaded_s = _until(world, lambda: not _wrong(world))
    hosts = [station for station in world.up() if station.engines.running]
    killed = min(KILLED, len(hosts))
    for station in world.chance.sample(hosts, killed):
        world.crash(station, silent=False)
    replaced_s = _until(world, lambda: not _wrong(world))
    return (
        f"all ready after {loaded_s:.0f} s, all of {killed} dead hosts replaced after "
        f"{replaced_s:.0f} s of virtual time; {world.judge.starts} starts for "
        f"{models} models, {world.agenda.done} events"
    )


def _load_all(book: DeploymentBook, models: int, origin: NodeId) -> Written | Rejected:
    """At one moment. What became of the last one."""
    names = [ModelId(f"m{number}") for number in range(models)]
    return [book.load(model, ref=model, origin=origin) for model in names][-1]


def _until(world: World, condition: Callable[[], bool]) -> float:
    """Looked at once a second."""
    start = world.agenda.now
    while not condition():
        assert world.agenda.now - start < LIMIT_S, f"not within {LIMIT_S} s: {_wrong(world)[:5]}"
        world.run(1.0)
    return world.agenda.now - start


def _wrong(world: World) -> list[str]:
    [everybody] = world.components()
    return complaints(everybody, world.judge, demand={})
