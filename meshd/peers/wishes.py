"""What `--join` and `--mesh` ask for, and whether this node can follow. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from meshd.errors import BadConfig, JoinRefused
from meshd.peers.joining.invites import Invite, decode_invite, is_token
from meshd.peers.trust.membership import Membership


@dataclass(frozen=True, slots=True)
class Wishes:
    """What `--join` asked for, sorted by kind."""

    invites: tuple[Invite, ...]
    addresses: tuple[str, ...]
    names: tuple[str, ...]


def read_wishes(values: tuple[str, ...]) -> Wishes:
    """Sort the values of `--join`. Raises BadInvite for a token that is none.

    Expired ones are read too: a node that once joined with one is started with it for ever.
    """
    tokens = [v for v in values if is_token(v)]
    others = [v for v in values if v not in tokens]
    return Wishes(
        invites=tuple(decode_invite(token, now=0.0) for token in tokens),
        addresses=tuple(v for v in others if ":" in v),
        names=tuple(v for v in others if ":" not in v),
    )


def check_wishes(wishes: Wishes, mine: Membership | None, had_others: bool, named: str) -> None:
    """Whether a node with this membership can do as it is told. `named`: `--mesh`.

    1. An invite to another mesh than this node's is taken only by a node that was alone.
    2. A name or address needs a membership, and that of this mesh.
    3. `--mesh` names the mesh that is founded, or the one this node is in.

    Raises JoinRefused, BadConfig.
    """
    other = next((i for i in wishes.invites if mine and i.mesh_id != mine.mesh_id), None)
    if mine is not None and other is not None and had_others:  # 1
        raise JoinRefused(
            f"this node belongs to mesh `{mine.mesh_name}`; the invite is to "
            f"`{other.mesh_name}`: run `meshd leave` first, or use another --data-dir"
        )
    if mine is None and not wishes.invites and (wishes.names or wishes.addresses):  # 2
        wanted = (*wishes.names, *wishes.addresses)[0]
        raise JoinRefused(
            f"this node belongs to no mesh yet, so `--join {wanted}` cannot let it in: run "
            "`meshd invite` on a member and start this node with the token it prints"
        )
    for name in wishes.names:
        if mine is not None and not wishes.invites and name != mine.mesh_name:
            raise JoinRefused(
                f"this node belongs to mesh `{mine.mesh_name}`, not to `{name}`: join that "
                "one with an invite and a --data-dir of its own, or `meshd leave` this one"
            )
    if mine is not None and named not in ("default", mine.mesh_name) and not wishes.invites:  # 3
        raise BadConfig(
            f"`mesh` is `{named}`, but this data directory belongs to mesh "
            f"`{mine.mesh_name}`; leave --mesh out, or use another --data-dir",
            param="mesh",
        )
