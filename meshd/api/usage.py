"""What the relay tells of requests to whoever counts them: demand, idleness, what is missing.

Everything is called on the loop's thread, in the middle of a request: it must return at once and
raise nothing. Models go by their plain names, also where a request needs the exact one.
"""

from __future__ import annotations

from typing import Protocol

from meshd.ids import ModelId


class Usage(Protocol):
    def asked(self, model: ModelId) -> None:
        """A client of this node asked for a model of the view; once a request, whatever becomes of
        it. Requests of other nodes were asked for there."""

    def answered(self, model: ModelId, service_s: float) -> None:
        """An engine, here or elsewhere, is done with such a request: it answered, or the client
        left. `service_s`: from when it was sent to the end, without the time in queues."""

    def began(self, model: ModelId) -> None:
        """An engine of this node is given a request, whoever sent it."""

    def ended(self, model: ModelId) -> None:
        """It has it no more; exactly once for each `began`."""

    def missing(self, name: str) -> bool:
        """A client named a model that nobody serves and nobody was told to load. Whether it is
        going to be served because of that: then it is in the view by the time this returns, under
        that name. Called once a request at most, before `asked`."""
