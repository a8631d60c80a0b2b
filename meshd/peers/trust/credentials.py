"""A node's place in a mesh, kept on disk: certificates, the mesh's key, who else there was.

Layout of `<data-dir>/mesh` (0700): `ca.crt` `node.crt` (PEM), `ca.key` on issuers, `deny.json`,
`invites.json`, `peers.json`. The directory appears by a rename and disappears by one, so a crash
leaves a membership whole or none. `<data-dir>/starts`, like the key, belongs to the node and
outlives its memberships. Everything in `MeshStore` blocks: call it through a pool.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final

import orjson
from pydantic import Field, ValidationError

from meshd.errors import BadConfig, MeshdError, NoSpace, PeerRefused, ProtocolError
from meshd.ids import MeshId, NodeId
from meshd.kernel.files import write_atomic
from meshd.peers.trust import authority as authorities
from meshd.peers.trust.certificates import (
    PeerCertificate,
    authenticate_leaf,
    ca_fingerprint,
    certificate_der,
    certificate_pem,
    make_csr,
    mesh_of,
    read_leaf,
)
from meshd.peers.trust.denylist import DenyList
from meshd.peers.trust.identity import Identity, tighten
from meshd.peers.trust.membership import Grant, Membership, authenticate, needs_renewal
from meshd.peers.trust.wire import KnownPeer, WireModel, read
from meshd.view import Role

__all__ = [
    "Grant",
    "KnownPeer",
    "Membership",
    "MeshStore",
    "PeerCertificate",
    "authenticate",
    "needs_renewal",
]

log = logging.getLogger(__name__)

MAX_REMEMBERED: Final = 256
"""Peers remembered for the next start. Full-policy: the first ones given are kept."""
_CA_CERTIFICATE, _CA_KEY, _CERTIFICATE = "ca.crt", "ca.key", "node.crt"
_DENIED, _INVITES, _PEERS, _STARTS = "deny.json", "invites.json", "peers.json", "starts"
_REJOIN = "or move the directory away and join again with an invite (`meshd run --join TOKEN`)"


class _Peers(WireModel):
    had_others: bool = False
    peers: Annotated[tuple[KnownPeer, ...], Field(strict=False)] = ()


class MeshStore:
    """The membership of one node in one directory. One daemon uses it at a time (its data directory
    is locked); the reading part may be used by others beside it."""

    def __init__(self, mesh_dir: Path, identity: Identity) -> None:
        self.directory = mesh_dir
        self._identity = identity
        self._building = mesh_dir.with_name(f".{mesh_dir.name}.new")
        self._aside = mesh_dir.with_name(f".{mesh_dir.name}.old")
        self._gone = mesh_dir.with_name(f".{mesh_dir.name}.gone")

    # -- membership -------------------------------------------------------------------------------

    def load(self, now: float | None = None) -> Membership | None:
        """The membership on disk, or None. An issuer whose certificate ran out signs itself a new
        one. `now`: Unix time; by default the clock's.

        Raises BadConfig, in words that say what to do, if what is there is unreadable, damaged,
        of another node or run out.
        """
        now = time.time() if now is None else now
        self._restore()
        if not self.directory.exists():
            return None
        try:
            membership = self._read()
            if membership.authority is not None and membership.not_after < now:
                return self.renew_own(membership, now)
            authenticate_leaf(membership.certificate, membership.ca_certificate, (), now)
        except OSError as error:
            raise BadConfig(f"{error.filename} cannot be read: {error.strerror}") from None
        except PeerRefused as error:
            raise BadConfig(self._explain(error)) from None
        except ProtocolError as error:
            raise BadConfig(
                f"the membership in {self.directory} is damaged ({error.message}); restore it from "
                f"a backup, {_REJOIN}"
            ) from None
        return membership

    def found(self, name: str, role: Role = Role.MEMBER) -> Membership:
        """A new mesh with this node as its first member and issuer."""
        now = time.time()
        mesh_id = MeshId(secrets.token_hex(16))
        authority = authorities.found(mesh_id, name, now)
        pem = authority.sign(make_csr(self._identity), role, now)
        grant = Grant(authority.ca_certificate, certificate_der(pem), role, authority.key_pem())
        return self.install(grant)

    def install(self, grant: Grant) -> Membership:
        """Become a member by `grant`; takes the place of any earlier membership.

        Raises BadConfig if the grant is not for this node or does not hold together, NoSpace if it
        cannot be written; the earlier membership is then untouched and nothing of the new one left.
        """
        self._sweep()
        try:
            self._building.mkdir(mode=0o700)
            self._write(self._building, grant)
            MeshStore(self._building, self._identity).load()
            if self.directory.exists():
                self.directory.replace(self._aside)
            self._building.replace(self.directory)
        except BaseException as error:
            self._sweep()
            if isinstance(error, ProtocolError):
                raise BadConfig(
                    f"what the mesh sent does not hold together: {error.message}"
                ) from None
            if isinstance(error, OSError):
                raise _unwritten(self.directory, error) from None
            raise
        _sync(self.directory.parent)
        self._sweep()
        return self._read()

    def remove(self) -> None:
        """Leave: no trace of the membership stays. The key of the node does."""
        self._sweep()
        with contextlib.suppress(FileNotFoundError):
            self.directory.replace(self._gone)
        _sync(self.directory.parent)
        self._sweep()

    def replace_certificate(self, pem: bytes) -> Membership:
        """Use a renewed certificate (PEM). Raises ProtocolError, PeerRefused if it is not one for
        this node in this mesh with the same role, or no later one, NoSpace if it cannot be
        written; the old one then stays."""
        current = self._read()
        renewed = certificate_der(pem)
        leaf = read_leaf(renewed, current.ca_certificate)
        if leaf.node_id != self._identity.node_id or leaf.role is not current.role:
            raise ProtocolError("the renewed certificate is not for this node")
        if leaf.not_after <= current.not_after:
            raise ProtocolError("the renewed certificate lasts no longer than the present one")
        authenticate_leaf(renewed, current.ca_certificate, (), time.time())
        _write(current.certificate_path, certificate_pem(renewed))
        return replace(current, certificate=renewed, not_after=leaf.not_after)

    def renew_own(self, membership: Membership, now: float | None = None) -> Membership:
        """A new certificate from this node's own copy of the mesh's key; for issuers only. Raises
        NoSpace if it cannot be written."""
        if membership.authority is None:
            raise ValueError("only an issuer can renew its own certificate")
        now = time.time() if now is None else now
        pem = membership.authority.sign(make_csr(self._identity), membership.role, now)
        _write(membership.certificate_path, pem)
        return self._read()

    def deny_list(self, membership: Membership) -> DenyList:
        """The deny list of the membership, loaded. Raises BadConfig if it is damaged."""
        denied = DenyList(self.directory / _DENIED, membership.mesh_id, membership.ca_certificate)
        denied.load()
        return denied

    @property
    def invites_path(self) -> Path:
        return self.directory / _INVITES

    # -- small state ------------------------------------------------------------------------------

    def next_start(self) -> int:
        """How often this node has been started, this time included; durable when it returns.

        Never counts back, whatever mesh the node is in: its incarnation begins with it. Called once
        by the daemon that holds the data directory, it also clears away what a crash left. Raises
        BadConfig if the count is damaged, NoSpace if it cannot be written.
        """
        self._sweep()
        path = self.directory.with_name(_STARTS)
        try:
            starts = int(path.read_text())
        except FileNotFoundError:
            starts = 0
        except ValueError:
            raise BadConfig(
                f"{path} is damaged; write a number into it that is larger than this node's starts "
                "so far, 1000000 for instance"
            ) from None
        _write(path, f"{starts + 1}\n".encode())
        return starts + 1

    def remember(self, peers: Iterable[tuple[NodeId, str, Iterable[str]]]) -> None:
        """Keep (id, name, addresses) of other members, most useful first, for the next start."""
        kept = []
        for node, name, addresses in peers:
            with contextlib.suppress(ValidationError):  # an address of a kind we cannot dial
                kept.append(KnownPeer(node_id=node, name=name, addresses=tuple(addresses)[:8]))
            if len(kept) == MAX_REMEMBERED:
                break
        had_others = bool(kept) or self.had_others
        write_atomic(self.directory / _PEERS, _peers_json(had_others, kept))

    def remembered(self) -> tuple[KnownPeer, ...]:
        """What was kept last; empty if that cannot be read, since it is only a help."""
        return self._peers().peers[:MAX_REMEMBERED]

    @property
    def had_others(self) -> bool:
        """Whether this mesh ever had another member, as far as this node knows."""
        return self._peers().had_others

    # -- its own ----------------------------------------------------------------------------------

    def _read(self) -> Membership:
        """What is on disk, everything checked but the dates."""
        ca_pem = self._file(_CA_CERTIFICATE)
        certificate_path = self.directory / _CERTIFICATE
        ca_certificate = certificate_der(ca_pem)
        certificate = certificate_der(self._file(_CERTIFICATE))
        mesh_id, mesh_name = mesh_of(ca_certificate)
        leaf = read_leaf(certificate, ca_certificate)
        if leaf.node_id != self._identity.node_id:
            raise PeerRefused("it is the certificate of another node", reason="id_mismatch")
        authority = None
        key_path = self.directory / _CA_KEY
        if key_path.exists():
            tighten(key_path)
            authority = authorities.restore(ca_certificate, self._file(_CA_KEY))
        return Membership(
            mesh_id=mesh_id,
            mesh_name=mesh_name,
            role=leaf.role,
            ca_certificate=ca_certificate,
            ca_fingerprint=ca_fingerprint(ca_certificate),
            certificate=certificate,
            certificate_path=certificate_path,
            not_after=leaf.not_after,
            authority=authority,
        )

    def _file(self, name: str) -> bytes:
        path = self.directory / name
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise ProtocolError(f"{name} is missing") from None

    def _write(self, directory: Path, grant: Grant) -> None:
        write_atomic(directory / _CA_CERTIFICATE, certificate_pem(grant.ca_certificate))
        write_atomic(directory / _CERTIFICATE, certificate_pem(grant.certificate))
        if grant.ca_key is not None:
            write_atomic(directory / _CA_KEY, grant.ca_key)
        mesh_id, _ = mesh_of(grant.ca_certificate)
        DenyList(directory / _DENIED, mesh_id, grant.ca_certificate).merge(grant.denied)
        if grant.peers:
            peers = list(grant.peers[:MAX_REMEMBERED])
            write_atomic(directory / _PEERS, _peers_json(True, peers))

    def _restore(self) -> None:
        """Undo what a crash left between the two renames of `install`."""
        if self._aside.exists() and not self.directory.exists():
            self._aside.replace(self.directory)

    def _sweep(self) -> None:
        """Remove what an interrupted `install` or `remove` left."""
        self._restore()
        for path in (self._building, self._aside, self._gone):
            shutil.rmtree(path, ignore_errors=True)

    def _explain(self, error: PeerRefused) -> str:
        path = self.directory / _CERTIFICATE
        if error.reason == "expired":
            return f"{path}: {error.message}"
        if error.reason == "id_mismatch":
            return (
                f"{path} belongs to another node than {self._identity.key_path}: the data "
                f"directory was put together from two; restore one of them whole, {_REJOIN}"
            )
        return f"{path}: {error.message}; restore it from a backup, {_REJOIN}"

    def _peers(self) -> _Peers:
        path = self.directory / _PEERS
        try:
            return read(_Peers, orjson.loads(path.read_bytes()), "remembered peers")
        except FileNotFoundError:
            return _Peers()
        except (OSError, orjson.JSONDecodeError, MeshdError) as error:
            log.warning("%s cannot be used and is ignored: %s", path, error)
            return _Peers()


def _peers_json(had_others: bool, peers: list[KnownPeer]) -> bytes:
    return orjson.dumps(_Peers(had_others=had_others, peers=tuple(peers)).model_dump(mode="json"))


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomic(path, data)
    except OSError as error:
        raise _unwritten(path, error) from None


def _unwritten(path: Path, error: OSError) -> NoSpace:
    return NoSpace(f"{path} cannot be written: {error.strerror}; make room, or mend its directory")


def _sync(directory: Path) -> None:
    """Make renames in `directory` durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
