"""Who was revoked: entries signed by the mesh's key, a set that only grows.

Everybody verifies with the CA certificate; entries spread by gossip and lists merge by union, so
order and repetition do not matter. An entry is never taken back: a node that is to return gets a
new key, and with it a new id.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import orjson
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import Field

from meshd.errors import BadConfig, NoSpace, NotIssuer, ProtocolError
from meshd.ids import MeshId, NodeId
from meshd.kernel.files import write_atomic
from meshd.peers.trust.authority import Authority
from meshd.peers.trust.certificates import ca_public_key
from meshd.peers.trust.identity import public_key_of
from meshd.peers.trust.wire import Blob, Node, ShortText, UnixSeconds, WireModel, read

log = logging.getLogger(__name__)

MAX_ENTRIES: Final = 4096
"""Full-policy: entries held stay, further ones are refused. Only a holder of the mesh's key can
fill the list, and nothing protects a mesh from that one."""
MAX_MESSAGE_ENTRIES: Final = 512
"""Entries in one message: 110 to 170 KiB, and 60 ms of signature checks if all are new."""
_DOMAIN: Final = b"meshd deny v1\0"


class DenyEntry(WireModel):
    """One node that is not to be talked to any more. `at`: Unix time, for people only."""

    node: Node
    reason: ShortText = ""
    at: UnixSeconds
    signature: Annotated[Blob, Field(min_length=64, max_length=64)]

    def to_wire(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


class _File(WireModel):
    entries: Annotated[tuple[DenyEntry, ...], Field(max_length=MAX_ENTRIES, strict=False)]


class _Message(WireModel):
    entries: Annotated[tuple[DenyEntry, ...], Field(max_length=MAX_MESSAGE_ENTRIES, strict=False)]


class DenyList(Container[str]):
    """The list of one mesh, kept in `path`.

    `in`, `digest`, `entries` and `to_wire` may be used from the loop at any time; `deny` and
    `merge` block (signatures, fsync) and may be called from several threads.
    """

    def __init__(self, path: Path, mesh_id: MeshId, ca_certificate: bytes) -> None:
        self._path = path
        self._mesh_id = mesh_id
        self._key = Ed25519PublicKey.from_public_bytes(ca_public_key(ca_certificate))
        self._entries: Mapping[str, DenyEntry] = {}  # replaced, never edited
        self._lock = threading.Lock()

    def load(self) -> None:
        """Take what the file holds. Blocking. Raises BadConfig: a damaged list must not quietly
        let revoked nodes back in."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise BadConfig(f"{self._path} cannot be read: {error.strerror}") from None
        try:
            entries = read(_File, {"entries": orjson.loads(data)}, "deny list").entries
            if not all(self._is_genuine(entry) for entry in entries):
                raise ProtocolError("an entry is not signed by this mesh")
        except (orjson.JSONDecodeError, ProtocolError) as error:
            raise BadConfig(
                f"the deny list {self._path} is damaged ({error}); restore it from a backup, or "
                "remove it: the other members send it again"
            ) from None
        self._entries = {entry.node: entry for entry in entries}

    def __contains__(self, node: object) -> bool:
        return node in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> tuple[DenyEntry, ...]:
        """All entries, newest first."""
        return tuple(sorted(self._entries.values(), key=lambda e: (-e.at, e.node)))

    def digest(self) -> str:
        """16 hexadecimal digits, equal for equal lists."""
        digest = hashlib.sha256()
        for node in sorted(self._entries):
            digest.update(self._entries[node].signature)
        return digest.hexdigest()[:16]

    def deny(self, authority: Authority | None, node: str, reason: str = "") -> DenyEntry:
        """Revoke a node. Raises NotIssuer without the mesh's key, ValueError for what is no node
        id, NoSpace if the list is full or cannot be written; written or not, it holds at once.
        Of `reason` 120 characters are kept, those that are not ASCII as `?`."""
        if authority is None:
            raise NotIssuer(
                "this node does not hold the mesh's key and cannot revoke; do it on a node that "
                "can invite (`meshd status` there says `issuer`)"
            )
        held = self._entries.get(node)
        if held is not None:
            return held
        at = int(time.time())
        reason = "".join(c if " " <= c <= "~" else "?" for c in reason[:120])
        signature = authority.statement(_canonical(self._mesh_id, node, reason, at))
        entry = DenyEntry(node=node, reason=reason, at=at, signature=signature)
        if not self._add([entry]) and node not in self._entries:
            raise NoSpace(
                f"the deny list is full ({MAX_ENTRIES} entries); found a new mesh and invite to it "
                "the nodes you trust"
            )
        try:
            self._save()
        except OSError as error:
            raise NoSpace(
                f"node {node[:8]} is revoked, but {self._path} could not be written "
                f"({error.strerror}): after a restart this node may not know it any more"
            ) from None
        return entry

    def merge(self, entries: Iterable[DenyEntry]) -> tuple[NodeId, ...]:
        """The nodes that are revoked by it and were not before.

        Raises ProtocolError, taking none of them, if the mesh's key did not sign one: whoever sends
        that does not check what it holds. A failure to write is logged; the entries hold.
        """
        new = [e for e in entries if self._would_change(e)]
        if not all(self._is_genuine(entry) for entry in new):
            raise ProtocolError("an entry of the deny list is not signed by the mesh")
        if not new:
            return ()  # the usual case, at every new link: no reason to write
        added = self._add(new)
        try:
            self._save()
        except OSError as error:
            log.error("the deny list %s cannot be written: %s", self._path, error.strerror)
        return added

    def to_wire(self, *, limit: int = MAX_MESSAGE_ENTRIES) -> list[dict[str, Any]]:
        """The newest entries as JSON."""
        return [entry.to_wire() for entry in self.entries[:limit]]

    # -- its own ----------------------------------------------------------------------------------

    def _add(self, entries: Iterable[DenyEntry]) -> tuple[NodeId, ...]:
        with self._lock:
            table = dict(self._entries)
            added = []
            for entry in entries:
                if entry.node in table:
                    table[entry.node] = min(table[entry.node], entry, key=_order)
                elif len(table) < MAX_ENTRIES:
                    table[entry.node] = entry
                    added.append(NodeId(entry.node))
            self._entries = table
            return tuple(added)

    def _would_change(self, entry: DenyEntry) -> bool:
        held = self._entries.get(entry.node)
        return held is None or _order(entry) < _order(held)

    def _is_genuine(self, entry: DenyEntry) -> bool:
        message = _canonical(self._mesh_id, entry.node, entry.reason, entry.at)
        try:
            self._key.verify(entry.signature, message)
        except InvalidSignature:
            return False
        return True

    def _save(self) -> None:
        with self._lock:
            entries = sorted(self._entries.values(), key=lambda e: e.node)
            write_atomic(self._path, orjson.dumps([e.to_wire() for e in entries]))


def from_wire(entries: object) -> tuple[DenyEntry, ...]:
    """Entries of a message, their form checked, their signatures not. Raises ProtocolError."""
    return read(_Message, {"entries": entries}, "deny list").entries


def _order(entry: DenyEntry) -> tuple[int, str, bytes]:
    """Of two entries for one node the smaller one stays, everywhere."""
    return entry.at, entry.reason, entry.signature


def _canonical(mesh_id: MeshId, node: str, reason: str, at: int) -> bytes:
    """What is signed: fixed-length fields, the one of variable length last."""
    fixed = _DOMAIN + bytes.fromhex(mesh_id) + public_key_of(node) + at.to_bytes(8)
    return fixed + reason.encode()
