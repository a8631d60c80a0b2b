"""Pruning a cache of files: what is protected, what goes, what is told."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from meshd.cache.budget import FITS, IN_USE, LAST_COPY, OLDEST, PINNED, PrunePlan, plan
from meshd.cache.commands import PlanRow, PruneReport
from meshd.cache.inventory import Inventory, StoredSet, take_inventory
from meshd.cache.locks import try_lock
from meshd.cache.pruning import holdings_of, prune
from meshd.cache.references import HubRef
from meshd.cache.removal import Remover
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

    def prune(
        self,
        budget_bytes: int | None,
        *,
        dry_run: bool = False,
        force: bool = False,
        in_use: str = "",
        pin: str = "",
        elsewhere: bool | None = True,
    ) -> tuple[PrunePlan, PruneReport]:
        """The plan and the report."""
        inventory = self.inventory()

        def runs(one: StoredSet) -> bool:
            return bool(in_use) and one.model.startswith(in_use)

        holdings = holdings_of(
            inventory,
            pins=[HubRef(self.repo(pin), quant="Q8_0")] if pin else [],
            in_use=runs,
            elsewhere=None if elsewhere is None else lambda _: bool(elsewhere),
        )
        made = plan(
            holdings,
            inventory.leftovers,
            used_bytes=read_usage(self.shelves.places.hub).used_bytes,
            budget_bytes=budget_bytes,
            force=force,
        )
        return made, prune(made, inventory, holdings, self.remover, dry_run=dry_run)


@pytest.fixture
def stock(tmp_path: Path) -> Stock:
    return Stock(tmp_path)


def reasons(rows: tuple[PlanRow, ...]) -> dict[str, str]:
    """By the beginning of the model's name."""
    return {row.what.partition("-")[0]: row.reason for row in rows}


def test_a_dry_run_tells_and_does_nothing(stock: Stock) -> None:
    before = stock.shelves.tree()
    made, report = stock.prune(3 * stock.size, dry_run=True)
    assert stock.shelves.tree() == before
    assert report.dry_run
    assert reasons(report.remove)["alpha"] == OLDEST
    assert report.freed_bytes == made.freed_bytes > 0
    assert report.still_over_bytes == 0


def test_models_used_longest_ago_go(stock: Stock) -> None:
    _, dry = stock.prune(2 * stock.size + 500, dry_run=True)
    _, report = stock.prune(2 * stock.size + 500)
    assert stock.models() == {"gamma", "delta"}
    assert reasons(report.remove) == {"alpha": OLDEST, "beta": OLDEST}
    assert reasons(report.keep) == {"gamma": FITS, "delta": FITS}
    assert report == dry.model_copy(update={"dry_run": False}), "what was shown was done"
    assert read_usage(stock.shelves.places.hub).used_bytes <= 2 * stock.size + 500
    _, again = stock.prune(2 * stock.size + 500)
    assert (again.remove, again.freed_bytes) == ((), 0)


def test_protected_models_stay(stock: Stock) -> None:
    _, report = stock.prune(0, in_use="alpha", pin="beta")
    assert stock.models() == {"alpha", "beta"}
    assert reasons(report.keep) == {"alpha": IN_USE, "beta": PINNED}
    assert report.still_over_bytes > 0


@pytest.mark.parametrize("elsewhere", [False, None])
def test_last_copies_need_force(stock: Stock, elsewhere: bool | None) -> None:
    _, report = stock.prune(0, elsewhere=elsewhere)
    assert stock.models() == set(NAMES)
    assert set(reasons(report.keep).values()) == {LAST_COPY}
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
    _, report = stock.prune(None)
    assert [row.what for row in report.remove] == [str(orphan)]
    assert report.freed_bytes == 4
    assert not orphan.exists()
    assert stock.models() == set(NAMES)


def test_what_is_being_downloaded_stays_and_is_told(stock: Stock) -> None:
    repo = stock.repo("alpha")
    with try_lock(stock.shelves.places.lock(repo, sha256(stock.content["alpha"]))):
        _, report = stock.prune(3 * stock.size + 500)
    link = stock.shelves.places.snapshot(repo, commit(1), "alpha-Q8_0.gguf")
    assert report.busy == (str(link),)
    assert report.freed_bytes == 0
    assert report.still_over_bytes > 0
    assert stock.models() == set(NAMES)


def test_the_same_weights_in_two_repositories(stock: Stock) -> None:
    files = {"alpha-Q8_0.gguf": stock.content["alpha"]}
    stock.shelves.add("other/alpha-GGUF", files)
    stock.shelves.know(HubRef("other/alpha-GGUF", quant="Q8_0"), files)
    stock.prune(0, pin="alpha")
    (kept,) = stock.inventory().sets
    assert kept.repo == stock.repo("alpha")
