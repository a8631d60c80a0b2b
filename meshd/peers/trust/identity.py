"""Who this node is: an Ed25519 key that never leaves the data directory."""

from __future__ import annotations

import base64
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from meshd.errors import BadConfig
from meshd.ids import NodeId
from meshd.kernel.files import write_atomic

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

log = logging.getLogger(__name__)

KEY_FILE = "node.key"
PUBLIC_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Identity:
    node_id: NodeId
    key: Ed25519PrivateKey = field(repr=False)
    key_path: Path
    """Where the key is kept, PEM: the TLS library reads it from there itself."""


def load_or_create(directory: Path) -> Identity:
    """The identity kept in `directory/node.key` (PEM, PKCS #8, mode 0600), made at the first start.

    Blocking. Raises BadConfig if the file is there but is no such key: a node must not quietly
    become another one.
    """
    # Late: the library costs 20 ms that the start of the API should not wait for.
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    path = directory / KEY_FILE
    try:
        pem = path.read_bytes()
    except FileNotFoundError:
        key = Ed25519PrivateKey.generate()
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write_atomic(path, pem)
        return Identity(node_id(key), key, path)
    except OSError as error:
        raise BadConfig(f"the node's key {path} cannot be read: {error.strerror}") from None
    tighten(path)
    try:
        loaded = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        loaded = None
    if not isinstance(loaded, Ed25519PrivateKey):
        raise BadConfig(
            f"{path} is not an Ed25519 key in PEM form; restore it from a backup, or move it away "
            "and start again: this node is then a new one"
        )
    return Identity(node_id(loaded), loaded, path)


def node_id(key: Ed25519PrivateKey) -> NodeId:
    """base32 of the raw public key, lower case, unpadded: 52 characters."""
    from cryptography.hazmat.primitives import serialization

    raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return node_id_of(raw)


def node_id_of(public_key: bytes) -> NodeId:
    """The id of the node with this raw Ed25519 public key."""
    return NodeId(base64.b32encode(public_key).decode().rstrip("=").lower())


def public_key_of(node: str) -> bytes:
    """The raw public key that a node id is. Raises ValueError for what is no id.

    One key has one id: other spellings of the same bytes (upper case, unused bits of the last
    letter) would let a revoked node come back under a name that is not on the list.
    """
    try:
        raw = base64.b32decode(node.upper() + "=" * (-len(node) % 8))
    except ValueError:
        raw = b""
    if len(raw) != PUBLIC_KEY_BYTES or node_id_of(raw) != node:
        raise ValueError("not a node id")
    return raw


def tighten(path: Path) -> None:
    """Close a file with a secret to others, and say so if it was open."""
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        log.warning("%s was open to others (mode %o); it is 0600 now", path, mode)
        path.chmod(0o600)
