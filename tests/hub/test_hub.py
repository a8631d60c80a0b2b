"""The local hub against the real client, and its faults against a raw one."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.hub import (
    Drop,
    Fault,
    Flip,
    IgnoreRange,
    LocalHub,
    Page,
    Pointer,
    Reset,
    Slow,
    Stage,
    Stall,
    Status,
    Truncate,
    WrongLength,
)

REPO = "owner/name"
SHARD = "q4/model-00001-of-00002.gguf"
BYTES = random.Random(4).randbytes(600_000)
README = b"# A model\n"
HF = Path(sys.executable).with_name("hf")


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub() as hub:
        hub.add(REPO, {SHARD: BYTES, "README.md": README})
        yield hub


# -- the real client ------------------------------------------------------------------------------


def hf(hub: LocalHub, home: Path, *words: str, token: str | None = None) -> str:
    """What `hf` says; its complaint, with its exit status, if it fails."""
    done = subprocess.run(
        [HF, *words],
        env=hub.environment(home, token=token) | {"NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout if done.returncode == 0 else f"exit {done.returncode}: {done.stderr}"


def test_hf_downloads_lists_and_verifies(hub: LocalHub, tmp_path: Path) -> None:
    commit = hub.add(REPO, {SHARD: BYTES, "README.md": README})
    assert commit in hf(hub, tmp_path, "download", REPO)
    repo = tmp_path / "hub" / "models--owner--name"
    shard = repo / "snapshots" / commit / SHARD
    assert shard.read_bytes() == BYTES
    assert shard.resolve().name == hashlib.sha256(BYTES).hexdigest()
    git_oid = hashlib.sha1(b"blob %d\0" % len(README) + README).hexdigest()
    assert (repo / "snapshots" / commit / "README.md").resolve().name == git_oid
    assert (repo / "refs" / "main").read_text() == commit
    assert REPO in hf(hub, tmp_path, "cache", "ls")
    assert "All checksums match" in hf(hub, tmp_path, "cache", "verify", REPO)
    hub.wait_idle()
    assert hub.sent(SHARD) == len(BYTES)


def test_hf_verify_sees_that_the_hub_lists_other_bytes(hub: LocalHub, tmp_path: Path) -> None:
    commit = hub.add(REPO, {SHARD: BYTES})
    hf(hub, tmp_path, "download", REPO)
    shard = tmp_path / "hub" / "models--owner--name" / "snapshots" / commit / SHARD
    shard.resolve().write_bytes(BYTES[:-1] + b"?")
    assert "exit 1: Error: Verification failed" in hf(hub, tmp_path, "cache", "verify", REPO)


def test_the_client_pages_through_a_large_tree(tmp_path: Path) -> None:
    code = (
        "from huggingface_hub import HfApi\n"
        "for f in HfApi().list_repo_tree('owner/name', recursive=True):\n"
        "    print(f.path, getattr(getattr(f, 'lfs', None), 'sha256', None))\n"
    )
    with LocalHub(page_size=3) as hub:
        hub.add(REPO, {f"q{n % 2}/{n:02}.gguf": bytes([n]) for n in range(10)})
        listed = _client(hub, tmp_path, code).splitlines()
        asked = len(hub.requests)
    assert [line.split()[0] for line in listed] == sorted(
        ["q0", "q1", *(f"q{n % 2}/{n:02}.gguf" for n in range(10))]
    )
    assert listed[1].split()[1] == hashlib.sha256(bytes([0])).hexdigest()
    assert asked == 4  # 12 entries


def test_model_info_names_commit_and_files(hub: LocalHub, tmp_path: Path) -> None:
    commit = hub.add(REPO, {SHARD: BYTES})
    code = (
        "from huggingface_hub import HfApi\n"
        "info = HfApi().model_info('owner/name', files_metadata=True)\n"
        "print(info.sha, info.gated, *((s.rfilename, s.size, s.lfs.sha256) for s in info.siblings))"
    )
    expected = (SHARD, len(BYTES), hashlib.sha256(BYTES).hexdigest())
    assert _client(hub, tmp_path, code).strip() == f"{commit} False {expected}"


def test_an_old_commit_and_a_branch_stay_readable(hub: LocalHub, tmp_path: Path) -> None:
    old = hub.add(REPO, {"a.gguf": b"old"})
    new = hub.add(REPO, {"a.gguf": b"new"})
    hub.add(REPO, {"a.gguf": b"try"}, revision="refs/pr/1")
    assert old != new
    for revision, content in (("main", b"new"), (old, b"old"), ("refs/pr/1", b"try")):
        words = ("download", REPO, "a.gguf", "--revision", revision, "--local-dir")
        hf(hub, tmp_path, *words, str(tmp_path / "here"))
        assert (tmp_path / "here" / "a.gguf").read_bytes() == content


def test_the_client_resumes_by_range_after_a_cut(hub: LocalHub, tmp_path: Path) -> None:
    content = random.Random(5).randbytes(12_000_000)
    hub.add(REPO, {SHARD: content})
    hub.faults.add(SHARD, Truncate(at=11_000_000))
    hf(hub, tmp_path, "download", REPO, SHARD)
    hub.wait_idle()
    first, second = hub.content_requests(SHARD)
    kept = 10 * 1024 * 1024  # the client writes in blocks of that size
    assert (first.sent_bytes, second.sent_bytes) == (11_000_000, len(content) - kept)
    assert second.range == (kept, -1)
    assert second.status == 206
    assert "All checksums match" in hf(hub, tmp_path, "cache", "verify", REPO)


def test_what_is_not_there_is_refused_as_the_client_expects(hub: LocalHub, tmp_path: Path) -> None:
    code = (
        "from huggingface_hub import HfApi, hf_hub_download\n"
        "for repo, revision, path in [('owner/none', 'main', 'a'), ('owner/name', 'nope', 'a'),\n"
        "                             ('owner/name', 'main', 'a')]:\n"
        "    try:\n"
        "        hf_hub_download(repo, path, revision=revision)\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__)\n"
    )
    assert _client(hub, tmp_path, code).split() == [
        "RepositoryNotFoundError",
        "RevisionNotFoundError",
        "RemoteEntryNotFoundError",
    ]


@pytest.mark.parametrize(
    ("kind", "token", "expected"),
    [
        ("private", None, "RepositoryNotFoundError 401"),
        ("private", "hf_stranger", "RepositoryNotFoundError 404"),
        ("private", "hf_friend", "got it"),
        ("gated", None, "GatedRepoError 401"),
        ("gated", "hf_stranger", "GatedRepoError 403"),
        ("gated", "hf_friend", "got it"),
    ],
)
def test_who_may_read(
    hub: LocalHub, tmp_path: Path, kind: str, token: str | None, expected: str
) -> None:
    hub.add("owner/closed", {"a.gguf": b"a"}, private=kind == "private", gated=kind == "gated")
    hub.admit("hf_friend", "owner/closed")
    code = (
        "from huggingface_hub import hf_hub_download\n"
        "try:\n"
        "    hf_hub_download('owner/closed', 'a.gguf')\n"
        "    print('got it')\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error.response.status_code)\n"
    )
    assert _client(hub, tmp_path, code, token=token).strip() == expected
    resolved = [request.token for request in hub.requests if request.stage is Stage.RESOLVE]
    assert resolved == [token]
    # The CDN never sees the token: it is another origin.
    assert {request.token for request in hub.content_requests()} <= {None}


def _client(hub: LocalHub, home: Path, code: str, *, token: str | None = None) -> str:
    """What a Python process with huggingface_hub prints."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=hub.environment(home, token=token),
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout


# -- faults ---------------------------------------------------------------------------------------


class Got:
    """What a raw client got for one GET of the shard's bytes."""

    def __init__(self, hub: LocalHub, *, span: str | None = None, timeout_s: float = 10) -> None:
        url = urlsplit(location(hub))
        self.body = b""
        self.status = 0
        self.ended: str = "whole"
        connection = http.client.HTTPConnection(url.netloc, timeout=timeout_s)
        headers = {} if span is None else {"Range": f"bytes={span}"}
        try:
            connection.request("GET", f"{url.path}?{url.query}", headers=headers)
            answer = connection.getresponse()
            self.status = answer.status
            self.headers = answer.headers
            while block := answer.read1(65536):
                self.body += block
            if answer.length:
                self.ended = "short"
        except (OSError, http.client.HTTPException) as error:
            self.ended = type(error).__name__
        finally:
            connection.close()


def location(hub: LocalHub) -> str:
    connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc, timeout=10)
    connection.request("HEAD", f"/{REPO}/resolve/main/{SHARD}")
    answer = connection.getresponse()
    connection.close()
    assert answer.status == 302
    return str(answer.headers["Location"])


def test_ranges(hub: LocalHub) -> None:
    for span, status, body in (
        (None, 200, BYTES),
        ("0-0", 206, BYTES[:1]),
        ("100-199", 206, BYTES[100:200]),
        ("599990-", 206, BYTES[-10:]),
        ("599990-700000", 206, BYTES[-10:]),
        ("600000-", 416, b""),
    ):
        got = Got(hub, span=span)
        assert (got.status, got.body, got.ended) == (status, body, "whole")
    assert Got(hub, span="100-199").headers["Content-Range"] == "bytes 100-199/600000"


@pytest.mark.parametrize(
    ("fault", "status", "body", "ended"),
    [
        (Truncate(at=1000), 200, BYTES[:1000], "short"),
        (Truncate(at=0), 200, b"", "short"),
        (Reset(at=300_000), 200, BYTES[:300_000], "ConnectionResetError"),
        (Stall(at=1000), 200, BYTES[:1000], "TimeoutError"),
        (WrongLength(by=10), 200, BYTES, "short"),
        (WrongLength(by=-10), 200, BYTES[:-10], "whole"),
        (Drop(), 0, b"", "RemoteDisconnected"),
    ],
)
def test_broken_answers(hub: LocalHub, fault: Fault, status: int, body: bytes, ended: str) -> None:
    hub.faults.add("*.gguf", fault)
    got = Got(hub, timeout_s=0.5)
    assert (got.status, len(got.body), got.ended) == (status, len(body), ended)
    assert got.body == body
    again = Got(hub)  # it struck once
    assert (again.status, again.body, again.ended) == (200, BYTES, "whole")


def test_a_flipped_byte(hub: LocalHub) -> None:
    hub.faults.add(SHARD, Flip(at=123_456, mask=0x80))
    assert Got(hub, span="0-1000").body == BYTES[:1001]  # does not carry it
    wrong = [n for n, (a, b) in enumerate(zip(Got(hub).body, BYTES, strict=True)) if a != b]
    assert wrong == [123_456]
    assert Got(hub).body == BYTES


def test_a_page_and_a_pointer_in_place_of_the_file(hub: LocalHub) -> None:
    hub.faults.add(SHARD, Page())
    hub.faults.add(SHARD, Pointer())
    page = Got(hub)
    assert (page.status, page.headers["Content-Type"]) == (200, "text/html")
    assert b"<html>" in page.body
    pointer = Got(hub)  # such faults strike one after the other
    assert pointer.status == 200
    assert pointer.body.decode().splitlines()[1:] == [
        f"oid sha256:{hashlib.sha256(BYTES).hexdigest()}",
        f"size {len(BYTES)}",
    ]


def test_an_ignored_range(hub: LocalHub) -> None:
    hub.faults.add(SHARD, IgnoreRange())
    got = Got(hub, span="100-199")
    assert (got.status, got.body) == (200, BYTES)


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_statuses_at_each_stage(hub: LocalHub, status: int) -> None:
    target = {
        Stage.API: (hub.endpoint, "tree", f"/api/models/{REPO}/tree/main"),
        Stage.RESOLVE: (hub.endpoint, SHARD, f"/{REPO}/resolve/main/{SHARD}"),
        Stage.CONTENT: (cdn := location(hub), SHARD, urlsplit(cdn).path),
    }
    for stage, (origin, subject, path) in target.items():
        hub.faults.add(subject, Status(status, retry_after_s=7), times=2, stage=stage)
        seen = []
        for _ in range(3):
            connection = http.client.HTTPConnection(urlsplit(origin).netloc, timeout=10)
            connection.request("GET", path)
            answer = connection.getresponse()
            seen.append((answer.status, answer.headers["Retry-After"]))
            connection.close()
        assert seen[:2] == [(status, "7")] * 2
        assert seen[2][0] in (200, 302)


def test_a_slow_answer(hub: LocalHub) -> None:
    hub.faults.add(SHARD, Slow(bytes_per_s=1_000_000))
    started_at = time.monotonic()
    assert Got(hub, span="0-299999").body == BYTES[:300_000]
    assert 0.28 < time.monotonic() - started_at < 2


def test_faults_that_go_together_strike_together(hub: LocalHub) -> None:
    hub.faults.add(SHARD, Slow(bytes_per_s=5_000_000), times=None)
    hub.faults.add(SHARD, Flip(at=10))
    hub.faults.add(SHARD, Truncate(at=1000))
    got = Got(hub)
    assert got.ended == "short"
    assert got.body == BYTES[:10] + bytes([BYTES[10] ^ 1]) + BYTES[11:1000]
    assert [request.faults for request in hub.content_requests()] == [
        (Slow(bytes_per_s=5_000_000), Flip(at=10), Truncate(at=1000))
    ]


def test_faults_meet_only_whom_they_are_for(hub: LocalHub) -> None:
    hub.add("owner/other", {"b.gguf": b"b"})
    hub.faults.add("a.gguf", Drop(), times=None)
    hub.faults.add(SHARD, Truncate(at=500_000))
    assert Got(hub, span="0-99").ended == "whole"
    assert Got(hub, span="499990-500010").body == BYTES[499_990:500_000]


def test_a_closed_hub_refuses_connections() -> None:
    with LocalHub() as hub:
        hub.add(REPO, {SHARD: BYTES})
        port = urlsplit(hub.endpoint).port
        hub.faults.add(SHARD, Stall(at=0))
        stalled = socket.create_connection(("127.0.0.1", urlsplit(location(hub)).port or 0))
        with stalled:
            path = urlsplit(location(hub)).path
            stalled.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            hub.wait_requests(SHARD, 1)
            hub.close()  # though an answer is on its way
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port or 0))


def test_files_are_served_from_where_they_lie(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    with path.open("wb") as file:
        os.truncate(file.fileno(), 64 * 1024 * 1024)
    with LocalHub() as hub:
        hub.add(REPO, {SHARD: path})
        assert len(Got(hub, span="33554432-37748735").body) == 4 * 1024 * 1024
        hub.wait_sent(SHARD, 4 * 1024 * 1024)


def test_waiting_in_vain_says_for_what(hub: LocalHub) -> None:
    with pytest.raises(TimeoutError, match=r"10 bytes of q4/.* sent"):
        hub.wait_sent(SHARD, 10, timeout_s=0.05)


def test_it_serves_a_directory_as_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.gguf").write_bytes(BYTES)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.hub", REPO, str(tmp_path / "set")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        url = urlsplit(process.stdout.readline().strip())
        connection = http.client.HTTPConnection(url.netloc, timeout=10)
        connection.request("GET", f"/api/models/{REPO}")
        assert b"a.gguf" in connection.getresponse().read()
        connection.close()
        process.communicate("")
    assert process.returncode == 0


def test_who_connects_as_it_closes_is_closed_as_well() -> None:
    with LocalHub() as hub:
        at = urlsplit(hub.endpoint)
        connections = [socket.create_connection((at.hostname, at.port)) for _ in range(3)]
    for connection in connections:
        with connection:
            connection.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
