"""Where the source comes from, and that it is the one that was meant."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from meshd.errors import BuildFailed, SourceRejected
from meshd.runtime.sources import MARKER, PINNED, PinnedSource, obtain, tree_sha256
from tests.runtime.toy_source import toy_archive, toy_files, toy_package, toy_tree


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index."""
    directory = tmp_path / "index"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return directory


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "sources"


def names(sources: Path) -> list[str]:
    """What is there, but for the lock and the seals of unpacked trees."""
    return sorted(p.name for p in sources.iterdir() if p.suffix != ".sha256" and p.name != ".lock")


def test_the_pin_is_whole() -> None:
    assert PINNED.requirement == "llama-cpp-python==0.3.36"
    assert len(PINNED.sha256) == 64


def test_fetched_by_pip_checked_and_unpacked(index: Path, sources: Path) -> None:
    pinned = toy_package(index)
    source = obtain(None, sources, pinned)
    assert (source.name, source.sha256) == ("toy-engine==1.0", pinned.sha256)
    assert source.commit == "feedbee"
    files = {p.relative_to(source.directory).as_posix() for p in source.directory.rglob("*.*")}
    # The tree of llama.cpp alone, without what no build reads.
    assert files == {"CMakeLists.txt", MARKER.as_posix(), "lib.cpp", "server.cpp", "tool.cpp"}
    assert names(sources) == ["toy-engine-1.0.tar.gz", f"tree-{pinned.sha256[:16]}"]


def test_an_edited_tree_is_unpacked_again(index: Path, sources: Path) -> None:
    pinned = toy_package(index)
    source = obtain(None, sources, pinned)
    edited = source.directory / "server.cpp"
    original = edited.read_bytes()
    edited.write_bytes(original + b"// mine\n")
    assert obtain(None, sources, pinned) == source
    assert edited.read_bytes() == original


def test_fetched_once(index: Path, sources: Path) -> None:
    pinned = toy_package(index)
    first = obtain(None, sources, pinned)
    for path in index.iterdir():
        path.unlink()
    assert obtain(None, sources, pinned) == first


def test_a_damaged_archive_in_the_cache_is_fetched_again(index: Path, sources: Path) -> None:
    pinned = toy_package(index)
    obtain(None, sources, pinned)
    archive = sources / "toy-engine-1.0.tar.gz"
    good = archive.read_bytes()
    archive.write_bytes(good[:-10])
    obtain(None, sources, pinned)
    assert archive.read_bytes() == good


def test_another_hash_is_refused_and_nothing_kept(index: Path, sources: Path) -> None:
    pinned = toy_package(index, broken=True)
    with pytest.raises(SourceRejected, match="not the source meshd was made for"):
        obtain(None, sources, pinned)
    assert names(sources) == []


def test_an_index_without_it(index: Path, sources: Path) -> None:
    index.mkdir()
    with pytest.raises(BuildFailed, match=r"toy-engine==1\.0 could not be fetched.*--source"):
        obtain(None, sources, PinnedSource("toy-engine", "1.0", "0" * 64, "x", "y"))
    assert names(sources) == []


def test_an_interpreter_without_pip(
    sources: Path, monkeypatch: pytest.MonkeyPatch, index: Path
) -> None:
    pinned = toy_package(index)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BuildFailed, match=f"{sys.executable} has no pip .*ensurepip.*--source"):
        obtain(None, sources, pinned)


def test_the_pinned_archive_got_by_hand_is_the_pinned_source(index: Path, sources: Path) -> None:
    pinned = toy_package(index)
    by_hand = obtain(str(index / "toy_engine-1.0.tar.gz"), sources, pinned)
    assert by_hand == obtain(None, sources, pinned)


def test_an_archive_of_llama_cpp(tmp_path: Path, sources: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    path = toy_archive(tmp_path / "x.tar.gz", toy_files(), comment=commit)
    source = obtain(str(path), sources)
    assert source.commit == "0123456"
    assert (source.directory / "server.cpp").is_file()
    assert not (source.directory / "docs").exists()
    assert not (source.directory / "tools" / "x.gguf").exists()


@pytest.mark.parametrize("top", ["./toy", ".", "a/b/c"])
def test_an_archive_with_other_tops(tmp_path: Path, sources: Path, top: str) -> None:
    path = toy_archive(tmp_path / "x.tar.gz", toy_files(), top=top)
    source = obtain(str(path), sources)
    assert (source.directory / "server.cpp").is_file()
    assert source.commit == "unknown"


@pytest.mark.parametrize("content", [b"<html>404</html>", b"", b"\x1f\x8b\x08garbage" * 9])
def test_a_file_that_is_no_archive(tmp_path: Path, sources: Path, content: bytes) -> None:
    path = tmp_path / "x.tar.gz"
    path.write_bytes(content)
    with pytest.raises(SourceRejected, match="x\\.tar\\.gz"):
        obtain(str(path), sources)
    assert names(sources) == []


def test_half_an_archive(tmp_path: Path, sources: Path) -> None:
    files = {**toy_files(), "big.txt": "".join(str(n) for n in range(200_000))}
    path = toy_archive(tmp_path / "x.tar.gz", files)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(SourceRejected):
        obtain(str(path), sources)
    assert names(sources) == []


def test_an_archive_of_something_else(tmp_path: Path, sources: Path) -> None:
    path = toy_archive(tmp_path / "x.tar.gz", {"CMakeLists.txt": "project(other)"})
    with pytest.raises(SourceRejected, match="does not hold llama"):
        obtain(str(path), sources)


@pytest.mark.parametrize("name", ["../../escaped", "toy-1/../../../escaped"])
def test_members_that_climb_out_are_refused(tmp_path: Path, sources: Path, name: str) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for member, content in [(f"toy-1/{MARKER}", b"x"), (name, b"bad")]:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    try:
        obtain(str(path), sources)
    except SourceRejected:
        assert names(sources) == []
    assert not list(tmp_path.rglob("escaped"))


def test_what_a_killed_unpacking_left_is_cleared(tmp_path: Path, sources: Path) -> None:
    (sources / ".scratch-abc" / "half").mkdir(parents=True)
    path = toy_archive(tmp_path / "x.tar.gz", toy_files())
    source = obtain(str(path), sources)
    assert names(sources) == [source.directory.name]


def test_two_at_once_unpack_once(tmp_path: Path, sources: Path) -> None:
    path = toy_archive(tmp_path / "x.tar.gz", toy_files())
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(obtain(str(path), sources))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 4
    assert len(set(found)) == 1
    assert names(sources) == [found[0].directory.name]


def test_a_directory_of_ones_own_is_another_source_when_it_changes(
    tmp_path: Path, sources: Path
) -> None:
    tree = toy_tree(tmp_path / "mine")
    first = obtain(str(tree), sources)
    assert first.directory == tree
    (tree / "docs" / "long.md").write_text("other words")
    (tree / "build-x").mkdir()
    (tree / "build-x" / "a.o").write_text("an object")
    assert tree_sha256(tree) == first.sha256, "what no build reads does not count"
    (tree / "lib.cpp").write_text("// changed")
    assert obtain(str(tree), sources).sha256 != first.sha256


def test_a_directory_inside_another_repository_has_no_commit(tmp_path: Path, sources: Path) -> None:
    _repository(tmp_path)
    assert obtain(str(toy_tree(tmp_path / "mine")), sources).commit == "unknown"


def test_paths_that_are_nothing(tmp_path: Path, sources: Path) -> None:
    with pytest.raises(SourceRejected, match="no such file or directory"):
        obtain(str(tmp_path / "nowhere"), sources)
    with pytest.raises(SourceRejected, match="it is not llama"):
        obtain(str(tmp_path), sources)


def test_a_tag_of_a_repository(tmp_path: Path, sources: Path) -> None:
    tree = toy_tree(tmp_path / "origin")
    head = _repository(tree)
    source = obtain(f"git+file://{tree}@v1", sources)
    assert source.commit == head[:7]
    assert source.sha256 == tree_sha256(tree)
    assert (source.directory / "server.cpp").is_file()
    assert obtain(f"git+file://{tree}@v1", sources) == source
    (source.directory / "server.cpp").write_text("// mine")
    assert obtain(f"git+file://{tree}@v1", sources) == source
    assert (source.directory / "server.cpp").read_text() == (tree / "server.cpp").read_text()
    with pytest.raises(BuildFailed, match="at v2 could not be cloned"):
        obtain(f"git+file://{tree}@v2", sources)
    with pytest.raises(SourceRejected, match="name a tag"):
        obtain(f"git+file://{tree}", sources)
    assert names(sources) == [source.directory.name]


def _repository(directory: Path) -> str:
    """Make `directory` a repository with the tag v1; its commit."""

    def git(*words: str) -> str:
        who = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
        done = subprocess.run(
            ["git", *who, *words], cwd=directory, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "--allow-empty", "--message", "first")
    git("tag", "v1")
    return git("rev-parse", "HEAD")
