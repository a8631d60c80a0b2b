"""From a cache on disk to a plan, and from the plan to a smaller cache."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from meshd.cache.budget import (
    FITS,
    IN_USE,
    LAST_COPY,
    OLDEST,
    PINNED,
    Holding,
    Item,
    PrunePlan,
    plan,
)
from meshd.cache.inventory import Inventory, StoredSet, take_inventory
from meshd.cache.locks import try_lock
from meshd.cache.references import HubRef
from meshd.cache.removal import Removed, Remover
from meshd.cache.usage import read_usage
from tests.cache.shelves import Shelves, commit, sha256
from tests.models import small_model

DAY_S = 86_400.0
NAMES = ("alpha", "beta", "gamma", "delta")


class Stock:
    """Four models, used in the order of their names, and how to prune them."""

    def __init__(self, home: Path) -> None:
        self.shelves = Shelves(home)
        self.remover = Remover(self.shelves.store, self.shelves.uses)
        self.content = {}
        for number, name in enumerate(NAMES):
            path = small_model(home / f"{name}-Q8_0.gguf", seed=number)
            self.content[name] = path.read_bytes()
            files = {path.name: self.content[name]}
            self.shelves.add(self.repo(name), files)
            manifest = self.shelves.know(HubRef(self.repo(name), quant="Q8_0"), files)
            self.shelves.verify(self.repo(name), self.content[name])
            self.shelves.uses.used(manifest.digest, 1000.0 + number)
        self.size = len(self.content["alpha"])

    @staticmethod
    def repo(name: str) -> str:
        return f"owner/{name}-GGUF"

    def inventory(self) -> Inventory:
        return take_inventory(self.shelves.store, self.shelves.uses, now=time.time() + DAY_S)

    def models(self) -> set[str]:
        return {one.model.partition("-")[0] for one in self.inventory().sets}

    def plan(
        self,
        budget_bytes: int | None,
        *,
        force: bool = False,
        in_use: str = "",
        pin: str = "",
        elsewhere: bool | None = True,
    ) -> PrunePlan:
        """`in_use`, `pin`: the beginning of a name, for all of its repositories but `other/…`."""

        def is_called(one: StoredSet, name: str) -> bool:
            return bool(name) and one.repo.startswith(f"owner/{name}")

        inventory = self.inventory()
        holdings = [
            one.holding(
                in_use=is_called(one, in_use), pinned=is_called(one, pin), elsewhere=elsewhere
            )
            for one in inventory.sets
        ]
        self.sets = {
            holding.refs: one for holding, one in zip(holdings, inventory.sets, strict=True)
        }
        return plan(
            holdings,
            inventory.leftovers,
            used_bytes=read_usage(self.shelves.places.hub).used_bytes,
            budget_bytes=budget_bytes,
            force=force,
        )

    def prune(self, budget_bytes: int | None, **protected: Any) -> tuple[PrunePlan, Removed]:
        """Plan, and do it."""
        made = self.plan(budget_bytes, **protected)
        removed = Removed()
        for item, _ in made.remove:
            if isinstance(item, Holding):
                removed += self.remover.remove(self.sets[item.refs].removal())
            else:
                removed += self.remover.clear(item)
        return made, removed


@pytest.fixture
def stock(tmp_path: Path) -> Stock:
    return Stock(tmp_path)


def reasons(items: tuple[tuple[Item, str], ...]) -> dict[str, str]:
    """By the beginning of the model's name, leftovers left out."""
    return {
        item.model.partition("-")[0]: reason for item, reason in items if isinstance(item, Holding)
    }


def test_models_used_longest_ago_go(stock: Stock) -> None:
    budget = 2 * stock.size + 500
    made, removed = stock.prune(budget)
    assert stock.models() == {"gamma", "delta"}
    assert reasons(made.remove) == {"alpha": OLDEST, "beta": OLDEST}
    assert reasons(made.keep) == {"gamma": FITS, "delta": FITS}
    assert removed == Removed(made.freed_bytes), "what was planned was freed"
    assert read_usage(stock.shelves.places.hub).used_bytes <= budget
    assert stock.plan(budget).remove == ()


def test_a_plan_does_nothing(stock: Stock) -> None:
    before = stock.shelves.tree()
    assert stock.plan(0).remove
    assert stock.shelves.tree() == before


def test_protected_models_stay(stock: Stock) -> None:
    made, _ = stock.prune(0, in_use="alpha", pin="beta")
    assert stock.models() == {"alpha", "beta"}
    assert reasons(made.keep) == {"alpha": IN_USE, "beta": PINNED}
    assert made.still_over_bytes > 0


@pytest.mark.parametrize("elsewhere", [False, None])
def test_last_copies_need_force(stock: Stock, elsewhere: bool | None) -> None:
    made, _ = stock.prune(0, elsewhere=elsewhere)
    assert stock.models() == set(NAMES)
    assert set(reasons(made.keep).values()) == {LAST_COPY}
    stock.prune(0, elsewhere=elsewhere, force=True)
    assert stock.models() == set()


def test_a_broken_copy_needs_none(stock: Stock) -> None:
    blob = stock.shelves.places.blob(stock.repo("delta"), sha256(stock.content["delta"]))
    os.truncate(blob, 1000)
    stock.prune(0, elsewhere=False)
    assert stock.models() == set(NAMES) - {"delta"}


def test_leftovers_go_without_a_budget(stock: Stock) -> None:
    orphan = stock.shelves.places.blob(stock.repo("alpha"), sha256(b"none"))
    orphan.write_bytes(b"none")
    _, removed = stock.prune(None)
    assert removed == Removed(4)
    assert not orphan.exists()
    assert stock.models() == set(NAMES)


def test_what_is_being_downloaded_stays_and_is_told(stock: Stock) -> None:
    repo = stock.repo("alpha")
    with try_lock(stock.shelves.places.lock(repo, sha256(stock.content["alpha"]))):
        _, removed = stock.prune(3 * stock.size + 500)
    link = stock.shelves.places.snapshot(repo, commit(1), "alpha-Q8_0.gguf")
    assert removed == Removed(0, (str(link),))
    assert stock.models() == set(NAMES)


def test_the_same_weights_in_two_repositories(stock: Stock) -> None:
    files = {"alpha-Q8_0.gguf": stock.content["alpha"]}
    stock.shelves.add("other/alpha-GGUF", files)
    stock.shelves.know(HubRef("other/alpha-GGUF", quant="Q8_0"), files)
    stock.prune(0, pin="alpha")
    (kept,) = stock.inventory().sets
    assert kept.repo == stock.repo("alpha")
