"""Names that must not be mixed up, as types of their own."""

from typing import NewType

NodeId = NewType("NodeId", str)
"""base32 (lower case, unpadded) of a node's Ed25519 public key: 52 characters."""

MeshId = NewType("MeshId", str)
"""32 hexadecimal digits, drawn when a mesh is founded."""

BootId = NewType("BootId", str)
"""One run of one node: 16 hexadecimal digits, drawn at each start. Two live processes with one
NodeId and different BootIds are a copied data directory."""

ModelId = NewType("ModelId", str)
"""What a client puts into `model`: `builtin`, a catalog name, or the stem of a local file."""

InstanceId = NewType("InstanceId", str)
"""One launch of one engine. The child is started with it as `--alias` and asked for it before it
is trusted, so that a stranger on the same socket path cannot pass for it."""

RequestId = NewType("RequestId", str)
"""The client's `x-request-id`, or one made here."""

RuntimeId = NewType("RuntimeId", str)
"""Directory name of an engine build below `<cache>/meshd/runtimes/`."""

LoanId = NewType("LoanId", str)
"""Memory lent to one host for one split model: `loan-` and 32 hexadecimal digits, drawn by the
worker."""
