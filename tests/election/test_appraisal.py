"""What a deployment would take on a node, with that node's settings."""

from __future__ import annotations

from dataclasses import replace

import orjson
import pytest

from meshd.config import EngineSettings
from meshd.election.appraisal import Appraiser
from meshd.election.fit import Budget, Corrections
from meshd.view import Deployment
from meshd.view.shape import MemoryParts
from tests.election.rooms import ENGINE, LLAMA, MIB, OWN, SHAPE

WISH = Deployment(LLAMA, "org/llama", 1, OWN, shape=SHAPE)
ROW = 2 * 2 * (64 + 64)
"""Bytes a token in the cache: two layers, F16 keys and values."""
DIGEST = "sha256:abc"


def appraiser(kept: Corrections | None = None, **settings: object) -> Appraiser:
    return Appraiser(EngineSettings(**settings), kept or Corrections())


def test_an_unknown_shape_is_not_counted() -> None:
    unknown, one = replace(WISH, shape=None), appraiser()
    assert one.counted(unknown) is None
    assert one.corrected(unknown, DIGEST, ENGINE) is None
    assert one.fit(unknown, (), {}, digest=DIGEST, engine=ENGINE) is None
    assert not one.learn(unknown, DIGEST, ENGINE, {"CPU": MemoryParts(cache=1)})


@pytest.mark.parametrize(
    ("settings", "changes", "context", "slots"),
    [
        ({}, {}, 1024, 4),
        ({"context": 512, "parallel": 2}, {}, 512, 2),
        ({"context": 512, "parallel": 2}, {"context": 2048, "parallel": 1}, 2048, 1),
    ],
)
def test_the_deployment_comes_before_the_settings(
    settings: dict[str, int], changes: dict[str, int], context: int, slots: int
) -> None:
    found = appraiser(**settings).counted(replace(WISH, **changes))  # type: ignore[arg-type]
    assert found is not None
    assert (found.context, found.slots, found.cache) == (context, slots, ROW * context * slots)


@pytest.mark.parametrize(
    ("arguments", "cache"),
    [
        ((), ROW * 1024 * 4),
        (("--cache-type-k", "q8_0", "--cache-type-v", "q8_0"), ROW * 1024 * 4 * 34 // 64),
        (("-fa", "on", "-ctk", "q8_0"), ROW * 1024 * 4 * 34 // 64),
        (("--cache-type-k", "unheard_of"), ROW * 1024 * 4),
    ],
)
def test_the_type_of_the_cache_is_that_of_the_arguments(
    arguments: tuple[str, ...], cache: int
) -> None:
    found = appraiser(extra_args=arguments).counted(WISH)
    assert found is not None
    assert found.cache == cache


@pytest.mark.parametrize(
    ("setting", "prompts"), [("1GB", ROW * 1024 * 4), ("1MB", 10**6), ("0", 0)]
)
def test_prompts_are_kept_as_far_as_slots_have_and_the_setting_goes(
    setting: str, prompts: int
) -> None:
    found = appraiser(prompt_cache=setting).counted(WISH)
    assert found is not None
    assert found.prompts == prompts


def test_what_an_engine_said_corrects_what_is_counted_for_it_alone() -> None:
    one = appraiser()
    counted = one.counted(WISH)
    assert counted is not None
    seen = {"CPU": MemoryParts(cache=counted.cache * 2, compute=counted.compute * 3)}
    assert one.learn(WISH, DIGEST, ENGINE, seen)
    assert not one.learn(WISH, DIGEST, ENGINE, seen), "that is no news"
    corrected = one.corrected(WISH, DIGEST, ENGINE)
    assert corrected is not None
    assert (corrected.cache, corrected.compute) == (counted.cache * 2, counted.compute * 3)
    for digest, engine in ((None, ENGINE), ("sha256:other", ENGINE), (DIGEST, "engine-2")):
        assert one.corrected(WISH, digest, engine) == counted
    assert orjson.loads(one.to_json()) == [[DIGEST, ENGINE, 2.0, 3.0]]
    again = appraiser(Corrections.from_json(one.to_json()))
    assert again.corrected(WISH, DIGEST, ENGINE) == corrected


def test_it_fits_into_what_is_free() -> None:
    one = appraiser()
    counted = one.counted(WISH)
    assert counted is not None
    budgets = (Budget("CPU", 4096 * MIB, host=True, accelerator=False),)
    enough = one.fit(WISH, budgets, {"CPU": counted.total}, digest=None, engine=ENGINE)
    assert enough is not None
    assert (enough.fits, enough.memory) == (True, {"CPU": counted.total})
    short = one.fit(WISH, budgets, {"CPU": counted.total - 1}, digest=None, engine=ENGINE)
    assert short is not None
    assert (short.fits, short.missing) == (False, 1)
