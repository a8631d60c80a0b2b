"""What is shown of a model this node works on: out of its entry, its engine's report and what the
engine takes. Pure."""

from __future__ import annotations

from dataclasses import replace

from meshd.runtime.child_events import ChildState
from meshd.runtime.hosting import Entry
from meshd.runtime.reported import HOST, MemoryReport
from meshd.runtime.supervisor import EngineReport
from meshd.view import HostView, ModelState, ModelView, NodeView, RuntimeView, Target

STATE_OF_ENGINE = {
    ChildState.STOPPED: ModelState.ABSENT,
    ChildState.STARTING: ModelState.LOADING,
    ChildState.READY: ModelState.READY,
    ChildState.DRAINING: ModelState.DRAINING,
    # A stop that hosting ordered is DRAINING already; any other one makes way for a new start.
    ChildState.STOPPING: ModelState.LOADING,
    ChildState.BACKOFF: ModelState.LOADING,
    ChildState.FAILED: ModelState.FAILED,
}


def model_view(
    entry: Entry,
    report: EngineReport | None,
    memory: MemoryReport | None,
    node: NodeView,
    epoch: int,
    now: float,
) -> ModelView:
    """`report`: None without an engine. `memory`: as `proved_memory` gave it. `epoch`: of this
    node's claim, 0 without one. `now`: monotonic."""
    facts, preparing = entry.facts, entry.now
    hosts: tuple[HostView, ...] = ()
    targets: tuple[Target, ...] = ()
    retry_at = entry.retry_at
    progress = preparing.progress if preparing is not None else None
    reason = entry.reason if entry.state is not ModelState.READY else None
    if report is not None:
        progress = report.progress
        retry_at = report.retry_at or retry_at
        hosts = (_host_view(entry, report, memory, node, epoch),)
        if entry.state is ModelState.READY:
            reason = _shortcoming(report, memory)
            if report.instance and report.socket_path:
                path = report.socket_path
                targets = (Target(entry.model, node.name, report.instance, path, report.slots),)
    return ModelView(
        id=entry.model,
        ref=entry.ref,
        state=entry.state,
        reason=reason,
        progress=progress,
        retry_after_s=max(1.0, retry_at - now) if retry_at is not None else None,
        digest=facts.digest if facts else None,
        context_length=report.context_length if report is not None else None,
        capabilities=facts.capabilities if facts else (),
        created_at=facts.created_at if facts else 0,
        evidence=report.evidence if report is not None else (),
        fetch=preparing.fetch if preparing is not None else None,
        hosts=hosts,
        targets=targets,
    )


def proved_memory(memory: MemoryReport | None, runtime: RuntimeView | None) -> MemoryReport | None:
    """What may be shown of what an engine said it took: nothing that the proof does not bear out.

    An engine for the CPU says that it offloads layers, too; and what was kept from an earlier start
    may be of a device that is lost.
    """
    if memory is None or (runtime is not None and runtime.backend != "cpu"):
        return memory
    return replace(memory, offloaded=None) if set(memory.devices) == {HOST} else None


def _shortcoming(report: EngineReport, memory: MemoryReport | None) -> str | None:
    """What a model that is ready lacks."""
    if report.degraded:
        return f"degraded: {report.degraded}"
    if memory is None or memory.offloaded is None or memory.offloaded[0] == memory.offloaded[1]:
        return None
    done, of = memory.offloaded
    return f"slow: {of - done} of {of} layers run on the CPU, for want of device memory"


def _host_view(
    entry: Entry, report: EngineReport, memory: MemoryReport | None, node: NodeView, epoch: int
) -> HostView:
    plan = entry.options.split
    return HostView(
        node=node.name,
        node_id=node.id,
        epoch=epoch,
        state=entry.state,
        context_length=report.context_length,
        slots=report.slots,
        slots_free=report.slots,
        bytes_on_disk=entry.facts.total_bytes if entry.facts else 0,
        memory=tuple((d, parts.total) for d, parts in memory.devices.items()) if memory else (),
        offloaded=memory.offloaded if memory else None,
        workers=tuple(part.shown for part in plan.parts) if plan else (),
    )
