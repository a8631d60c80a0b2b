"""A node stays who it is, and never quietly becomes another."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from meshd.errors import BadConfig
from meshd.peers.trust.identity import KEY_FILE, load_or_create


def test_made_once_and_kept(tmp_path: Path) -> None:
    first = load_or_create(tmp_path)
    assert re.fullmatch(r"[a-z2-7]{52}", first.node_id)
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert load_or_create(tmp_path).node_id == first.node_id
    assert "PrivateKey" not in repr(first)


def test_two_nodes_differ(tmp_path: Path) -> None:
    ids = set()
    for name in "ab":
        (tmp_path / name).mkdir()
        ids.add(load_or_create(tmp_path / name).node_id)
    assert len(ids) == 2


def test_open_permissions_are_closed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_or_create(tmp_path)
    (tmp_path / KEY_FILE).chmod(0o644)
    with caplog.at_level(logging.WARNING):
        load_or_create(tmp_path)
    assert "was open to others (mode 644)" in caplog.text
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"not a key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n"])
def test_a_broken_key_is_not_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / KEY_FILE).write_bytes(content)
    with pytest.raises(BadConfig, match=r"node\.key is not an Ed25519 key"):
        load_or_create(tmp_path)
    assert (tmp_path / KEY_FILE).read_bytes() == content


def test_another_kind_of_key_is_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (tmp_path / KEY_FILE).write_bytes(pem)
    with pytest.raises(BadConfig, match="is not an Ed25519 key"):
        load_or_create(tmp_path)
