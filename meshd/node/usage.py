"""Requests are told to the election, which starts after the API does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshd.errors import ModelLoading
from meshd.ids import ModelId

if TYPE_CHECKING:
    from meshd.election.room import ElectionRoom


class LateUsage:
    """`api.usage.Usage`, and `plan`, of the room as soon as it is there."""

    room: ElectionRoom | None = None

    def asked(self, model: ModelId) -> None:
        if self.room is not None:
            self.room.asked(model)

    def answered(self, model: ModelId, service_s: float) -> None:
        if self.room is not None:
            self.room.answered(model, service_s)

    def began(self, model: ModelId) -> None:
        if self.room is not None:
            self.room.began(model)

    def ended(self, model: ModelId) -> None:
        if self.room is not None:
            self.room.ended(model)

    def missing(self, name: str) -> bool:
        return self.room is not None and self.room.missing(name)

    def plan(self, name: str) -> dict[str, Any]:
        if self.room is None:
            raise ModelLoading("this node is starting")
        return self.room.desk.planned(name)
