"""A disk that takes nothing more costs a node a renewal or a joining, and never its life."""

from __future__ import annotations

import contextlib
import logging
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshd.errors import NoSpace
from meshd.kernel import Pool
from meshd.kernel.clock import ManualClock
from meshd.peers.joining.renewing import ASK_AGAIN_S, Renewing
from meshd.peers.trust.certificates import make_csr
from meshd.peers.trust.trust import Trust
from meshd.view import Role
from tests.peers.reception import new_node


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_nothing_is_left_of_a_mesh_that_could_not_be_founded(tmp_path: Path) -> None:
    _, store = new_node(tmp_path, "a")
    before = sorted((tmp_path / "a").iterdir())
    with full_disk(), pytest.raises(NoSpace, match=r"/mesh cannot be written: "):
        store.found("home")
    assert sorted((tmp_path / "a").iterdir()) == before
    assert store.load() is None


def test_the_old_membership_stays_if_the_new_one_does_not_fit(tmp_path: Path) -> None:
    _, store = new_node(tmp_path, "a")
    first = store.found("first")
    with full_disk(), pytest.raises(NoSpace):
        store.found("second")
    assert store.load() == first


def test_a_start_that_cannot_be_counted_is_not_begun(tmp_path: Path) -> None:
    _, store = new_node(tmp_path, "a")
    assert store.next_start() == 1
    with full_disk(), pytest.raises(NoSpace, match=r"starts cannot be written"):
        store.next_start()
    assert store.next_start() == 2


def test_the_old_certificate_stays_if_a_renewed_one_does_not_fit(tmp_path: Path) -> None:
    identity, store = new_node(tmp_path, "a")
    old = store.found("home")
    assert old.authority is not None
    later = old.authority.sign(make_csr(identity), Role.MEMBER, time.time() + 3600)
    with full_disk(), pytest.raises(NoSpace, match=r"node\.crt cannot be written"):
        store.replace_certificate(later)
    assert store.load() == old


async def test_an_issuer_tries_its_renewal_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    identity, store = new_node(tmp_path, "a")
    membership, pool, clock = store.found("home"), Pool("test", workers=1), ManualClock()
    trust = Trust(membership, identity, store, pool)
    monkeypatch.setattr(Trust, "due_for_renewal", lambda self: self.membership is membership)
    renewing = Renewing(trust, clock, lambda links: links[0])
    try:
        with full_disk(), caplog.at_level(logging.WARNING):
            await renewing.look([])
        assert "could not be renewed" in caplog.text
        await renewing.look([])
        assert trust.membership is membership, "it does not try at every look"
        clock.advance(ASK_AGAIN_S)
        await renewing.look([])
        assert trust.membership is not membership
        assert trust.membership.not_after >= membership.not_after
    finally:
        pool.close()
