"""Removals: what goes together, what stays, and what a kill leaves."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from meshd.cache.budget import Leftover, LeftoverKind
from meshd.cache.locks import try_lock
from meshd.cache.manifest import Manifest
from meshd.cache.references import HubRef
from meshd.cache.removal import Link, RemovalOrder, Remover
from meshd.cache.repository import linked_blobs
from tests.cache.shelves import Shelves, commit, sha256

REPO = "owner/some-GGUF"
Q4 = {f"Q4/some-Q4-{n:05d}-of-00003.gguf": f"four {n}".encode() * 100 for n in (1, 2, 3)}
Q8 = {"some-Q8_0.gguf": b"eight" * 100}
EYES = {"mmproj-F16.gguf": b"eyes" * 100}


@pytest.fixture
def shelves(tmp_path: Path) -> Shelves:
    return Shelves(tmp_path)


@pytest.fixture
def remover(shelves: Shelves) -> Remover:
    return Remover(shelves.store, shelves.uses)


def order(manifest: Manifest) -> RemovalOrder:
    return RemovalOrder(
        repo=manifest.repo,
        digest=manifest.digest,
        links=tuple(
            Link(revision=manifest.revision, path=file.path, blob=file.sha256)
            for file in manifest.files
        ),
    )


def orders_left(shelves: Shelves) -> list[Path]:
    return list((shelves.places.state / "removals").glob("*"))


# -- what goes ------------------------------------------------------------------------------------


def test_the_last_set_takes_the_repository_with_it(shelves: Shelves, remover: Remover) -> None:
    shelves.add(REPO, Q4)
    manifest = shelves.know(HubRef(REPO, quant="Q4"), Q4)
    for content in Q4.values():
        shelves.verify(REPO, content)
        shelves.store.chunks.save(sha256(content), bytes(32))
    shelves.uses.used(manifest.digest, 5.0)
    removed = remover.remove(order(manifest))
    assert removed.busy == ()
    assert removed.freed_bytes == sum(map(len, Q4.values()))
    assert shelves.tree() == set()
    assert not shelves.places.repo(REPO).exists()
    assert shelves.store.manifests.all() == ()
    assert list(shelves.store.ledger.entries()) == []
    assert not any(shelves.store.chunks.has(sha256(c), len(c)) for c in Q4.values())
    assert shelves.uses.last_used_at(manifest.digest) is None
    assert orders_left(shelves) == []


def test_other_sets_and_files_stay(shelves: Shelves, remover: Remover) -> None:
    shelves.add(REPO, {**Q4, **Q8, "README.md": b"read"})
    shelves.know(HubRef(REPO, quant="Q8_0"), Q8)
    manifest = shelves.know(HubRef(REPO, quant="Q4"), Q4)
    remover.remove(order(manifest))
    repo = f"models--{REPO.replace('/', '--')}"
    assert {path for path in shelves.tree() if "/blobs/" in path or "/snapshots/" in path} == {
        f"{repo}/snapshots/{commit(1)}/some-Q8_0.gguf",
        f"{repo}/snapshots/{commit(1)}/README.md",
        f"{repo}/blobs/{sha256(Q8['some-Q8_0.gguf'])}",
        f"{repo}/blobs/{sha256(b'read')}",
    }
    assert shelves.places.branch(REPO, "main").read_text() == commit(1)
    assert {ref.quant for ref, _ in shelves.store.manifests.all()} == {"Q8_0"}


def test_a_blob_that_another_snapshot_links_to_stays(shelves: Shelves, remover: Remover) -> None:
    shelves.add(REPO, Q8, revision=1, branch="old")
    shelves.add(REPO, Q8, revision=2)
    content = Q8["some-Q8_0.gguf"]
    shelves.verify(REPO, content)
    manifest = shelves.know(HubRef(REPO, commit(1), "Q8_0"), Q8, revision=1)
    kept = shelves.know(HubRef(REPO, quant="Q8_0"), Q8, revision=2)
    assert remover.remove(order(manifest)).freed_bytes == 0
    assert shelves.places.snapshot(REPO, commit(2), "some-Q8_0.gguf").read_bytes() == content
    assert not shelves.places.snapshot(REPO, commit(1)).exists()
    assert not shelves.places.branch(REPO, "old").exists()
    assert shelves.places.branch(REPO, "main").exists()
    assert not (shelves.places.repo(REPO) / "trees" / f"{commit(1)}.json").exists()
    assert not (shelves.places.repo(REPO) / ".no_exist" / commit(1)).exists()
    assert {m.revision for _, m in shelves.store.manifests.all()} == {commit(2)}
    assert len(list(shelves.store.ledger.entries())) == 1
    remover.remove(order(kept))
    assert shelves.tree() == set()


def test_a_projector_two_sets_have_goes_with_the_second(shelves: Shelves, remover: Remover) -> None:
    shelves.add(REPO, {**Q4, **Q8, **EYES})
    eyes = "mmproj-F16.gguf"
    four = shelves.know(HubRef(REPO, quant="Q4"), {**Q4, **EYES}, mmproj=eyes)
    eight = shelves.know(HubRef(REPO, quant="Q8_0"), {**Q8, **EYES}, mmproj=eyes)
    remover.remove(order(four))
    assert shelves.places.snapshot(REPO, commit(1), eyes).exists()
    assert shelves.store.manifests.find(HubRef(REPO, quant="Q4")) is None
    remover.remove(order(eight))
    assert shelves.tree() == set()


def test_a_set_that_is_only_known_keeps_no_projector(shelves: Shelves, remover: Remover) -> None:
    shelves.add(REPO, {**Q4, **EYES})
    eyes = "mmproj-F16.gguf"
    four = shelves.know(HubRef(REPO, quant="Q4"), {**Q4, **EYES}, mmproj=eyes)
    shelves.know(HubRef(REPO, quant="Q8_0"), {**Q8, **EYES}, mmproj=eyes)
    remover.remove(order(four))
    assert shelves.tree() == set()


def test_partials_damaged_files_and_unfinished_links_go_too(
    shelves: Shelves, remover: Remover
) -> None:
    shelves.add(REPO, Q8)
    manifest = shelves.know(HubRef(REPO, quant="Q8_0"), Q8)
    (shard,) = manifest.shards
    blob = shelves.places.blob(REPO, shard.sha256)
    for ending in ("incomplete", "0123abcd.incomplete", "damaged"):
        blob.with_name(f"{blob.name}.{ending}").write_bytes(b"half")
    journal = shelves.places.journal(shard.sha256)
    journal.parent.mkdir(parents=True)
    journal.write_bytes(b"chunks")
    link = shelves.places.snapshot(REPO, commit(1), shard.path)
    link.with_name(f".{link.name}.0123abcd").symlink_to(link.readlink())
    remover.remove(order(manifest))
    assert shelves.tree() == set()
    assert not journal.exists()


def test_a_file_that_is_no_link(shelves: Shelves, remover: Remover) -> None:
    path = shelves.places.snapshot(REPO, commit(1), "some.gguf")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"copied")
    alone = RemovalOrder(
        repo=REPO, digest="x", links=(Link(revision=commit(1), path="some.gguf", blob=None),)
    )
    assert remover.remove(alone).freed_bytes == 6
    assert shelves.tree() == set()


def test_a_set_that_is_not_there_is_removed_already(shelves: Shelves, remover: Remover) -> None:
    manifest = shelves.know(HubRef(REPO, quant="Q8_0"), Q8)
    assert remover.remove(order(manifest)).freed_bytes == 0
    assert shelves.store.manifests.all() == ()


def test_a_link_that_leads_elsewhere_now_is_not_ours(shelves: Shelves, remover: Remover) -> None:
    shelves.add(REPO, Q8)
    manifest = shelves.know(HubRef(REPO, quant="Q8_0"), Q8)
    link = shelves.places.snapshot(REPO, commit(1), "some-Q8_0.gguf")
    other = shelves.places.blob(REPO, sha256(b"new"))
    other.write_bytes(b"new")
    link.unlink()
    link.symlink_to(os.path.relpath(other, link.parent))
    remover.remove(order(manifest))
    assert link.read_bytes() == b"new"


# -- others at work -------------------------------------------------------------------------------


def test_what_is_being_downloaded_is_not_touched(shelves: Shelves, remover: Remover) -> None:
    shelves.add(REPO, Q4)
    manifest = shelves.know(HubRef(REPO, quant="Q4"), Q4)
    before = shelves.tree()
    with try_lock(shelves.places.lock(REPO, manifest.shards[1].sha256)) as held:
        assert held
        removed = remover.remove(order(manifest))
    assert [Path(path).name for path in removed.busy] == ["some-Q4-00002-of-00003.gguf"]
    assert removed.freed_bytes == 0
    assert shelves.tree() == before
    assert orders_left(shelves) == []


def test_the_lock_is_the_one_other_tools_take(tmp_path: Path) -> None:
    from huggingface_hub.utils._fixes import WeakFileLock

    path = tmp_path / "locks" / "x.lock"
    path.parent.mkdir()
    with WeakFileLock(path), try_lock(path) as held:
        assert not held
    with try_lock(path) as held, path.open() as other:
        assert held
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with try_lock(path) as held:
        assert held


# -- the store repositories share -----------------------------------------------------------------


def share(shelves: Shelves, repos: list[str], content: bytes, *, marker: str = "1\n") -> Path:
    """Put the blob of `content` into the shared store, as huggingface_hub does."""
    store = shelves.places.hub / "blobs"
    payload = store / "ab" / ("ab" + "0" * 62)
    payload.parent.mkdir(parents=True)
    (store / ".huggingface-shared-blobs").write_text(marker)
    payload.write_bytes(content)
    lines = []
    for repo in repos:
        blob = shelves.places.blob(repo, sha256(content))
        blob.unlink()
        blob.symlink_to(os.path.relpath(payload, blob.parent))
        lines.append(f"{blob.relative_to(shelves.places.hub)}\n")
    payload.with_name(f"{payload.name}.refs").write_text("".join(lines))
    return payload


def test_a_shared_payload_goes_with_the_last_link_to_it(shelves: Shelves, remover: Remover) -> None:
    content = Q8["some-Q8_0.gguf"]
    other = "somebody/copy-GGUF"
    manifests = []
    for repo in (REPO, other):
        shelves.add(repo, Q8)
        manifests.append(shelves.know(HubRef(repo, quant="Q8_0"), Q8))
    payload = share(shelves, [REPO, other], content)
    assert remover.remove(order(manifests[0])).freed_bytes == 0
    assert payload.read_bytes() == content
    assert shelves.places.snapshot(other, commit(1), "some-Q8_0.gguf").read_bytes() == content
    assert remover.remove(order(manifests[1])).freed_bytes == len(content)
    assert not payload.exists()
    assert shelves.tree() == {"blobs/.huggingface-shared-blobs"}


@pytest.mark.parametrize("doubt", ["no list", "another layout", "torn list"])
def test_a_shared_payload_stays_when_in_doubt(
    shelves: Shelves, remover: Remover, doubt: str
) -> None:
    shelves.add(REPO, Q8)
    manifest = shelves.know(HubRef(REPO, quant="Q8_0"), Q8)
    marker = "2\n" if doubt == "another layout" else "1\n"
    payload = share(shelves, [REPO], Q8["some-Q8_0.gguf"], marker=marker)
    links = payload.with_name(f"{payload.name}.refs")
    if doubt == "no list":
        links.unlink()
    elif doubt == "torn list":
        links.write_bytes(b"\xff\xfe")
    assert remover.remove(order(manifest)).freed_bytes == 0
    assert payload.exists()
    assert not shelves.places.repo(REPO).exists()


# -- leftovers ------------------------------------------------------------------------------------


def leftover(path: Path, kind: LeftoverKind) -> Leftover:
    return Leftover(str(path), kind, 4, useless=True, reason="")


def test_leftovers_are_looked_at_again_before_they_go(shelves: Shelves, remover: Remover) -> None:
    shelves.add(REPO, Q8)
    content = Q8["some-Q8_0.gguf"]
    blob = shelves.places.blob(REPO, sha256(content))
    orphan = shelves.places.blob(REPO, sha256(b"none"))
    orphan.write_bytes(b"none")
    damaged = blob.with_name(f"{blob.name}.damaged")
    damaged.write_bytes(b"bad!")
    partial = shelves.places.partial(REPO, "cd" * 32)
    partial.write_bytes(b"half")

    assert remover.clear(leftover(blob, LeftoverKind.ORPHAN)).freed_bytes == 0, "it is linked"
    assert remover.clear(leftover(damaged, LeftoverKind.DAMAGED)).freed_bytes == 0, (
        "nobody knows whether its replacement is right"
    )
    with try_lock(shelves.places.lock(REPO, "cd" * 32)):
        assert remover.clear(leftover(partial, LeftoverKind.PARTIAL)).busy == (str(partial),)
    assert all(path.exists() for path in (blob, damaged, partial))

    shelves.verify(REPO, content)
    for path, kind in (
        (orphan, LeftoverKind.ORPHAN),
        (damaged, LeftoverKind.DAMAGED),
        (partial, LeftoverKind.PARTIAL),
    ):
        assert remover.clear(leftover(path, kind)).freed_bytes == 4
        assert not path.exists()
        assert remover.clear(leftover(path, kind)).freed_bytes == 0
    assert blob.exists()


# -- other tools ----------------------------------------------------------------------------------


def test_hf_finds_a_whole_cache_afterwards(shelves: Shelves, remover: Remover) -> None:
    shelves.add(REPO, Q4, revision=1, branch="old")
    shelves.add(REPO, {**Q8, "README.md": b"read"}, revision=2)
    other = "owner/other-GGUF"
    shelves.add(other, EYES)
    remover.remove(order(shelves.know(HubRef(REPO, "old", "Q4"), Q4)))
    remover.remove(order(shelves.know(HubRef(other), EYES)))
    said = shelves.hf("cache", "ls", "--revisions", "--format", "json")
    assert commit(2) in said
    assert commit(1) not in said
    assert "other-GGUF" not in said
    assert "warning" not in said.lower()


# -- kills ----------------------------------------------------------------------------------------


CHILD = textwrap.dedent(
    """
    import json, os, signal, sys
    from pathlib import Path
    from meshd.cache.removal import RemovalOrder, Remover
    from tests.cache.shelves import Shelves

    def remove(home, moment):
        left = moment

        def count(event, arguments):
            # A change of the file system is about to happen: os.remove, os.rmdir, os.rename, ...
            nonlocal left
            if event.startswith("os.") and event not in ("os.listdir", "os.scandir", "os.walk"):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        shelves = Shelves(home)
        order = RemovalOrder.model_validate_json((home / "order.json").read_bytes())
        sys.addaudithook(count)
        Remover(shelves.store, shelves.uses).remove(order)
        (home / "steps").write_text(str(moment - left))

    for home, moment in json.load(sys.stdin):
        pid = os.fork()
        if pid == 0:
            try:
                remove(Path(home), moment)
            finally:
                os._exit(0)
        print(os.waitpid(pid, 0)[1])
    """
)


def dangling(shelves: Shelves) -> frozenset[str]:
    """Blobs that are linked to and not there."""
    repo = shelves.places.repo(REPO)
    return linked_blobs(repo) - {path.name for path in (repo / "blobs").iterdir()}


def killed_removals(moments: dict[Path, int]) -> list[int]:
    """Carry out the order in each of those caches, killed before that change of the file system;
    the signals the processes died of."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps([(str(home), moment) for home, moment in moments.items()]),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


def ordered_shelves(home: Path) -> Shelves:
    """Two sets, and an order to remove one of them."""
    shelves = Shelves(home)
    shelves.add(REPO, {**Q4, **Q8})
    shelves.know(HubRef(REPO, quant="Q8_0"), Q8)
    four = shelves.know(HubRef(REPO, quant="Q4"), Q4)
    for content in (*Q4.values(), *Q8.values()):
        shelves.verify(REPO, content)
    (home / "order.json").write_text(order(four).model_dump_json())
    return shelves


def test_a_kill_at_any_moment_is_finished_by_the_next_start(tmp_path: Path) -> None:
    whole = ordered_shelves(tmp_path / "whole")
    before = whole.tree()
    assert killed_removals({whole.home: 10_000}) == [0]
    after = whole.tree()
    steps = int((whole.home / "steps").read_text())
    assert steps > 20

    stocks = [ordered_shelves(tmp_path / str(moment)) for moment in range(1, steps + 1)]
    moments = {shelves.home: moment for moment, shelves in enumerate(stocks, start=1)}
    assert killed_removals(moments) == [signal.SIGKILL] * steps
    finished = 0
    for moment, shelves in enumerate(stocks, start=1):
        where = f"killed before change {moment} of {steps}"
        assert not dangling(shelves), where
        remover = Remover(shelves.store, shelves.uses)
        if remover.recover():
            finished += 1
            assert shelves.tree() == after, where
            assert shelves.store.manifests.find(HubRef(REPO, quant="Q4")) is None, where
            assert len(list(shelves.store.ledger.entries())) == 1, where
        else:
            assert shelves.tree() == before, f"{where}: begun, and not noted"
        assert remover.recover() == (), where
        eight = shelves.places.snapshot(REPO, commit(1), "some-Q8_0.gguf")
        assert eight.read_bytes() == Q8["some-Q8_0.gguf"], where
        assert not dangling(shelves), where
    assert finished > steps // 2


def interrupted(shelves: Shelves, ordered: RemovalOrder) -> None:
    """An order that was written and not carried out."""
    place = shelves.places.state / "removals"
    place.mkdir(parents=True)
    (place / "x.json").write_text(ordered.model_dump_json())


def test_what_was_fetched_again_since_the_order_stays(shelves: Shelves, remover: Remover) -> None:
    manifest = shelves.know(HubRef(REPO, quant="Q4"), Q4)
    interrupted(shelves, order(manifest))
    later = (shelves.places.state / "removals" / "x.json").stat().st_mtime_ns
    while time.time_ns() < later + 20_000_000:  # several steps of the file system's clock
        os.utime(shelves.places.state)
    shelves.add(REPO, Q4)
    before = shelves.tree()
    assert len(remover.recover()) == 1
    assert shelves.tree() == before
    assert shelves.store.manifests.find(HubRef(REPO, quant="Q4")) == manifest
    assert remover.recover() == ()


def test_an_order_nobody_can_read_is_dropped(
    shelves: Shelves, remover: Remover, caplog: pytest.LogCaptureFixture
) -> None:
    place = shelves.places.state / "removals"
    place.mkdir(parents=True)
    (place / "torn.json").write_text('{"repo": "own')
    (place / "evil.json").write_text(
        '{"repo": "../../etc", "digest": "x", "links": [{"revision": "..", "path": "passwd"}]}'
    )
    assert remover.recover() == ()
    assert list(place.iterdir()) == []
    assert "torn.json" in caplog.text
    assert "evil.json" in caplog.text
