"""Looking at files: links, what is no file, what is no weights, and headers nobody should write."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.cache import observe as observing
from meshd.cache.gguf_header import MAX_TENSORS
from meshd.cache.headers import Headers
from meshd.cache.ledger import Ledger, facts_of
from meshd.cache.manifest import Manifest, Shard
from meshd.cache.observe import MAX_HEADER_BYTES, is_locked, observe
from meshd.cache.places import Places
from meshd.cache.verdict import Fault, Observation
from meshd.cache.weights import local_set, look, look_at, to_weights
from meshd.ids import ModelId
from tests.cache.sets import write_set
from tests.models import small_model

LIMIT_BYTES = 64 * 1024 * 1024


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return small_model(tmp_path_factory.mktemp("observe") / "small.gguf").read_bytes()


@pytest.fixture
def file(tmp_path: Path, model: bytes) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(model)
    return path


def test_a_good_file(file: Path) -> None:
    seen = observe(file)
    assert (seen.path, seen.fault, seen.problem) == (str(file), None, "")
    assert seen.facts == facts_of(file)
    assert seen.header is not None
    assert seen.header.architecture == "llama"


def test_through_links_the_last_file_counts(file: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("m.gguf")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    seen = observe(tmp_path / "b")
    assert seen.path == str(tmp_path / "b")
    assert seen.facts == facts_of(file)
    assert seen.facts is not None
    assert seen.facts.real_path == str(file)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))


@pytest.mark.parametrize(
    ("make", "fault", "words"),
    [
        (lambda p: None, Fault.MISSING, "is missing"),
        (lambda p: p.symlink_to("../blobs/gone"), Fault.MISSING, "a link to ../blobs/gone, which"),
        (lambda p: p.symlink_to(p.name), Fault.MISSING, "is a link to"),
        (Path.mkdir, Fault.FOREIGN, "a directory"),
        (os.mkfifo, Fault.FOREIGN, "a pipe"),
        (make_socket, Fault.FOREIGN, "a socket"),
        (lambda p: p.symlink_to("/dev/null"), Fault.FOREIGN, "device"),
        (Path.touch, Fault.SHORT, "is empty"),
        (lambda p: p.write_bytes(bytes(100)), Fault.CORRUPT, "does not begin with GGUF"),
        (lambda p: p.write_bytes(b"GGUF"), Fault.SHORT, "cut off"),
    ],
)
def test_what_is_no_weights(
    tmp_path: Path, make: Callable[[Path], object], fault: Fault, words: str
) -> None:
    path = tmp_path / "x"
    make(path)
    seen = observe(path)
    assert seen.fault is fault
    assert words in seen.problem
    assert seen.header is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        ("\ufeff\n <!DOCTYPE html>\n<html>", "web page"),
        ("<html><body>502 Bad Gateway", "web page"),
        ("<?xml version='1.0'?><Error><Code>AccessDenied", "XML"),
        ("<Error><Code>NoSuchKey", "XML"),
        ('{"error":"Repository not found"}', "JSON"),
        ("[]", "JSON"),
    ],
)
def test_foreign_content(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_text(content)
    seen = observe(path)
    assert seen.fault is Fault.FOREIGN
    assert words in seen.problem


def test_a_file_behind_a_file_is_missing(file: Path) -> None:
    assert observe(file / "x.gguf").fault is Fault.MISSING


def test_an_unreadable_file(file: Path) -> None:
    file.chmod(0)
    if os.access(file, os.R_OK):  # root may read everything: let somebody else look
        code = (
            "import os, sys; from meshd.cache.observe import observe; os.setuid(65534); "
            "seen = observe(sys.argv[1]); print(seen.fault, seen.problem)"
        )
        said = subprocess.run(
            [sys.executable, "-c", code, file.name],
            cwd=file.parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    else:
        seen = observe(file)
        said = f"{seen.fault} {seen.problem}"
    assert said.strip() == "corrupt cannot be read: Permission denied"


def test_a_file_that_shrinks_while_it_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        found = real(fd, length, offset)
        os.truncate(file, 50)
        return found

    monkeypatch.setattr(observing, "FIRST_READ_BYTES", 100)
    monkeypatch.setattr(os, "pread", pread)
    seen = observe(file)
    assert seen.fault is Fault.SHORT
    assert "shorter while it was read" in seen.problem


# -- elsewhere ------------------------------------------------------------------------------------


class HubCache:
    """One model of one file in a Hugging Face cache, of which nothing is there yet."""

    def __init__(self, directory: Path, model: bytes) -> None:
        self.places = Places(directory / "hub", directory / "state", directory / "builtin")
        self.shard = Shard(path="m.gguf", size=len(model), sha256="a" * 64)
        self.manifest = Manifest(repo="owner/name", revision="b" * 40, shards=(self.shard,))
        self.blob = self.places.blob("owner/name", self.shard.sha256)
        self.link = self.places.snapshot("owner/name", "b" * 40, "m.gguf")
        self.lock = self.places.lock("owner/name", self.shard.sha256)
        for path in (self.blob, self.link, self.lock):
            path.parent.mkdir(parents=True)
        self.ledger = Ledger(self.places.ledger)

    def fault(self) -> tuple[Fault, str]:
        (file,) = look_at(self.manifest, self.places, self.ledger).files
        return file.fault, file.problem


@pytest.fixture
def cache(tmp_path: Path, model: bytes) -> HubCache:
    return HubCache(tmp_path, model)


def test_from_nothing_to_ok(cache: HubCache, model: bytes) -> None:
    assert cache.fault() == (Fault.MISSING, "is missing")
    cache.link.symlink_to("../../blobs/" + cache.shard.sha256)
    assert cache.fault()[1].startswith("is a link to ../../blobs/aaa")
    cache.blob.write_bytes(model)
    assert cache.fault()[0] is Fault.UNVERIFIED
    cache.ledger.record_landed(cache.blob, "c" * 64)
    assert cache.fault()[0] is Fault.CORRUPT
    cache.ledger.record_landed(cache.blob, cache.shard.sha256)
    assert cache.fault() == (Fault.OK, "")
    verdict = look_at(cache.manifest, cache.places, cache.ledger)
    weights = to_weights(ModelId("m"), "owner/name", verdict, cache.manifest)
    assert weights.digest == f"sha256:{cache.shard.sha256}"
    assert weights.paths == (cache.link,)
    assert weights.mmproj is None


def test_another_program_downloads_it(cache: HubCache, model: bytes) -> None:
    partial = cache.blob.with_name(f"{cache.blob.name}.0a1b2c3d.incomplete")
    partial.write_bytes(bytes(40_960))
    assert not is_locked(cache.lock)
    assert cache.fault()[0] is Fault.MISSING
    with cache.lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert is_locked(cache.lock)
        fault, problem = cache.fault()
    assert fault is Fault.ELSEWHERE
    assert problem.startswith("is being downloaded by another program, 41.0 kB of ")
    fault, problem = cache.fault()  # it is gone, and its lock with it
    assert fault is Fault.MISSING
    assert problem.startswith("is missing; a download that did not end has 41.0 kB of ")


def test_bytes_without_their_link(cache: HubCache, model: bytes) -> None:
    cache.blob.write_bytes(model)
    fault, problem = cache.fault()
    assert fault is Fault.MISSING
    assert problem == f"is missing, though its bytes are in {cache.blob}"


def test_only_an_ok_set_of_the_hub_becomes_weights(cache: HubCache, model: bytes) -> None:
    cache.link.write_bytes(model)
    verdict = look_at(cache.manifest, cache.places, cache.ledger)
    assert verdict.needs_hash
    with pytest.raises(ValueError, match="not to be given to an engine"):
        to_weights(ModelId("m"), "owner/name", verdict, cache.manifest)
    assert to_weights(ModelId("m"), str(cache.link), verdict).digest is None


# -- sets -----------------------------------------------------------------------------------------


def test_a_set_is_looked_at(tmp_path: Path) -> None:
    paths = write_set(tmp_path, 400, 400, 400)
    ledger, headers = Ledger(tmp_path / "ledger"), Headers()
    for path in paths:
        ledger.record_landed(path, "a" * 64)
    verdict = look(local_set(paths[1]), ledger, headers)
    assert verdict == look(local_set(paths[2]), ledger)
    assert verdict.ok
    assert to_weights(ModelId("m"), "m", verdict).digest is not None
    paths[2].unlink()
    assert look(local_set(paths[0]), ledger, headers).worst.fault is Fault.MISSING


# -- headers nobody should write ------------------------------------------------------------------


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def gguf(tensors: int, entries: int, body: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + body


def observed(path: Path, head: bytes, size: int) -> Observation:
    """Seen of a file of `size` bytes that begins with `head`, within LIMIT_BYTES of memory."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(max(size, len(head)))
    tracemalloc.start()
    try:
        seen = observe(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < LIMIT_BYTES
    return seen


MUTATIONS = st.lists(
    st.tuples(
        st.integers(0, 5000),
        st.one_of(
            st.binary(min_size=1, max_size=9),
            st.sampled_from([2**63, 2**64 - 1, 2**32, 2**31, 0]).map(
                lambda number: struct.pack("<Q", number)
            ),
        ),
    ),
    min_size=1,
    max_size=8,
)


@given(
    mutations=MUTATIONS,
    cut=st.one_of(st.none(), st.integers(0, 6000)),
    grown=st.sampled_from([0, 1, 2**30, 2**40]),
)
def test_mutations_of_a_real_header(
    model: bytes,
    tmp_path_factory: pytest.TempPathFactory,
    mutations: list[tuple[int, bytes]],
    cut: int | None,
    grown: int,
) -> None:
    damaged = bytearray(model)
    for at, content in mutations:
        damaged[at : at + len(content)] = content
    head = bytes(damaged[:cut])
    path = tmp_path_factory.mktemp("fuzz", numbered=True) / "x.gguf"
    seen = observed(path, head, len(head) + grown)
    path.unlink()
    assert (seen.header is None) == (seen.fault is not None)
    if seen.header is not None:
        assert seen.header.needed_bytes <= len(head) + grown


FACE = "\N{GRINNING FACE}".encode()  # makes Python keep four bytes for every letter beside it
STRINGS = b"".join(text(b"x" * 26) for _ in range(4096))


def tensors(count: int) -> bytes:
    """Whole and apart from each other, with names that take much memory."""
    return b"".join(
        text(b"%06d" % number + 10 * FACE)
        + struct.pack("<IQQQQIQ", 4, 1 << 11, 1 << 11, 1, 1, 0, number << 24)
        for number in range(count)
    )


def many_kept(count: int, length: int) -> bytes:
    return b"".join(
        text(b"k%06d" % number) + struct.pack("<I", 8) + text(FACE + length * b"x")
        for number in range(count)
    )


def strings(count: int, body: bytes) -> bytes:
    return text(b"strings") + struct.pack("<IIQ", 9, 8, count) + body


@pytest.mark.parametrize(
    ("head", "fault"),
    [
        pytest.param(lambda: gguf(0, 30, many_kept(30, 1 << 20)), None, id="long strings"),
        pytest.param(lambda: gguf(0, 400, many_kept(400, 80_000)), None, id="strings"),
        pytest.param(
            lambda: gguf(0, 1, strings(1 << 30, bytes(MAX_HEADER_BYTES))),
            Fault.CORRUPT,
            id="endless strings",
        ),
        pytest.param(
            lambda: gguf(0, 1, strings(1 << 50, STRINGS)), Fault.CORRUPT, id="absurd count"
        ),
        pytest.param(
            lambda: gguf(
                MAX_TENSORS,
                4001,
                many_kept(4000, 700) + strings(200 * 4096, 200 * STRINGS) + tensors(MAX_TENSORS),
            ),
            None,
            id="all of it",
        ),
        pytest.param(
            lambda: gguf(0, 1, strings(1, struct.pack("<Q", 2**63))), Fault.CORRUPT, id="2^63"
        ),
        pytest.param(
            lambda: gguf(0, 1, strings(1, struct.pack("<Q", 2**40))), Fault.SHORT, id="cut"
        ),
    ],
)
def test_the_greediest_headers(
    tmp_path: Path, head: Callable[[], bytes], fault: Fault | None
) -> None:
    seen = observed(tmp_path / "x.gguf", head(), 1 << 40)
    assert seen.fault is fault, seen.problem
