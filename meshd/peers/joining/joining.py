"""The joiner's side: with an invite to a certificate of the mesh."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Iterable
from typing import Any, Final

from meshd import __version__
from meshd.config import split_address
from meshd.errors import JoinRefused, MeshdError, PeerRefused, PeerUnreachable, ProtocolError
from meshd.peers.joining.admission import NONCE_BYTES, Admitted, Greeting, Request, proof
from meshd.peers.joining.invites import Invite
from meshd.peers.links.channel import FrameChannel
from meshd.peers.links.frames import JOIN_LIMIT
from meshd.peers.links.hello import parse_refusal
from meshd.peers.protocol import PROTOCOL, common_version, skew_message
from meshd.peers.trust.certificates import (
    authenticate_leaf,
    certificate_der,
    make_csr,
    mesh_of,
    read_leaf,
)
from meshd.peers.trust.identity import Identity
from meshd.peers.trust.membership import Grant
from meshd.peers.trust.tls import joining_context
from meshd.peers.trust.wire import read

log = logging.getLogger(__name__)

AT_ONCE: Final = 4
"""Addresses of one invite that are dialled in parallel."""
PASSING: Final = frozenset(("busy", "failed"))
"""Refusals after which the same request may go well."""
NOT_THERE: Final = frozenset(("not_issuer", "unknown_invite", "wrong_mesh", "version_skew"))
"""What is wrong with one address of the invite and need not be with the others."""


async def join(
    invite: Invite,
    identity: Identity,
    name: str,
    *,
    timeout_s: float,
    also: Iterable[str] = (),
) -> Grant:
    """Ask every address of the invite, and those in `also`, until one admits this node.

    Each has `timeout_s`. Raises JoinRefused if the mesh will not have this node, PeerUnreachable,
    naming addresses and errors, if trying again may help.
    """
    addresses = list(dict.fromkeys((*invite.addresses, *also)))
    if not addresses:
        raise JoinRefused("the invite names no address; make a new one with `meshd invite`")
    limit = asyncio.Semaphore(AT_ONCE)

    async def ask(address: str) -> Grant:
        async with limit:
            return await _ask(address, invite, identity, name, timeout_s)

    tasks = [asyncio.create_task(ask(address), name=f"join {address}") for address in addresses]
    errors: list[MeshdError] = []
    try:
        for finished in asyncio.as_completed(tasks):
            try:
                return await finished
            except MeshdError as error:
                errors.append(error)
                if isinstance(error, JoinRefused) and _reason(error) not in NOT_THERE:
                    raise
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    final = [e for e in errors if isinstance(e, JoinRefused)]
    if len(final) == len(errors):
        raise final[0]
    said = "; ".join(e.message for e in errors)
    raise PeerUnreachable(
        f"no member of mesh `{invite.mesh_name}` could be asked to let this node in ({said}); "
        "is a member running, and may this machine reach its peer port?"
    )


async def _ask(
    address: str, invite: Invite, identity: Identity, name: str, timeout_s: float
) -> Grant:
    try:
        async with asyncio.timeout(timeout_s):
            channel = await _dial(address)
            try:
                return await _converse(channel, address, invite, identity, name)
            finally:
                channel.close()
    except TimeoutError:
        raise PeerUnreachable(f"{address}: no answer within {timeout_s:.0f} s") from None


async def _dial(address: str) -> FrameChannel:
    host, port = split_address(address)
    loop = asyncio.get_running_loop()
    try:
        _, channel = await loop.create_connection(
            lambda: FrameChannel(JOIN_LIMIT),
            host,
            port,
            ssl=joining_context(),
            server_hostname="",
            ssl_shutdown_timeout=1.0,
        )
    except ConnectionRefusedError:
        raise PeerUnreachable(f"{address}: nobody listens there") from None
    except (OSError, ValueError) as error:  # ValueError: a host that is no name at all
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PeerUnreachable(f"{address}: {why}") from None
    return channel


async def _converse(
    channel: FrameChannel, address: str, invite: Invite, identity: Identity, name: str
) -> Grant:
    first = await channel.read()
    if first.get("t") == "refused":
        # It has not shown yet that it is a member: a stranger's word ends nothing for good.
        raise PeerUnreachable(f"{address}: {parse_refusal(first).message}")
    greeting = read(Greeting, first, f"{address}: greeting")
    shown = channel.certificate
    _check_member(greeting, shown, invite, address)
    if common_version(PROTOCOL, greeting.protocol) is None:
        raise JoinRefused(
            skew_message(
                PROTOCOL,
                greeting.protocol,
                our_name=name,
                our_build=__version__,
                their_name=greeting.name,
                their_build=greeting.version,
            ),
            detail={"reason": "version_skew"},
        )
    assert shown is not None
    csr, nonce = make_csr(identity).decode(), secrets.token_bytes(NONCE_BYTES)
    request = Request(
        invite=invite.invite_id,
        node=identity.node_id,
        name=name,
        csr=csr,
        nonce=nonce,
        proof=proof(
            invite.key,
            member_nonce=greeting.nonce,
            joiner_nonce=nonce,
            member_certificate=shown,
            node=identity.node_id,
            csr=csr,
        ),
    )
    channel.send(request.model_dump(mode="json"))
    answer = read(Admitted, _not_refused(await channel.read()), f"{address}: admission")
    certificate = certificate_der(answer.certificate.encode())
    leaf = read_leaf(certificate, greeting.ca)
    if leaf.node_id != identity.node_id or leaf.role is not answer.role:
        raise ProtocolError(f"{address} sent a certificate that is not for this node")
    key = answer.ca_key.encode() if answer.ca_key is not None else None
    return Grant(greeting.ca, certificate, answer.role, key, answer.denied, answer.members)


def _check_member(greeting: Greeting, shown: bytes | None, invite: Invite, address: str) -> None:
    """Whether the other side is a member of the invite's mesh, by the fingerprint in the invite
    and the certificate it proved in TLS. Raises JoinRefused (wrong_mesh)."""
    if hashlib.sha256(greeting.ca).digest() != invite.ca_fingerprint:
        raise JoinRefused(
            f"at {address} answers mesh `{greeting.mesh_name}`, which is not the one this invite "
            f"is for (`{invite.mesh_name}`): another mesh has that address now, or somebody "
            "listens in between; make a new invite",
            detail={"reason": "wrong_mesh"},
        )
    mesh_id, _ = mesh_of(greeting.ca)
    try:
        authenticate_leaf(shown, greeting.ca, (), time.time())
    except PeerRefused as error:
        raise JoinRefused(
            f"{address} is not a member of its mesh: {error.message}",
            detail={"reason": "wrong_mesh"},
        ) from None
    if mesh_id != invite.mesh_id:
        raise JoinRefused(
            f"{address} belongs to another mesh than the invite names",
            detail={"reason": "wrong_mesh"},
        )


def _not_refused(message: dict[str, Any]) -> dict[str, Any]:
    """Raises JoinRefused, or PeerUnreachable for what passes, with the member's words."""
    if message.get("t") != "refused":
        return message
    refused = parse_refusal(message)
    if refused.reason in PASSING:
        raise PeerUnreachable(refused.message)
    raise JoinRefused(refused.message, detail={"reason": refused.reason})


def _reason(error: JoinRefused) -> str:
    return str((error.detail or {}).get("reason", ""))
