"""The first frame each side sends on a control link, and what makes either side hang up. Pure.

The dialler sends its hello first, the listener answers with its own, and each judges the other's;
whoever objects sends a `refused` frame with its reason and words, and closes. The words name both
nodes and say which side to change, so that they are right in either log.

A hello of purpose `doctor` is somebody looking, not a link: the receiver answers with its own
hello, then pings with pongs, and never counts the connection as the node's link.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from meshd.errors import PeerRefused, ProtocolError
from meshd.ids import BootId, MeshId, NodeId
from meshd.peers.protocol import PROTOCOL_MAX, PROTOCOL_MIN, common_version, skew_message
from meshd.view import Role

Purpose = Literal["link", "doctor"]

_Word = Annotated[str, StringConstraints(pattern=r"^[\x20-\x7e]{1,128}$")]
_Protocol = Annotated[int, Field(ge=0, le=65_535)]
_MAX_WORDS = 500


class Hello(BaseModel):
    """What a node says of itself before anything else. Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    t: Literal["hello"] = "hello"
    purpose: Purpose = "link"
    protocol: tuple[_Protocol, _Protocol]
    """Lowest and highest version of the protocol it speaks."""
    version: _Word
    """Of meshd, for people."""
    node: Annotated[NodeId, StringConstraints(pattern=r"^[a-z2-7]{52}$")]
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    mesh: Annotated[MeshId, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    boot: Annotated[BootId, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
    role: Role
    engine: _Word | None = None
    """Build of its engine; None while it has proved none."""
    rpc: _Word | None = None
    """Version of the engine's RPC protocol."""
    statement: dict[str, Any] | None = None
    """The node's own signed statement; checked by whoever reads statements, not here."""
    time: Annotated[float, Field(ge=0, lt=1e11, allow_inf_nan=False)]
    """Its Unix time, for diagnosis only: nothing is decided from it."""

    def to_wire(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def make_hello(
    *,
    node: NodeId,
    name: str,
    mesh: MeshId,
    boot: BootId,
    role: Role,
    version: str,
    time: float,
    purpose: Purpose = "link",
    engine: str | None = None,
    rpc: str | None = None,
    statement: dict[str, Any] | None = None,
) -> Hello:
    """Ours. `time`: Unix time of sending; `engine` and `rpc` are cut to what a hello may hold."""
    return Hello(
        purpose=purpose,
        protocol=(PROTOCOL_MIN, PROTOCOL_MAX),
        version=version,
        node=node,
        name=name,
        mesh=mesh,
        boot=boot,
        role=role,
        engine=_fitting(engine),
        rpc=_fitting(rpc),
        statement=statement,
        time=time,
    )


def parse_hello(message: Mapping[str, Any]) -> Hello:
    """The other side's. Raises PeerRefused if it is a refusal instead, ProtocolError if neither."""
    if message.get("t") == "refused":
        raise parse_refusal(message)
    try:
        return Hello.model_validate(message)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"][:2])) or "message"
        raise ProtocolError(
            f"the other side's hello is malformed: {where}: {problem['msg']}"
        ) from None


def judge(ours: Hello, theirs: Hello) -> PeerRefused | None:
    """Why these two may not talk, or None. Symmetric but for the order of the names.

    1. Another mesh: nothing else of it is of interest.
    2. No protocol version in common.
    3. One id in two places: ourselves under another address (`self`, harmless), or another process
       with a copy of our data directory (`copied_identity`). A doctor borrows the id of a node it
       runs beside and is exempt.
    """
    if ours.mesh != theirs.mesh:  # 1
        return PeerRefused(
            f"{theirs.name} is in mesh {theirs.mesh[:8]}, {ours.name} in mesh {ours.mesh[:8]}; a "
            "node is in one mesh: `meshd leave` there, and join this one with an invite",
            reason="wrong_mesh",
        )
    if common_version(ours.protocol, theirs.protocol) is None:  # 2
        return PeerRefused(
            skew_message(
                ours.protocol,
                theirs.protocol,
                our_name=ours.name,
                our_build=ours.version,
                their_name=theirs.name,
                their_build=theirs.version,
            ),
            reason="version_skew",
        )
    if ours.node == theirs.node and "doctor" not in (ours.purpose, theirs.purpose):  # 3
        if ours.boot == theirs.boot:
            return PeerRefused(f"{ours.name} reached itself", reason="self")
        return PeerRefused(
            f"two running nodes ({ours.name} and {theirs.name}) have the id {ours.node[:8]}: one "
            "data directory is a copy of the other; stop one, remove node.key and mesh/ from its "
            "data directory, and join it with an invite of its own",
            reason="copied_identity",
        )
    return None


def refusal(error: PeerRefused) -> dict[str, Any]:
    """The frame that says it to the other side."""
    return {"t": "refused", "reason": error.reason, "message": error.message[:_MAX_WORDS]}


def parse_refusal(message: Mapping[str, Any]) -> PeerRefused:
    """The other side's refusal as an error; never raises. Its words are kept to one clean line."""
    reason = clean_line(message.get("reason"), 64) or "unspecified"
    words = clean_line(message.get("message"), _MAX_WORDS) or f"the other side refused: {reason}"
    return PeerRefused(words, reason=reason)


def clean_line(value: object, limit: int) -> str:
    """What a peer wrote, fit for a log or a terminal: printable, one line, `limit` characters."""
    text = value[:limit] if isinstance(value, str) else ""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def _fitting(text: str | None) -> str | None:
    if text is None:
        return None
    return "".join(c if " " <= c <= "~" else "?" for c in text)[:128] or None
