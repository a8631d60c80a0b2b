"""Makes the engines of a node, on this machine alone or with workers."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from meshd.config import Config
from meshd.ids import InstanceId
from meshd.kernel import Clock, FlightRecorder
from meshd.runtime.group import Borrow, LoanOrder
from meshd.runtime.hosting_events import StartEngine
from meshd.runtime.launch import LaunchSpec, on_workers
from meshd.runtime.split_engine import SplitEngine
from meshd.runtime.supervisor import EnginePlaces, EngineReport, EngineSupervisor, SpawnTask
from meshd.view import SplitPlan


@dataclass(frozen=True, slots=True)
class Workshop:
    """What every engine of this node is made with."""

    config: Config
    clock: Clock
    rng: random.Random
    recorder: FlightRecorder
    spawn_task: SpawnTask
    wait_idle: Callable[[InstanceId], Awaitable[None]]
    last_request_at: Callable[[InstanceId], float | None]
    borrow: Borrow
    on_report: Callable[[EngineReport], None]

    def spec(self, order: StartEngine) -> LaunchSpec:
        """As the model would run on this machine alone, quietly."""
        settings, options, facts = self.config.engine, order.options, order.facts
        return LaunchSpec(
            model=order.model,
            weights=facts.first_shard,
            mmproj=facts.mmproj,
            context=settings.context_of(options.context, facts.trained_context),
            parallel=settings.slots_of(options.parallel),
            threads=settings.threads,
            prompt_cache_bytes=options.prompt_cache_bytes,
            extra=settings.extra_args,
        )

    def engine(
        self, order: StartEngine, spec: LaunchSpec, binary: Path
    ) -> EngineSupervisor | SplitEngine:
        """Not started."""
        plan = order.options.split
        if plan is None:
            return self._supervisor(spec, binary, order.facts.total_bytes, self.on_report)
        return self._split(order, plan, spec, binary)

    def _split(
        self, order: StartEngine, plan: SplitPlan, spec: LaunchSpec, binary: Path
    ) -> SplitEngine:
        def make(
            endpoints: tuple[str, ...], on_report: Callable[[EngineReport], None]
        ) -> EngineSupervisor:
            # Most weights go elsewhere: what this process has in memory says nothing of progress.
            return self._supervisor(on_workers(spec, plan, endpoints), binary, 0, on_report)

        return SplitEngine(
            LoanOrder(order.model, order.options.epoch, order.facts.digest, plan),
            borrow=self.borrow,
            make=make,
            clock=self.clock,
            recorder=self.recorder,
            spawn_task=self.spawn_task,
            on_report=self.on_report,
        )

    def _supervisor(
        self,
        spec: LaunchSpec,
        binary: Path,
        weights_bytes: int,
        on_report: Callable[[EngineReport], None],
    ) -> EngineSupervisor:
        return EngineSupervisor(
            spec.model,
            spec,
            binary,
            settings=self.config.engine,
            places=EnginePlaces(self.config.run_dir, self.config.log_dir),
            weights_bytes=weights_bytes,
            clock=self.clock,
            rng=self.rng,
            recorder=self.recorder,
            spawn_task=self.spawn_task,
            wait_idle=self.wait_idle,
            last_request_at=self.last_request_at,
            on_report=on_report,
        )
