"""What the daemon and its carrier process tell each other. Pure.

Two sockets. On one the daemon sends connections, each with `NUMBER_BYTES` that number it. On the
other go frames (`frames.py`):

    daemon   credentials  ca_der, certificate_path, key_path; first of all, and after a renewal
             grant        id, service, grant: serve it so
             refused      id, reason, message: say that, and close
             cut          id: end it now
    carrier  asked        id, certificate (DER, base64), open: may they?
             ended        id, bytes_in, bytes_out: the connection is closed

A connection has one `ended`, and before it at most one `asked`. The end of either socket is the end
of the process, and with it of its connections.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from meshd.errors import ProtocolError

NUMBER_BYTES: Final = 8
REQUEST_LIMIT: Final = 4 * 1024
"""Bytes of a frame from the node that opened the stream."""
ANSWER_LIMIT: Final = 4 * 1024 * 1024
"""Of a frame to it: manifests of a thousand files with long names."""
FIRST_WORDS_S: Final = 10.0
"""From the connection's arrival in the carrier to its `open` frame."""
ANSWER_S: Final = 10.0
"""How long the carrier waits for the daemon."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a process needs to speak for this node: paths, never keys."""

    ca_der: str
    """Base64."""
    certificate_path: str
    key_path: str
    mesh_id: str

    def to_wire(self) -> dict[str, Any]:
        return {
            "ca_der": self.ca_der,
            "certificate_path": self.certificate_path,
            "key_path": self.key_path,
            "mesh_id": self.mesh_id,
        }


def credentials_from_wire(message: Mapping[str, Any]) -> Credentials:
    return Credentials(
        message["ca_der"], message["certificate_path"], message["key_path"], message["mesh_id"]
    )


def der_to_wire(certificate: bytes) -> str:
    return base64.b64encode(certificate).decode("ascii")


def der_from_wire(text: str) -> bytes:
    """Raises ProtocolError."""
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise ProtocolError(f"a certificate is not base64: {error}") from None
