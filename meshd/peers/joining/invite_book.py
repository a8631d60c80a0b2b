"""The invites this node issued and how often each was used: `invites.json`, 0600.

Of an invite's secret only a key derived from it is kept. A use is on the disk before the
certificate it pays for is handed out, so a crash may waste a use and never gives one away. Calls
block (fsync) and may come from several threads.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import orjson
from pydantic import BaseModel, ConfigDict, Field

from meshd.errors import BadConfig, JoinRefused, NoSpace, NotIssuer, ProtocolError
from meshd.ids import NodeId
from meshd.kernel.files import write_atomic
from meshd.peers.joining.invites import INVITE_ID_BYTES, SECRET_BYTES, Invite
from meshd.peers.trust.identity import tighten
from meshd.peers.trust.membership import Membership
from meshd.peers.trust.wire import Blob, Node, UnixSeconds, date, read
from meshd.view import Role

MAX_OPEN: Final = 256
"""Invites that can still be used. Full-policy: no more are issued until some ran out."""
MAX_USES: Final = 1000
KEPT_AFTER_S: Final = 7 * 86_400
"""An invite that ran out is remembered this long, so that who comes late is told so."""


@dataclass(frozen=True, slots=True)
class Redemption:
    """What a proof of the secret is worth."""

    role: Role
    issuer: bool


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    invite_id: Annotated[Blob, Field(min_length=INVITE_ID_BYTES, max_length=INVITE_ID_BYTES)]
    key: Annotated[Blob, Field(min_length=32, max_length=32, repr=False)]
    expires_at: UnixSeconds
    uses: Annotated[int, Field(ge=1, le=MAX_USES)]
    role: Role
    issuer: bool
    used_by: Annotated[tuple[Node, ...], Field(max_length=MAX_USES)] = ()


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    invites: tuple[_Entry, ...] = ()


class InviteBook:
    """Of one membership, kept in `path`. `wall`: Unix time."""

    def __init__(self, path: Path, wall: Callable[[], float] = time.time) -> None:
        self._path = path
        self._wall = wall
        self._lock = threading.Lock()
        self._entries: dict[bytes, _Entry] = {}

    def load(self) -> None:
        """Take what the file holds. Raises BadConfig if it is damaged."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise BadConfig(f"{self._path} cannot be read: {error.strerror}") from None
        tighten(self._path)
        try:
            entries = read(_File, orjson.loads(data), "invites").invites
        except (orjson.JSONDecodeError, ProtocolError):
            raise BadConfig(
                f"{self._path} is damaged; remove it: invites that are still open stop working, "
                "members are not touched"
            ) from None
        self._entries = {entry.invite_id: entry for entry in entries}

    def issue(
        self,
        membership: Membership,
        *,
        ttl_s: float,
        uses: int,
        role: Role,
        issuer: bool,
        addresses: tuple[str, ...],
    ) -> Invite:
        """A new invite, on the disk when this returns. `addresses`: where members listen
        (HOST:PORT), this node's first; at most 8 are used.

        Raises NotIssuer without the mesh's key, NoSpace if too many invites are open or the disk
        is full.
        """
        if membership.authority is None:
            raise NotIssuer(
                "this node does not hold the mesh's key and cannot invite; run `meshd invite` on "
                "the node that founded the mesh, or on one that was invited with --issuer"
            )
        now = self._wall()
        invite = Invite(
            mesh_id=membership.mesh_id,
            mesh_name=membership.mesh_name,
            ca_fingerprint=membership.ca_fingerprint,
            invite_id=secrets.token_bytes(INVITE_ID_BYTES),
            secret=secrets.token_bytes(SECRET_BYTES),
            expires_at=int(now + ttl_s),
            role=role,
            issuer=issuer,
            addresses=addresses[:8],
        )
        entry = _Entry(
            invite_id=invite.invite_id,
            key=invite.key,
            expires_at=invite.expires_at,
            uses=uses,
            role=role,
            issuer=issuer,
        )
        with self._lock:
            self._replace({**self._room(now), entry.invite_id: entry})
        return invite

    def key(self, invite_id: bytes) -> bytes:
        """What the secret of an invite is proved against. Raises JoinRefused (unknown_invite)."""
        return _known(self._entries.get(invite_id)).key

    def redeem(self, invite_id: bytes, node: NodeId) -> Redemption:
        """Count one use by `node`, whose proof of the secret was good. A node that comes again,
        because an answer was lost, is given the same and costs no second use.

        Raises JoinRefused with detail `reason`: unknown_invite, expired or used_up; NoSpace if the
        use cannot be written down.
        """
        with self._lock:
            entry = _known(self._entries.get(invite_id))
            if entry.expires_at <= self._wall():
                raise refusal(
                    "expired",
                    f"the invite expired on {date(entry.expires_at)}; make a new one with `meshd "
                    "invite`",
                )
            if node not in entry.used_by:
                if len(entry.used_by) >= entry.uses:
                    times = "once" if entry.uses == 1 else f"{entry.uses} times"
                    raise refusal(
                        "used_up",
                        f"the invite was good for joining {times} and is used up; make a new one "
                        "with `meshd invite` (--uses N for several nodes)",
                    )
                used = entry.model_copy(update={"used_by": (*entry.used_by, node)})
                self._replace({**self._entries, invite_id: used})
            return Redemption(entry.role, entry.issuer)

    def _room(self, now: float) -> dict[bytes, _Entry]:
        """The entries to keep when one more comes. Raises NoSpace if too many are open."""
        kept = {k: e for k, e in self._entries.items() if e.expires_at + KEPT_AFTER_S > now}
        closed = sorted((e for e in kept.values() if not _is_open(e, now)), key=_end)
        if len(kept) - len(closed) >= MAX_OPEN:
            raise NoSpace(
                f"{MAX_OPEN} invites are open already; use them, or wait until some expire"
            )
        for entry in closed[: max(0, len(closed) - MAX_OPEN)]:
            del kept[entry.invite_id]
        return kept

    def _replace(self, entries: dict[bytes, _Entry]) -> None:
        """Write, then believe. Called with the lock held."""
        data = _File(invites=tuple(entries.values())).model_dump(mode="json")
        try:
            write_atomic(self._path, orjson.dumps(data))
        except OSError as error:
            raise NoSpace(f"{self._path} cannot be written: {error.strerror}") from None
        self._entries = entries


def refusal(reason: str, message: str) -> JoinRefused:
    """Why a node is not let in; `reason` is its name on the wire."""
    return JoinRefused(message, detail={"reason": reason})


def _known(entry: _Entry | None) -> _Entry:
    if entry is None:
        raise refusal(
            "unknown_invite",
            "this node does not know the invite; it was issued by another node, before that one "
            "left the mesh, or long ago: make a new one with `meshd invite`",
        )
    return entry


def _is_open(entry: _Entry, now: float) -> bool:
    return entry.expires_at > now and len(entry.used_by) < entry.uses


def _end(entry: _Entry) -> int:
    return entry.expires_at
