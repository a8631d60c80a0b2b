"""What a deployment would take on this node, started as this node would start it. Pure; bytes.

1. Context and slots are those of the deployment, else of this node's settings.
2. The type of the cache is what the settings' further arguments say, if they say it.
3. An engine may keep conversations that have lost their slot, as much as its slots have, and at
   most `engine.prompt_cache`: it is told so, and that is counted.
4. What engines reported after loading corrects the count, for these weights and this engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from meshd.config import EngineSettings
from meshd.election.fit import Budget, Corrections, Estimate, Fit, estimate, fit, observed
from meshd.election.fit.estimate import BLOCKS
from meshd.sizes import parse_size
from meshd.view import Deployment
from meshd.view.shape import MemoryParts, ModelShape

_CACHE_TYPE = ("--cache-type-k", "-ctk")


class Appraiser:
    """`corrections`: those kept by earlier runs."""

    def __init__(self, settings: EngineSettings, corrections: Corrections) -> None:
        self._settings = settings
        self._corrections = corrections
        self._kv_type = _kv_type(settings.extra_args)
        self._prompts = parse_size(settings.prompt_cache)
        self._counted: dict[tuple[ModelShape, int, int], Estimate] = {}
        self.changes = 0
        """Times that something was learned."""

    def counted(self, deployment: Deployment) -> Estimate | None:
        """By the rules alone; None while the shape is not known."""
        shape = deployment.shape
        if shape is None:
            return None
        context = self._settings.context_of(deployment.context, shape.trained_context)
        slots = self._settings.slots_of(deployment.parallel)
        key = (shape, context, slots)
        if key not in self._counted:
            if len(self._counted) > 4096:
                self._counted.clear()
            found = estimate(shape, context=context, slots=slots, kv_type=self._kv_type)
            found = replace(found, prompts=min(self._prompts, found.cache))  # 3
            self._counted[key] = found
        return self._counted[key]

    def corrected(self, deployment: Deployment, digest: str | None, engine: str) -> Estimate | None:
        """What is to be leased (4)."""
        found = self.counted(deployment)
        if found is None or digest is None:
            return found
        return self._corrections.find(digest, engine).apply(found)

    def fit(
        self,
        deployment: Deployment,
        budgets: Sequence[Budget],
        free: Mapping[str, int] | None,
        *,
        digest: str | None,
        engine: str,
    ) -> Fit | None:
        """Whether it fits into what is free of `budgets`; None while its shape is not known."""
        found = self.corrected(deployment, digest, engine)
        return None if found is None else fit(found, budgets, free, spill=True)

    def learn(
        self, deployment: Deployment, digest: str, engine: str, seen: Mapping[str, MemoryParts]
    ) -> bool:
        """An engine that runs `deployment` said what it took. Whether that is news."""
        found = self.counted(deployment)
        if found is None:
            return False
        correction = observed(found, seen)
        if correction == self._corrections.find(digest, engine):
            return False
        self._corrections.keep(digest, engine, correction)
        self.changes += 1
        return True

    def to_json(self) -> bytes:
        """The corrections, to be kept."""
        return self._corrections.to_json()


def _kv_type(arguments: Sequence[str]) -> str:
    for flag, value in pairwise(arguments):
        if flag in _CACHE_TYPE and value in BLOCKS:
            return value
    return "f16"
