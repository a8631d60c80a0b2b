"""Manifests on disk: what a reference was the last time, whoever wrote it, and however broken."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from meshd.cache.manifest import Manifest, Shard
from meshd.cache.manifests import ManifestStore, from_snapshot, from_tree_cache
from meshd.cache.places import Places
from meshd.cache.references import HubRef, parse_hub_ref
from tests.hub import LocalHub

REPO = "owner/Name-GGUF"
OLD, NEW = "01" * 20, "02" * 20


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def manifest(*paths: str, revision: str = OLD, repo: str = REPO, branch: str = "main") -> Manifest:
    shards = tuple(Shard(path=path, size=7, sha256=sha256(revision + path)) for path in paths)
    return Manifest(repo=repo, revision=revision, branch=branch, shards=shards)


Q4 = manifest("Name-Q4_K_M.gguf")
Q8 = manifest("Q8_0/Name-Q8_0-00001-of-00002.gguf", "Q8_0/Name-Q8_0-00002-of-00002.gguf")
NEWER_Q4 = manifest("Name-Q4_K_M.gguf", revision=NEW)


def ref(text: str) -> HubRef:
    return parse_hub_ref(f"{REPO}{text}")


@pytest.fixture
def store(tmp_path: Path) -> ManifestStore:
    return ManifestStore(tmp_path / "state" / "manifests")


def aged(store: ManifestStore, by_s: int) -> None:
    """Make everything that was put so far older."""
    for path in store._directory.iterdir():
        seen = path.stat()
        os.utime(path, ns=(seen.st_mtime_ns, seen.st_mtime_ns - by_s * 10**9))


# -- finding --------------------------------------------------------------------------------------


def test_what_was_put_is_found(store: ManifestStore) -> None:
    assert store.find(ref("")) is None
    assert store.all() == ()
    store.put(ref(""), Q4)
    store.put(ref(":Q8_0"), Q8)
    for again in (store, ManifestStore(store._directory)):
        assert again.find(ref("")) == Q4
        assert again.find(ref(":Q8_0")) == Q8
        assert again.find(ref(f"@{OLD}")) == Q4
        assert again.find(ref(f"@{OLD}:Q8_0")) == Q8
    assert {sha256(OLD + shard.path) for _, one in store.all() for shard in one.shards} == {
        shard.sha256 for one in (Q4, Q8) for shard in one.shards
    }


def test_other_references_to_the_same_set(store: ManifestStore) -> None:
    store.put(ref(""), Q4)
    store.put(ref("/Q8_0/Name-Q8_0-00002-of-00002.gguf"), Q8)
    assert store.find(ref(":q4_k_m")) == Q4
    assert store.find(ref("/Name-Q4_K_M.gguf")) == Q4
    assert store.find(ref(f"@{OLD}/Name-Q4_K_M.gguf")) == Q4
    assert store.find(ref(":Q8_0")) == Q8
    assert store.find(ref("/Q8_0/Name-Q8_0-00001-of-00002.gguf")) == Q8
    for unknown in (":Q5_K_M", "@v2:Q4_K_M", f"@{NEW}:Q8_0", "/Q8_0/other.gguf"):
        assert store.find(ref(unknown)) is None
    assert store.find(HubRef("owner/Name", quant="Q4_K_M")) is None


def test_a_bare_repository_is_not_guessed(store: ManifestStore) -> None:
    store.put(ref(":Q8_0"), Q8)
    assert store.find(ref("")) is None


def test_a_branch_means_the_newest_and_a_commit_the_old_one(store: ManifestStore) -> None:
    store.put(ref(":Q4_K_M"), Q4)
    aged(store, 10)
    store.put(ref(":Q4_K_M"), NEWER_Q4)
    assert store.find(ref(":Q4_K_M")) == NEWER_Q4
    assert store.find(ref("/Name-Q4_K_M.gguf")) == NEWER_Q4
    assert store.find(ref(f"@{OLD}:Q4_K_M")) == Q4
    assert store.find(ref(f"@{OLD}/Name-Q4_K_M.gguf")) == Q4
    aged(store, 10)
    store.put(ref("@v1:Q4_K_M"), Q4)
    assert store.find(ref("/Name-Q4_K_M.gguf")) == NEWER_Q4
    assert store.find(ref("@v1/Name-Q4_K_M.gguf")) == Q4


def test_the_newest_of_several_references(store: ManifestStore) -> None:
    store.put(ref(""), NEWER_Q4)
    aged(store, 10)
    store.put(ref("/Name-Q4_K_M.gguf"), Q4)
    assert store.find(ref(":Q4_K_M")) == Q4


def test_a_change_by_another_process_is_seen(store: ManifestStore) -> None:
    store.put(ref(":Q4_K_M"), Q4)
    assert store.find(ref(":Q4_K_M")) == Q4
    ManifestStore(store._directory).put(ref(":Q4_K_M"), NEWER_Q4)
    assert store.find(ref(":Q4_K_M")) == NEWER_Q4
    ManifestStore(store._directory).remove(NEWER_Q4)
    assert store.find(ref(":Q4_K_M")) is None


def test_files_by_hash(store: ManifestStore) -> None:
    projector = Shard(path="mmproj-F16.gguf", size=3, sha256=sha256("sees"))
    with_projector = Q4.model_copy(update={"mmproj": projector})
    store.put(ref(""), with_projector)
    store.put(ref(":Q8_0"), Q8)
    assert store.by_sha256(Q8.shards[1].sha256) == (Q8, Q8.shards[1])
    assert store.by_sha256(projector.sha256) == (with_projector, projector)
    assert store.by_sha256("0" * 64) is None


def test_a_set_is_forgotten_under_all_its_names(store: ManifestStore) -> None:
    store.put(ref(""), Q4)
    store.put(ref(":Q4_K_M"), Q4)
    store.put(ref(":Q8_0"), Q8)
    store.put(ref("@v2"), NEWER_Q4)
    store.remove(Q4)
    assert {one.digest for _, one in store.all()} == {Q8.digest, NEWER_Q4.digest}
    store.remove(Q4)
    assert store.find(ref(":Q4_K_M")) is None


def test_a_manifest_of_another_repository_is_a_mistake(store: ManifestStore) -> None:
    with pytest.raises(ValueError, match="cannot be a manifest of owner/Name-GGUF"):
        store.put(HubRef("owner/other"), Q4)


def test_repositories_do_not_mix(store: ManifestStore) -> None:
    for repo in ("o/a", "o/a.b", "o/a-b"):
        store.put(HubRef(repo, quant="Q4_K_M"), manifest("Name-Q4_K_M.gguf", repo=repo))
    for repo in ("o/a", "o/a.b", "o/a-b"):
        found = store.find(HubRef(repo, path="Name-Q4_K_M.gguf"))
        assert found is not None
        assert found.repo == repo


def test_a_repository_is_the_same_in_any_case(store: ManifestStore) -> None:
    spelled = HubRef(REPO.upper(), quant="Q4_K_M")
    store.put(spelled, Q4)
    assert store.find(spelled) == Q4
    assert store.find(ref(":Q4_K_M")) == Q4
    store.remove(Q4)
    assert store.all() == ()


# -- what is on the disk --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "\x00" * 500,
        '{"format": 1}',
        '{"format": 2, "ref": "owner/Name-GGUF:Q8_0", "manifest": {}}',
        '{"format": 1, "ref": "nonsense", "manifest": MANIFEST}',
        '{"format": 1, "ref": "owner/Name-GGUF:Q5_0", "manifest": MANIFEST}',
        '{"format": 1, "ref": "owner/Name-GGUF:Q8_0", "manifest": FOREIGN}',
        "\ud800",
    ],
)
def test_a_file_that_is_none_is_ignored_and_said_once(
    store: ManifestStore, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    store.put(ref(""), Q4)
    before = set(store._directory.iterdir())
    store.put(ref(":Q8_0"), Q8)
    foreign = manifest("x.gguf", repo="o/other").model_dump_json()
    text = damage.replace("MANIFEST", Q8.model_dump_json()).replace("FOREIGN", foreign)
    broken = set(store._directory.iterdir()) - before
    assert len(broken) == 2
    for path in broken:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert store.find(ref(":Q8_0")) is None
            assert [one for _, one in store.all()] == [Q4, Q4]
            assert store.by_sha256(Q8.shards[0].sha256) is None
    assert len(caplog.records) == 2
    assert all("is ignored: " in record.message for record in caplog.records)
    store.put(ref(":Q8_0"), Q8)
    assert store.find(ref(":Q8_0")) == Q8


def test_every_cut_of_a_file_is_ignored(store: ManifestStore) -> None:
    store.put(ref(f"@{OLD}"), Q4)
    (path,) = store._directory.iterdir()
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert store.find(ref(f"@{OLD}")) is None
    path.write_bytes(whole)
    assert store.find(ref(f"@{OLD}")) == Q4


def test_what_else_lies_there_is_left_alone(store: ManifestStore) -> None:
    store.put(ref(""), Q4)
    (store._directory / ".owner--Name-GGUF.x.json.abc").write_text("being written")
    (store._directory / ".hidden.json").write_text("{}")
    (store._directory / "notes.txt").write_text("x")
    (store._directory / "huge.0.json").write_bytes(b" " * (4 * 1024 * 1024 + 1))
    (store._directory / "directory.json").mkdir()
    assert len(store.all()) == 2
    store.remove(Q4)
    assert len(list(store._directory.iterdir())) == 5


WRITER = """
import sys
from pathlib import Path
from meshd.cache.manifest import Manifest
from meshd.cache.manifests import ManifestStore
from meshd.cache.references import parse_hub_ref
store = ManifestStore(Path(sys.argv[1]))
manifests = [Manifest.model_validate_json(line) for line in sys.stdin]
print("ready", flush=True)
for turn in range(int(sys.argv[2])):
    one = manifests[turn % len(manifests)]
    store.put(parse_hub_ref("owner/Name-GGUF:Q4_K_M"), one)
    if turn % 5 == 4:
        store.remove(one)
    assert store.find(parse_hub_ref("owner/Name-GGUF:Q4_K_M")) in [None, *manifests]
"""


def writer(store: ManifestStore, turns: int) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store._directory), str(turns)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    child.stdin.write("".join(f"{one.model_dump_json()}\n" for one in (Q4, NEWER_Q4)))
    child.stdin.close()
    return child


def test_several_processes_at_once(store: ManifestStore, caplog: pytest.LogCaptureFixture) -> None:
    known = {Q4.digest, NEWER_Q4.digest, Q8.digest}
    children = [writer(store, 30) for _ in range(2)]
    try:
        while any(child.poll() is None for child in children):
            assert store.find(ref(":Q4_K_M")) in (None, Q4, NEWER_Q4)
            assert {one.digest for _, one in store.all()} <= known
            store.put(ref(":Q8_0"), Q8)
            assert store.find(ref(":Q8_0")) == Q8
    finally:
        for child in children:
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()
    assert [child.returncode for child in children] == [0, 0]
    assert caplog.records == []


def test_killing_a_writer_leaves_nothing_torn(
    store: ManifestStore, caplog: pytest.LogCaptureFixture
) -> None:
    child = writer(store, 10**9)
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == "ready\n"
        while store.find(ref(":Q4_K_M")) is None:
            assert child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert store.find(ref(":Q4_K_M")) in (None, Q4, NEWER_Q4)
    store.put(ref(":Q4_K_M"), Q4)
    assert store.find(ref(":Q4_K_M")) == Q4
    assert caplog.records == []


# -- what other programs left ---------------------------------------------------------------------

FILES = {
    "README.md": b"# A model\n",
    "Name-Q4_K_M.gguf": b"GGUF four",
    "Q8_0/Name-Q8_0-00001-of-00002.gguf": b"GGUF one",
    "Q8_0/Name-Q8_0-00002-of-00002.gguf": b"GGUF two!",
    "mmproj-F16.gguf": b"GGUF sees",
}


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Places, str]:
    """A cache that `hf download` filled: all of one repository, one file of another."""
    home = tmp_path_factory.mktemp("home")
    with LocalHub() as hub:
        commit = hub.add(REPO, FILES)
        assert hub.add("owner/part", FILES)
        for words in ((REPO,), ("owner/part", "Q8_0/Name-Q8_0-00001-of-00002.gguf")):
            subprocess.run(
                [Path(sys.executable).with_name("hf"), "download", *words],
                env=hub.environment(home),
                check=True,
                capture_output=True,
                timeout=60,
            )
    return Places(home / "hub", home / "state", home / "builtin"), commit


@pytest.mark.parametrize("text", ["", ":Q4_K_M", "/Name-Q4_K_M.gguf"])
def test_the_real_clients_listing(downloaded: tuple[Places, str], text: str) -> None:
    places, commit = downloaded
    assert (places.repo(REPO) / "trees" / f"{commit}.json").exists()
    for find in (from_tree_cache, from_snapshot):
        found = find(places, ref(text))
        assert found is not None
        assert (found.repo, found.revision, found.branch) == (REPO, commit, "main")
        assert [(one.path, one.size, one.sha256) for one in found.files] == [
            (path, len(FILES[path]), hashlib.sha256(FILES[path]).hexdigest())
            for path in ("Name-Q4_K_M.gguf", "mmproj-F16.gguf")
        ]
        pinned = find(places, HubRef(REPO, commit, ref(text).quant, ref(text).path))
        assert pinned is not None
        assert pinned.files == found.files
        assert find(places, HubRef(REPO, quant="Q5_K_M")) is None
        assert find(places, HubRef(REPO, "v2")) is None
        assert find(places, HubRef(REPO, NEW)) is None
        assert find(places, HubRef("owner/none")) is None


def test_a_part_of_a_set_says_nothing(downloaded: tuple[Places, str]) -> None:
    places, _ = downloaded
    assert from_tree_cache(places, HubRef("owner/part", quant="Q8_0")) is None
    assert from_snapshot(places, HubRef("owner/part", quant="Q8_0")) is None


@pytest.mark.parametrize(
    "tree",
    [
        "",
        "[]",
        "{}",
        '{"format_version": 2, "files": {"m-Q4_0.gguf": FACTS}}',
        '{"format_version": 1, "files": ["m-Q4_0.gguf"]}',
        '{"format_version": 1, "files": {"m-Q4_0.gguf": 5}}',
        '{"format_version": 1, "files": {"m-Q4_0.gguf": {"size": 5, "blob_id": "b"}}}',
        '{"format_version": 1, "files": {"m-Q4_0.gguf": {"size": [], "lfs_sha256": "x"}}}',
        '{"format_version": 1, "files": {"../m-Q4_0.gguf": FACTS}}',
        "\udcff",
    ],
)
def test_a_listing_that_cannot_be_used(tmp_path: Path, tree: str) -> None:
    places = Places(tmp_path, tmp_path / "state", tmp_path / "builtin")
    facts = json.dumps({"size": 5, "blob_id": "b", "lfs_sha256": "a" * 64, "lfs_size": 9})
    trees = places.repo("o/r") / "trees" / f"{OLD}.json"
    trees.parent.mkdir(parents=True)
    trees.write_text(tree.replace("FACTS", facts), errors="surrogateescape")
    assert from_tree_cache(places, HubRef("o/r", OLD)) is None
    trees.write_text(f'{{"format_version": 1, "files": {{"m-Q4_0.gguf": {facts}}}}}')
    found = from_tree_cache(places, HubRef("o/r", OLD))
    assert found is not None
    assert found.shards == (Shard(path="m-Q4_0.gguf", size=9, sha256="a" * 64),)


@pytest.mark.parametrize("text", ["", "main", "x" * 4000, OLD[:39]])
def test_a_branch_that_names_no_commit(tmp_path: Path, text: str) -> None:
    places = Places(tmp_path, tmp_path / "state", tmp_path / "builtin")
    places.branch("o/r", "main").parent.mkdir(parents=True)
    places.branch("o/r", "main").write_text(text)
    assert from_tree_cache(places, HubRef("o/r")) is None
    assert from_snapshot(places, HubRef("o/r")) is None


def test_links_to_nothing_and_files_that_are_no_links(tmp_path: Path) -> None:
    places = Places(tmp_path, tmp_path / "state", tmp_path / "builtin")
    snapshot = places.snapshot("o/r", OLD)
    snapshot.mkdir(parents=True)
    (snapshot / "m-Q4_0.gguf").symlink_to(f"../../blobs/{'a' * 64}")
    (snapshot / "m-Q8_0.gguf").write_bytes(b"GGUF copied here")
    (snapshot / "m-F16.gguf").symlink_to("m-Q8_0.gguf")
    assert from_snapshot(places, HubRef("o/r", OLD)) is None
    blob = places.blob("o/r", "a" * 64)
    blob.parent.mkdir()
    blob.write_bytes(b"GGUF")
    found = from_snapshot(places, HubRef("o/r", OLD))
    assert found is not None
    assert found.shards == (Shard(path="m-Q4_0.gguf", size=4, sha256="a" * 64),)
