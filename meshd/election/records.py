"""Deployments as they travel and are stored, and which of two stands. Pure.

The form is canonical: fields that have their default are left out and keys are sorted, so that one
record has one fingerprint on every node. What comes from outside is bounded; unknown fields are
ignored.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Final

import orjson
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from meshd.ids import ModelId, NodeId
from meshd.view import Cause, Deployment
from meshd.view.shape import MAX_JSON_BYTES, ModelShape

MAX_VERSION: Final = (1 << 53) - 1
"""The largest integer every reader of JSON keeps exactly."""
MAX_REPLICAS: Final = 4096
MAX_CONTEXT: Final = 1 << 28
MAX_PARALLEL: Final = 1024

Node = Annotated[str, StringConstraints(pattern=r"^[a-z2-7]{52}$")]


class _Record(BaseModel):
    """The same fields and defaults as `Deployment`."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    ref: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    version: Annotated[int, Field(ge=1, le=MAX_VERSION)]
    origin: Node
    replicas: Annotated[int, Field(ge=1, le=MAX_REPLICAS)] | None = 1
    context: Annotated[int, Field(ge=1, le=MAX_CONTEXT)] | None = None
    parallel: Annotated[int, Field(ge=1, le=MAX_PARALLEL)] | None = None
    host: Node | None = None
    cause: Annotated[Cause, Field(strict=False)] = Cause.OPERATOR
    asleep: bool = False
    removed: bool = False
    split: bool = False
    shape: Annotated[str, StringConstraints(max_length=MAX_JSON_BYTES)] | None = None
    """`ModelShape.to_json`; one that makes no sense is as good as none."""

    def to_view(self) -> Deployment:
        return Deployment(
            model=ModelId(self.model),
            ref=self.ref,
            version=self.version,
            origin=NodeId(self.origin),
            replicas=self.replicas,
            context=self.context,
            parallel=self.parallel,
            host=None if self.host is None else NodeId(self.host),
            cause=self.cause,
            asleep=self.asleep,
            removed=self.removed,
            split=self.split,
            shape=_shape(self.shape),
        )


def to_json(record: Deployment) -> dict[str, Any]:
    return _Record.model_construct(**_fields(record)).model_dump(mode="json", exclude_defaults=True)


def from_json(value: object) -> Deployment | None:
    """None for whatever is no deployment within the bounds."""
    try:
        return _Record.model_validate(value).to_view()
    except ValidationError:
        return None


def problem_of(record: Deployment) -> str | None:
    """Why other nodes would not take `record`, in words; None if they would."""
    try:
        _Record.model_validate(_fields(record))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return None


def canonical(record: Deployment) -> bytes:
    return orjson.dumps(to_json(record), option=orjson.OPT_SORT_KEYS)


def fingerprint(record: Deployment) -> int:
    """64 bits over everything a record says."""
    return int.from_bytes(hashlib.blake2b(canonical(record), digest_size=8).digest())


def supersedes(one: Deployment, other: Deployment) -> bool:
    """Whether `one` stands against `other`, a record of the same model.

    The higher stamp does. One stamp with two contents is the work of a node that lost what it had
    written, or of a copied one; the order of the bytes decides then, the same on every node.
    """
    if one.stamp != other.stamp:
        return one.stamp > other.stamp
    return one != other and canonical(one) > canonical(other)


def _fields(record: Deployment) -> dict[str, Any]:
    fields = {name: getattr(record, name) for name in _Record.model_fields}
    if record.shape is not None:
        fields["shape"] = record.shape.to_json().decode()
    return fields


def _shape(text: str | None) -> ModelShape | None:
    if text is None:
        return None
    try:
        return ModelShape.from_json(text.encode())
    except ValueError:
        return None
