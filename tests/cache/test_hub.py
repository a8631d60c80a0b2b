"""References resolved by the real client against the local hub, and its refusals in our words."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils._http import get_session, hf_raise_for_status

from meshd.cache.hub import resolve, translate
from meshd.cache.manifest import Shard
from meshd.cache.references import HubRef, parse_hub_ref
from meshd.errors import BadReference, HubRefused, HubUnavailable, MeshdError, NoSpace
from tests.hub import Drop, LocalHub, Page, Stage, Status

REPO = "owner/Name-GGUF"
Q4, Q8, PROJECTOR = b"GGUF four", b"GGUF eight bits", b"GGUF sees"
FILES = {
    "README.md": b"# A model\n",
    "Name-Q4_K_M.gguf": Q4,
    "Q8_0/Name-Q8_0-00001-of-00002.gguf": Q8 + b"1",
    "Q8_0/Name-Q8_0-00002-of-00002.gguf": Q8 + b"2",
    "mmproj-F16.gguf": PROJECTOR,
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    with LocalHub() as hub:
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            monkeypatch.delenv(name)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        hub.add(REPO, FILES)
        yield hub
        huggingface_hub.close_session()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def trouble(ref: str) -> MeshdError:
    with pytest.raises((HubRefused, HubUnavailable)) as caught:
        resolve(parse_hub_ref(ref))
    return caught.value


# -- what a reference is --------------------------------------------------------------------------


def test_a_manifest_in_one_request(hub: LocalHub) -> None:
    commit = hub.add(REPO, FILES)
    manifest = resolve(HubRef(REPO))
    assert (manifest.repo, manifest.revision, manifest.branch) == (REPO, commit, "main")
    assert manifest.shards == (Shard(path="Name-Q4_K_M.gguf", size=len(Q4), sha256=sha256(Q4)),)
    assert manifest.mmproj is not None
    assert manifest.mmproj.sha256 == sha256(PROJECTOR)
    assert len(hub.requests) == 1
    assert "meshd" in hub.requests[0].user_agent


def test_revisions(hub: LocalHub) -> None:
    old = resolve(HubRef(REPO)).revision
    new = hub.add(REPO, {"Name-Q4_K_M.gguf": b"GGUF new"})
    other = hub.add(REPO, {"Name-Q4_K_M.gguf": b"GGUF other"}, revision="refs/pr/1")
    assert resolve(HubRef(REPO)).revision == new != old
    manifest = resolve(parse_hub_ref(f"{REPO}@refs/pr/1:Q4_K_M"))
    assert (manifest.revision, manifest.branch) == (other, "refs/pr/1")
    pinned = resolve(HubRef(REPO, old, "Q8_0"))
    assert (pinned.revision, pinned.branch) == (old, old)
    assert [shard.sha256 for shard in pinned.shards] == [sha256(Q8 + b"1"), sha256(Q8 + b"2")]


def test_what_the_repository_lacks(hub: LocalHub) -> None:
    with pytest.raises(BadReference, match="has no Q5_K_M; it has Q4_K_M, Q8_0"):
        resolve(HubRef(REPO, quant="Q5_K_M"))
    with pytest.raises(BadReference, match=r"has no x\.gguf; it has Name-Q4_K_M\.gguf, Q8_0/Name"):
        resolve(HubRef(REPO, path="x.gguf"))


def test_a_hub_that_lists_no_sizes_is_asked_for_its_tree(
    monkeypatch: pytest.MonkeyPatch, hub: LocalHub
) -> None:
    whole = resolve(HubRef(REPO, quant="Q8_0"))
    info = huggingface_hub.HfApi.model_info

    def without_sizes(self: Any, *words: Any, files_metadata: bool, **more: Any) -> Any:
        return info(self, *words, **more)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", without_sizes)
    assert resolve(HubRef(REPO, quant="Q8_0")) == whole
    assert "/tree/" in hub.requests[-1].path


def test_a_listing_that_cannot_be(hub: LocalHub) -> None:
    hub.add("o/empty", {"m.gguf": b""})
    with pytest.raises(HubRefused, match="o/empty: the hub lists what cannot be"):
        resolve(HubRef("o/empty"))


# -- refusals -------------------------------------------------------------------------------------


def test_there_is_no_such_repository(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    error = trouble("o/none")
    assert isinstance(error, HubRefused)
    assert f"there is no o/none on {hub.endpoint}, or it is private: for that, set HF_TOKEN" in (
        error.message
    )
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    error = trouble("o/none")
    assert error.message == f"there is no o/none on {hub.endpoint} that the token may see"


def test_a_private_repository(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("o/mine", FILES, private=True)
    hub.admit("hf_good", "o/mine")
    assert isinstance(trouble("o/mine"), HubRefused)
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    assert isinstance(trouble("o/mine"), HubRefused)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert resolve(HubRef("o/mine")).repo == "o/mine"


def test_there_is_no_such_revision(hub: LocalHub) -> None:
    error = trouble(f"{REPO}@feature/x")
    assert isinstance(error, HubRefused)
    assert f"{REPO} has no revision `feature/x`; {hub.endpoint}/{REPO} lists" in error.message
    assert "has no revision `0000" in trouble(f"{REPO}@{'0' * 40}").message


def get(hub: LocalHub, path: str, **headers: str) -> Exception:
    """The error of the real client for GET `path`."""
    response = get_session().get(f"{hub.endpoint}/{path}", headers=headers)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        hf_raise_for_status(response)
    return caught.value


def test_a_gated_repository(hub: LocalHub) -> None:
    hub.add("o/gated", FILES, gated=True)
    page = f"accept its licence at {hub.endpoint}/o/gated, "
    path = "o/gated/resolve/main/Name-Q4_K_M.gguf"
    error = translate(get(hub, path), "o/gated")
    assert isinstance(error, HubRefused)
    assert f"o/gated is gated: {page}then set HF_TOKEN" in error.message
    error = translate(get(hub, path, authorization="Bearer hf_abc"), "o/gated")
    assert isinstance(error, HubRefused)
    assert error.message.endswith(f"{page}with the account of the token that is used")


def test_a_file_that_is_not_there(hub: LocalHub) -> None:
    error = translate(get(hub, f"{REPO}/resolve/main/d/none.gguf"), REPO)
    assert isinstance(error, HubRefused)
    assert error.message.startswith(f"{REPO} has no file d/none.gguf (any more)")


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (Status(401, error_message="Invalid credentials in Authorization header"), HubRefused,
         r"refuses owner/Name-GGUF \(401\): a token is needed; set HF_TOKEN .*: Invalid cred"),
        (Status(403, error_message="no " * 500), HubRefused, r"\(403\): a token is needed"),
        (Status(403, error_message="Access to this resource is disabled."), HubRefused,
         "was disabled by the hub"),
        (Status(400), HubRefused, r"refuses owner/Name-GGUF \(400\)"),
        (Status(410), HubRefused, r"refuses owner/Name-GGUF \(410\)"),
        (Status(408), HubUnavailable, "answered 408"),
        (Status(500), HubUnavailable, "answered 500"),
        (Status(503, retry_after_s=7), HubUnavailable, "answered 503"),
        (Status(429), HubUnavailable, "is asked again later; with a token"),
        (Status(429, retry_after_s=90), HubUnavailable, "is asked again in 90 s"),
        (Page(), HubUnavailable, r"not as a hub does \(JSONDecodeError\): is it the login page"),
        (Drop(), HubUnavailable, "cannot be reached, or broke off: "),
    ],
)  # fmt: skip
def test_answers_that_are_none(hub: LocalHub, fault: Any, kind: type, words: str) -> None:
    hub.faults.add("info", fault, stage=Stage.API)
    with pytest.raises(kind, match=words) as caught:
        resolve(HubRef(REPO))
    assert "\n" not in str(caught.value)
    if isinstance(caught.value, HubUnavailable):
        assert caught.value.retry_after_s == getattr(fault, "retry_after_s", None)
    assert resolve(HubRef(REPO)).repo == REPO, "it was for once"


def test_a_token_that_is_refused(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    message = "Invalid credentials in Authorization header"
    hub.faults.add("info", Status(401, error_message=message), stage=Stage.API)
    assert "the token is not accepted" in trouble(REPO).message
    hub.faults.add("info", Status(403, error_message="read"), stage=Stage.API)
    assert "the token has no right to it" in trouble(REPO).message
    hub.faults.add("info", Status(429), stage=Stage.API)
    assert "with a token" not in trouble(REPO).message


def test_nobody_listens(hub: LocalHub) -> None:
    hub.close()
    error = trouble(REPO)
    assert isinstance(error, HubUnavailable)
    assert f"{hub.endpoint} cannot be reached" in error.message
    assert error.retryable


@pytest.mark.parametrize("endpoint", ["htp://127.0.0.1:1", "127.0.0.1", "http://[::1"])
def test_an_endpoint_that_is_no_address(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    error = trouble(REPO)
    assert isinstance(error, HubRefused)
    assert "no request can be made" in error.message


@pytest.mark.parametrize("token", ["hf_sëcret", "hf_sec\nret"])
def test_a_token_that_cannot_be_sent_is_not_repeated(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: token)
    error = trouble(REPO)
    assert isinstance(error, HubRefused)
    assert "HF_TOKEN has characters" in error.message
    assert "hf_s" not in error.message


def test_dates_of_retry_after(hub: LocalHub) -> None:
    def asked(**headers: str) -> float | None:
        error = get(hub, "o/none")
        error.response.status_code = 429  # type: ignore[attr-defined]
        error.response.headers.update(headers)  # type: ignore[attr-defined]
        plain = huggingface_hub.errors.HfHubHTTPError("x", response=error.response)  # type: ignore[attr-defined]
        found = translate(plain, "o/none")
        assert isinstance(found, HubUnavailable)
        return found.retry_after_s

    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    waited = asked(**{"retry-after": soon})
    assert waited is not None
    assert 55 <= waited <= 60
    assert asked(**{"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert asked(**{"retry-after": "soon"}) is None
    assert asked(**{"retry-after": "999999999"}) == 24 * 3600
    assert asked(ratelimit='"api";r=0;t=55') == 55


def test_links_that_expired_are_no_refusal(hub: LocalHub) -> None:
    hub.faults.add("Name-Q4_K_M.gguf", Status(403), stage=Stage.CONTENT)
    error = translate(get(hub, f"{REPO}/resolve/main/Name-Q4_K_M.gguf"), REPO)
    assert isinstance(error, HubUnavailable)
    assert f"where the hub leads for {REPO}, answered 403" in error.message


def test_disks_and_mistakes() -> None:
    full = translate(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert isinstance(full, NoSpace)
    assert "`meshd cache prune" in full.message
    assert isinstance(translate(ConnectionResetError("by peer")), HubUnavailable)
    invalid = huggingface_hub.errors.HFValidationError("Repo id must\nbe")
    assert translate(invalid).message == "Repo id must be"
    for mistake in (ValueError("x"), PermissionError(errno.EACCES, "denied")):
        with pytest.raises(type(mistake)):
            translate(mistake)


# -- the environment ------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from meshd.cache.hub import resolve
from meshd.cache.references import parse_hub_ref
from meshd.errors import MeshdError
try:
    print(json.dumps(resolve(parse_hub_ref(sys.argv[1])).model_dump()))
except MeshdError as error:
    print(json.dumps({"code": error.code, "message": error.message}))
"""


def in_a_child(ref: str, environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, ref],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_variables_of_the_real_client(hub: LocalHub, tmp_path: Path) -> None:
    hub.add("o/mine", FILES, private=True)
    hub.admit("hf_good", "o/mine")
    found = in_a_child("o/mine:Q8_0", hub.environment(tmp_path, token="hf_good"))
    assert found["repo"] == "o/mine"
    hub.forget_requests()
    offline = hub.environment(tmp_path) | {"HF_HUB_OFFLINE": "1"}
    found = in_a_child(REPO, offline)
    assert found["code"] == "hub_unavailable"
    assert found["message"].startswith("HF_HUB_OFFLINE is set")
    assert hub.requests == []


def test_a_hub_that_says_nothing_is_given_up(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshd.cache.hub.ANSWER_LIMIT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{mute.getsockname()[1]}")
        error = trouble(REPO)
        huggingface_hub.close_session()
    assert isinstance(error, HubUnavailable)
    assert "cannot be reached, or broke off" in error.message
