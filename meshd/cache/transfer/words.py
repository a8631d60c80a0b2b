"""What a fetch is told and what it says: one JSON line of order on its standard input, then JSON
lines of news on its standard output. And what two nodes say over a stream of shards. Pure.

Streams (`docs/protocol.md`). Opened with `{"t":"open","service":"shard","sha256":…}`, answered by
`Offer` or a refusal; then any of these, answered in order, at most two waiting at once:

    {"t":"hashes"}                      -> {"t":"hashes","length":n}  and n bytes: 32 a chunk
    {"t":"have"}                        -> {"t":"have","length":n}    and n bytes: one bit a chunk,
                                           lowest first: what may be read
    {"t":"read","offset":o,"length":l}  -> {"t":"data","length":l}    and l bytes
                                        or {"t":"refused",…}: not there (any more)

Opened with `{"t":"open","service":"manifest","ref":…}`, it is answered by
`{"t":"open","manifests":[…]}` and ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from meshd.cache.manifest import Manifest
from meshd.view.shape import MAX_JSON_BYTES

MAX_READ_BYTES: Final = 64 * 1024 * 1024


class _Word(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# -- an order -------------------------------------------------------------------------------------


class PeerSource(_Word):
    """A node that may hold what is wanted."""

    node_id: str
    name: str
    addresses: tuple[str, ...]
    """HOST:PORT, best first."""


class Credentials(_Word):
    """What a child needs to speak for this node: paths, never keys."""

    ca_der: str
    """Base64."""
    certificate_path: str
    key_path: str
    mesh_id: str


class FetchOrder(_Word):
    """What to fetch: `manifest`, or else what `ref` turns out to be."""

    ref: str
    """As people wrote it; for the hub and for peers."""
    manifest: Manifest | None = None
    expected_digest: str | None = None
    """What `ref` has to be, if that is known; a manifest of another one is no answer."""
    only: tuple[str, ...] = ()
    """sha256 of the shards that are wanted, if not all are. The set is not whole afterwards: no
    branch is named."""
    hub_dir: str
    state_dir: str
    builtin_dir: str
    damaged: tuple[str, ...] = ()
    """sha256 of blobs that are there and wrong: they are set aside and mended."""
    resolve_only: bool = False
    headers_only: bool = False
    """Say what shape the model has, and bring nothing to the disk."""
    offline: bool = False
    """Ask peers only."""
    peers: tuple[PeerSource, ...] = ()
    credentials: Credentials | None = None
    workers: Annotated[int, Field(ge=1, le=64)] = 4
    """Transfers at once."""
    reserve_bytes: Annotated[int, Field(ge=0)] = 0
    """Free space that must remain on the disk."""
    stall_s: Annotated[float, Field(gt=0)] = 60.0
    """A source that sends nothing for this long is left."""


# -- news -----------------------------------------------------------------------------------------


class Resolved(_Word):
    """Now it is known what `ref` is; the manifest is on disk."""

    t: Literal["resolved"] = "resolved"
    manifest: Manifest


class Shape(_Word):
    """What was asked for with `headers_only`."""

    t: Literal["shape"] = "shape"
    shape: Annotated[str, Field(max_length=MAX_JSON_BYTES)]
    """JSON of a `view.shape.ModelShape`."""


class Progress(_Word):
    """At most a few a second."""

    t: Literal["progress"] = "progress"
    stage: Literal["fetching", "verifying", "waiting"]
    reason: str
    """Words for people: what is done, or what is waited for."""
    done_bytes: int
    total_bytes: int
    bytes_per_s: float
    eta_s: float | None = None
    sources: dict[str, int] = {}
    """Bytes got so far, by `hub` or name of node."""


class Said(_Word):
    """Something for the log, once: a source banned, a file set aside, a retry."""

    t: Literal["said"] = "said"
    message: str


class Done(_Word):
    """Everything of the manifest is on disk, verified, linked; or everything asked for is said."""

    t: Literal["done"] = "done"
    fetched_bytes: int
    """Over the network, this time."""
    sources: dict[str, int] = {}


class FetchFailed(_Word):
    """The end, without success. What was got stays for the next time."""

    t: Literal["failed"] = "failed"
    code: str
    """Of the error tree in errors.py: `hub_refused`, `hub_unavailable`, `no_space`, …"""
    message: str
    permanent: bool
    """Trying again would not help before somebody does something."""
    retry_after_s: float | None = None


News: TypeAlias = Annotated[
    Resolved | Shape | Progress | Said | Done | FetchFailed, Field(discriminator="t")
]


# -- streams --------------------------------------------------------------------------------------


class Stream(Protocol):
    """One authenticated, encrypted stream to another node; blocking, for one thread at a time.

    Every method raises PeerUnreachable when the other side is gone or silent for too long, and
    ProtocolError when it sends what it may not.
    """

    def send(self, frame: dict[str, Any]) -> None: ...

    def receive(self) -> dict[str, Any]: ...

    def read_into(self, buffer: memoryview) -> None:
        """Fill `buffer` with raw bytes."""

    def write(self, data: memoryview) -> None:
        """Send raw bytes."""

    def close(self) -> None: ...

    def abort(self) -> None:
        """End it now, from any thread: the one that uses it gets PeerUnreachable."""


OpenStream: TypeAlias = Callable[[PeerSource, dict[str, Any]], tuple[Stream, dict[str, Any]]]
"""Open a stream with that `open` frame; the stream and the answer to it. Raises PeerUnreachable,
PeerRefused (the other side's words), ProtocolError."""


class Offer(BaseModel):
    """A peer's answer to the opening of a shard."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    t: Literal["open"] = "open"
    size: Annotated[int, Field(gt=0, le=1 << 46)]
    chunk_bytes: Annotated[int, Field(gt=0, le=1 << 30)]
    whole: bool
    """All of it can be read; otherwise ask what it has."""
    hashes: bool
    """It knows the hashes of the chunks."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a carrier may read out to another node, as the daemon decided."""

    path: str
    size: int
    sha256: str
    hashes_path: str | None
    journal_path: str | None
    """Set for a partial: only what it lists may be read."""

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}
