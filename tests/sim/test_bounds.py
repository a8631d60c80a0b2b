"""What the stories do not tell: long calm under loss, big meshes, equal seeds, flat rates."""

from __future__ import annotations

import pytest

from meshd.view import PeerState
from tests.sim.network import Conditions
from tests.sim.rates import measure, table
from tests.sim.scenarios import LOSSY, STORIES, Story, killed_and_restarted, silenced, troubled
from tests.sim.world import World

FLAT = 0.2
LOSS = Conditions(loss=0.2)


def test_equal_seeds_give_equal_traces_and_others_do_not() -> None:
    traces = [troubled(Story(seed, 8, LOSSY)).trace() for seed in (5, 5, 6)]
    assert traces[0] == traces[1]
    assert traces[0] != traces[2]


@pytest.mark.parametrize(("size", "seconds"), [(2, 120), (3, 120), (8, 60), (32, 10)])
def test_a_fifth_of_all_messages_lost_kills_nobody(size: int, seconds: float) -> None:
    assert_nobody_dies(size, seconds)


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 8, 32])
def test_ten_minutes_of_loss_kill_nobody(size: int) -> None:
    assert_nobody_dies(size, 600)


def assert_nobody_dies(size: int, seconds: float) -> None:
    world = World(size, size, LOSS)
    world.run(seconds)
    assert world.false_deaths == []
    # The loss was felt, and refuted.
    assert any(change.new is PeerState.SUSPECT for change in world.changes)
    assert world.one_view(settled=False)


def test_no_change_of_mind_without_faults() -> None:
    world = World(1, 32)
    world.run(20)
    assert world.changes == []
    assert world.one_view()


@pytest.mark.parametrize(
    ("size", "within_s"), [(64, 1.0), pytest.param(1000, 2.0, marks=pytest.mark.slow)]
)
def test_a_newcomer_knows_all_and_is_known_to_all_at_once(size: int, within_s: float) -> None:
    world = World(3, size, outsiders=1)
    world.run(1.0)
    world.dial(size - 1, 7)
    assert world.run_until(world.one_view, within_s) is not None


def test_strangers_become_one_mesh() -> None:
    """Nodes that know nobody, each of which dials one other."""
    world = World(4, 16, outsiders=16)
    world.run(0.01)
    for node in world.nodes[1:]:
        world.dial(node.index, node.index // 2)
    assert world.run_until(world.one_view, 5.0) is not None


def test_rates_are_flat_from_32_to_256() -> None:
    small, large = measure(32), measure(256, measure_s=4.0)
    assert large.messages == pytest.approx(small.messages, rel=FLAT)
    assert large.bytes == pytest.approx(small.bytes, rel=FLAT)


@pytest.mark.slow
def test_rates_are_flat_from_32_to_1000(capsys: pytest.CaptureFixture[str]) -> None:
    rates = {size: measure(size) for size in (3, 32, 256, 1000)}
    with capsys.disabled():
        print(f"\n{table(rates.values())}")  # noqa: T201
    for size in (256, 1000):
        assert rates[size].messages == pytest.approx(rates[32].messages, rel=FLAT)
        assert rates[size].bytes == pytest.approx(rates[32].bytes, rel=FLAT)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_stories_of_256(seed: int) -> None:
    for play in (killed_and_restarted, silenced):
        play(Story(seed, 256, Conditions()))


@pytest.mark.slow
def test_a_death_among_a_thousand() -> None:
    silenced(Story(1, 1000, Conditions()))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1006))
def test_every_story_in_32(seed: int) -> None:
    for play in STORIES:
        play(Story(seed, 32, LOSSY if seed % 2 else Conditions()))
