"""`--auto`: one node chooses for an idle mesh. The large models of the packaged catalog are looked
for at a local hub that has none of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.hub import LocalHub
from tests.models import small_model
from tests.node.conftest import DaemonFactory

pytestmark = pytest.mark.engine

REPO = "owner/small-GGUF"
FILE = "small-F16.gguf"
MODEL = "Small"
"""Its name in the catalog is what it is served as, not the name of its file."""
ROOM_FOR_IT_ALONE = "1200MB"
"""For what the catalog below says it takes, and for no other model of the catalog."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    with LocalHub() as hub:
        hub.add(REPO, {FILE: small_model(tmp_path / FILE)})
        yield hub


@pytest.fixture
def data_dir(short_dir: Path) -> Path:
    """With a catalog that knows the local hub's model."""
    data_dir = short_dir / "n0"
    data_dir.mkdir()
    entry = {"name": MODEL, "repo": REPO, "file": FILE, "size_bytes": 50_000_000}
    (data_dir / "catalog.json").write_text(json.dumps([entry]))
    return data_dir


def test_an_idle_node_chooses_fetches_and_serves(
    make_daemon: DaemonFactory, hub: LocalHub, data_dir: Path, tmp_path: Path
) -> None:
    flags = ("--no-mdns", "--auto", "--max-vram", ROOM_FOR_IT_ALONE)
    environment = hub.environment(tmp_path / "home")
    daemon = make_daemon(*flags, data_dir=data_dir, **environment).start()
    wait_until(lambda: daemon.status()["deployments"], what="a choice")
    daemon.wait_state(MODEL, "ready")
    (record,) = daemon.status()["deployments"]
    assert (record["model"], record["cause"]) == (MODEL, "auto")
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    assert daemon.request("POST", "/v1/chat/completions", body)[0] == 200
    assert {request.subject for request in hub.content_requests()} == {FILE}

    # What was chosen stays chosen, with and without the flag.
    assert daemon.stop() == 0
    again = make_daemon("--no-mdns", data_dir=data_dir, **environment).start()
    again.wait_state(MODEL, "ready")
    # What was unloaded is not chosen again by the same run.
    again.unload(MODEL)
    wait_until(lambda: not again.engines(), what="no engine")
    assert again.status()["deployments"] == []


def test_nothing_is_chosen_where_something_is_deployed(
    make_daemon: DaemonFactory, hub: LocalHub, data_dir: Path, tmp_path: Path
) -> None:
    flags = ("--no-mdns", "--auto", "--max-vram", ROOM_FOR_IT_ALONE, "--model", "builtin")
    daemon = make_daemon(*flags, data_dir=data_dir, **hub.environment(tmp_path / "home")).start()
    daemon.wait_state("builtin", "ready")
    assert [r["model"] for r in daemon.status()["deployments"]] == ["builtin"]
    assert hub.content_requests() == []


def test_a_node_without_room_says_that_nothing_fits(
    make_daemon: DaemonFactory, hub: LocalHub, data_dir: Path, tmp_path: Path
) -> None:
    flags = ("--no-mdns", "--auto", "--max-vram", "1MB")
    daemon = make_daemon(*flags, data_dir=data_dir, **hub.environment(tmp_path / "home")).start()
    wait_until(
        lambda: "--auto: no model of the catalog fits on this node" in daemon.stderr(),
        what="words that nothing fits",
    )
    assert daemon.status()["deployments"] == []
    assert hub.content_requests() == []
