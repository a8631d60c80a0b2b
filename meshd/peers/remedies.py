"""What to do about what `diagnosis` found, in words. Pure."""

from __future__ import annotations

from typing import Final

from meshd.kernel.findings import Fault

ASK_MEMBER: Final = "see `meshd peers` and `meshd logs` there"
_NEW_INVITE: Final = (
    "run `meshd invite` on a member, and `meshd run --join TOKEN` on the node it concerns"
)
REMEDIES: Final = {
    "wrong_mesh": "a node is in one mesh: `meshd leave` on one side, then join the other's with an "
    "invite",
    "denied": "it was revoked for good: a new --data-dir and a new invite admit the machine again",
    "expired": f"set the clocks; if they are right, {_NEW_INVITE}",
    "id_mismatch": "its data directory was put together from two; restore one of them whole",
    "no_certificate": _NEW_INVITE,
}
"""By the reason of a PeerRefused."""
NO_MULTICAST: Final = (
    "let UDP port 5353 through (Wi-Fi that isolates clients, a switch, a firewall), or give both "
    "--no-mdns: known addresses are enough"
)


def tls_fault(error: OSError, port: int, waited_s: float) -> Fault:
    """Why a handshake failed, in words."""
    reason = getattr(error, "reason", None) or ""
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG"):
        return Fault(
            "what answers does not speak TLS",
            f"port {port} is another service's, perhaps meshd's API; use the peer port (9338, or "
            "--peer-listen)",
        )
    if "PROTOCOL" in reason:
        return Fault(
            f"it does not speak TLS 1.3 ({reason.lower()})",
            f"port {port} is another service's; use the peer port (9338, or --peer-listen)",
        )
    if isinstance(error, TimeoutError) or "longer than" in str(error):
        return Fault(
            f"no answer to the TLS handshake within {waited_s:.0f} s",
            "something takes the connection and is silent: a proxy, another service, or a meshd "
            "that hangs (`meshd status` there)",
        )
    return Fault(
        f"the TLS handshake broke off ({(reason or error.strerror or 'connection lost').lower()})",
        "a service that is no meshd, a box between that inspects TLS, or a meshd that stops: see "
        "`meshd logs` there",
    )
