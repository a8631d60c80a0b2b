"""What the two ends of a loan say to each other. Pure.

Frames (`frames.py`) on a raw stream of service `loan`, which the host opens:

    host    ask      model, epoch, rpc_protocol, digest, part, weights: first of all, once
            commit   all workers have granted: make it usable
            loaded   the engine is loaded: no more weights come
            end      reason: the memory is not needed any more
    worker  granted  loan: leased, for as long as the stream lives
            refused  reason, message: an answer to `ask`
            moved    words: `commit` goes on; what it is at
            serving  warmed_bytes: the RPC server takes tunnels; so much it had of the weights
            ended    reason: the memory is not there any more
    both    beat     every second

Frames of other kinds, and fields that are not named here, are ignored: they are of a later version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, model_validator

from meshd.ids import LoanId, ModelId, NodeId
from meshd.peers.links.hello import clean_line
from meshd.peers.trust.wire import Node, WireModel, read
from meshd.view import MAX_NEEDED_FILES, LoanAsk, NeededWeights, Part

FRAME_LIMIT: Final = 128 * 1024
"""Bytes; an ask with as many devices and as long names as may be has fewer."""
MAX_DEVICES: Final = 64
MAX_LAYERS: Final = 1 << 16
MAX_REF: Final = 1536
"""Characters of what a set is called on its hub: a repository, a commit, a path."""
MAX_WORKERS: Final = 64
MAX_WORDS: Final = 500
"""Characters of what is said for people."""


def _line(value: object) -> str:
    return clean_line(value, MAX_WORDS) or "no reason given"


def _one_line(value: str) -> str:
    if not value.isprintable():
        raise ValueError("not printable")
    return value


_Name = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(_one_line)]
_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Size = Annotated[int, Field(ge=0, lt=1 << 53)]
_Layers = Annotated[int, Field(ge=0, le=MAX_LAYERS)]
_Words = Annotated[str, BeforeValidator(_line)]
"""Whatever came, as one clean line."""


class PartOnWire(WireModel):
    """`view.Part`."""

    node: Node
    name: _Name
    memory: Annotated[
        tuple[Annotated[tuple[_Name, _Size], Field(strict=False)], ...],
        Field(min_length=1, max_length=MAX_DEVICES, strict=False),
    ]
    layers: Annotated[tuple[_Layers, ...], Field(max_length=MAX_DEVICES, strict=False)]
    first_layer: _Layers
    output: bool
    share: Annotated[float, Field(ge=0, le=1, strict=False)]

    @model_validator(mode="after")
    def _each_device_has_its_layers(self) -> PartOnWire:
        if len(self.layers) != len(self.memory):
            raise ValueError("as many numbers of layers as devices are needed")
        return self


class WeightsOnWire(WireModel):
    """`view.NeededWeights`."""

    ref: Annotated[
        str, StringConstraints(min_length=1, max_length=MAX_REF), AfterValidator(_one_line)
    ]
    files: Annotated[
        tuple[Annotated[tuple[_Sha256, _Size], Field(strict=False)], ...],
        Field(min_length=1, max_length=MAX_NEEDED_FILES, strict=False),
    ]
    bytes: _Size
    pushed_bytes: _Size
    pushed_to: Annotated[int, Field(ge=0, le=MAX_WORKERS)]
    bytes_per_s: Annotated[float, Field(gt=0, le=1e15, strict=False)] | None = None

    def to_view(self) -> NeededWeights:
        return NeededWeights(
            ref=self.ref,
            files=self.files,
            bytes=self.bytes,
            pushed_bytes=self.pushed_bytes,
            pushed_to=self.pushed_to,
            bytes_per_s=self.bytes_per_s,
        )


class Ask(WireModel):
    t: Literal["ask"] = "ask"
    model: _Name
    epoch: _Size
    rpc_protocol: _Name
    digest: _Name | None = None
    part: PartOnWire
    weights: WeightsOnWire | None = None

    def to_view(self) -> LoanAsk:
        part = self.part
        return LoanAsk(
            model=ModelId(self.model),
            epoch=self.epoch,
            rpc_protocol=self.rpc_protocol,
            part=Part(
                node=NodeId(part.node),
                name=part.name,
                memory=part.memory,
                layers=part.layers,
                first_layer=part.first_layer,
                output=part.output,
                share=part.share,
            ),
            digest=self.digest,
            weights=None if self.weights is None else self.weights.to_view(),
        )


class Commit(WireModel):
    t: Literal["commit"] = "commit"


class Loaded(WireModel):
    """The engine has everything it sends while it loads: the model has generated a token."""

    t: Literal["loaded"] = "loaded"


class Beat(WireModel):
    t: Literal["beat"] = "beat"


class End(WireModel):
    t: Literal["end"] = "end"
    reason: _Words = ""


class Granted(WireModel):
    t: Literal["granted"] = "granted"
    loan: Annotated[LoanId, StringConstraints(pattern=r"^loan-[0-9a-f]{32}$")]


class Refused(WireModel):
    t: Literal["refused"] = "refused"
    reason: _Words = ""
    """Its name on the wire."""
    message: _Words = ""


class Moved(WireModel):
    t: Literal["moved"] = "moved"
    words: _Words = ""


class Serving(WireModel):
    t: Literal["serving"] = "serving"
    warmed_bytes: _Size


class Ended(WireModel):
    t: Literal["ended"] = "ended"
    reason: _Words = ""


HostWord: TypeAlias = Ask | Commit | Loaded | Beat | End
WorkerWord: TypeAlias = Granted | Refused | Moved | Serving | Beat | Ended

_HOST_WORDS: Final[Mapping[str, type[HostWord]]] = {
    "ask": Ask, "commit": Commit, "loaded": Loaded, "beat": Beat, "end": End,
}  # fmt: skip
_WORKER_WORDS: Final[Mapping[str, type[WorkerWord]]] = {
    "granted": Granted, "refused": Refused, "moved": Moved, "serving": Serving, "beat": Beat,
    "ended": Ended,
}  # fmt: skip


def ask_to_wire(ask: LoanAsk) -> dict[str, Any]:
    """The frame that asks. What is too large or too long for one is refused by the worker."""
    part, weights = ask.part, ask.weights
    return {
        "t": "ask",
        "model": ask.model,
        "epoch": ask.epoch,
        "rpc_protocol": ask.rpc_protocol,
        "digest": ask.digest,
        "part": {
            "node": part.node,
            "name": part.name,
            "memory": part.memory,
            "layers": part.layers,
            "first_layer": part.first_layer,
            "output": part.output,
            "share": part.share,
        },
        "weights": None
        if weights is None
        else {
            "ref": weights.ref,
            "files": weights.files,
            "bytes": weights.bytes,
            "pushed_bytes": weights.pushed_bytes,
            "pushed_to": weights.pushed_to,
            "bytes_per_s": weights.bytes_per_s,
        },
    }


def parse_host_word(frame: Mapping[str, Any]) -> HostWord | None:
    """None for what is of a later version. Raises ProtocolError."""
    kind = frame.get("t")
    word = _HOST_WORDS.get(kind) if isinstance(kind, str) else None
    return None if word is None else read(word, frame, f"`{kind}` of a host")


def parse_worker_word(frame: Mapping[str, Any]) -> WorkerWord | None:
    """None for what is of a later version. Raises ProtocolError."""
    kind = frame.get("t")
    word = _WORKER_WORDS.get(kind) if isinstance(kind, str) else None
    return None if word is None else read(word, frame, f"`{kind}` of a worker")
