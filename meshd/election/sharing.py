"""The book of deployments as other nodes get to see it: in JSON, compared and merged. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from meshd.election.deployments import DeploymentBook
from meshd.election.reconciling import chunk_from_json, chunk_to_json, chunks, difference
from meshd.election.records import from_json, to_json
from meshd.ids import ModelId
from meshd.view import Deployment


class SharedDeployments:
    """What `meshd.peers.deploying` wants of a table. `changed(records)`: others wrote these, and
    they stand in the book now; called before they are passed on."""

    def __init__(
        self, book: DeploymentBook, changed: Callable[[tuple[Deployment, ...]], None]
    ) -> None:
        self._book = book
        self._changed = changed

    @property
    def digest(self) -> str:
        return f"{self._book.digest:016x}"

    def stamps(self) -> Sequence[dict[str, Any]]:
        return [chunk_to_json(chunk) for chunk in chunks(self._book)]

    def compare(self, stamps: object) -> tuple[Sequence[ModelId], Sequence[ModelId]] | None:
        """(What the other table lacks, what the book lacks); None for what is no chunk."""
        chunk = chunk_from_json(stamps)
        if chunk is None:
            return None
        found = difference(self._book, chunk)
        return [record.model for record in found.ours], found.wanted

    def entries(self, models: Iterable[ModelId]) -> Sequence[dict[str, Any]]:
        """The records of those of them that the book knows."""
        found = map(self._book.get, models)
        return [to_json(record) for record in found if record is not None]

    def merge(self, entries: Iterable[object]) -> Sequence[ModelId]:
        """The models whose record changed by it; what is no record within the bounds is left
        out."""
        read = map(from_json, entries)
        taken = self._book.merge(record for record in read if record is not None)
        if taken:
            self._changed(taken)
        return [record.model for record in taken]
