"""Why a request is not served, in the words and codes a client gets."""

from __future__ import annotations

from typing import assert_never

from meshd.api.admission import Refusal
from meshd.api.route import Ambiguous, Broken, Failed, NotFound, NotReady
from meshd.errors import (
    MeshdError,
    ModelAmbiguous,
    ModelFailed,
    ModelLoading,
    ModelNotFound,
    NodeDraining,
    QueueFull,
    UpstreamFailed,
    UpstreamTimeout,
)

QUEUE_RETRY_AFTER_S = 1.0
FAILED_RETRY_AFTER_S = 30.0
DRAINING_RETRY_AFTER_S = 5.0


def of_route(name: str, outcome: Ambiguous | NotFound | NotReady | Failed | Broken) -> MeshdError:
    match outcome:
        case NotFound():
            return ModelNotFound(_not_found(name, outcome), param="model")
        case Failed():
            return ModelFailed(
                f"model `{outcome.model}` could not be loaded: {outcome.reason}",
                param="model",
                retry_after_s=FAILED_RETRY_AFTER_S,
                detail={"state": "failed", "reason": outcome.reason},
            )
        case NotReady():
            why = f": {outcome.reason}" if outcome.reason else ""
            return ModelLoading(
                f"model `{outcome.model}` is {outcome.state.value}{why}; try again later, or send "
                "`x-meshd-wait-s` to wait for it",
                param="model",
                retry_after_s=outcome.retry_after_s,
                detail={
                    "state": outcome.state.value,
                    "progress": outcome.progress,
                    "reason": outcome.reason,
                },
            )
        case Ambiguous():
            return ModelAmbiguous(outcome.reason, param="model")
        case Broken():
            return UpstreamFailed(
                f"model `{outcome.model}` is served by nothing that works: {outcome.reason}; it is "
                f"tried again in {max(1.0, outcome.retry_after_s):.0f} s",
                retry_after_s=outcome.retry_after_s,
            )
        case _:
            assert_never(outcome)


def of_admission(name: str, reason: Refusal, waited_s: float) -> MeshdError:
    """For the refusals that the view does not explain better."""
    if reason is Refusal.QUEUE_FULL:
        return QueueFull(
            f"too many requests wait for model `{name}`; try again later",
            retry_after_s=QUEUE_RETRY_AFTER_S,
        )
    if reason is Refusal.DEADLINE:
        return UpstreamTimeout(
            f"no slot of model `{name}` became free within {waited_s:.0f} s",
            retry_after_s=QUEUE_RETRY_AFTER_S,
        )
    return ModelLoading(
        f"model `{name}` is not ready; try again later",
        param="model",
        retry_after_s=DRAINING_RETRY_AFTER_S,
        detail={"state": "waiting", "progress": None, "reason": None},
    )


def not_here(name: str) -> ModelLoading:
    """For another node, which saw the model here a moment ago and may know somebody else."""
    return ModelLoading(
        f"model `{_shown(name)}` is not served by this node any more",
        param="model",
        retry_after_s=QUEUE_RETRY_AFTER_S,
        detail={"state": "absent", "progress": None, "reason": "not served by this node any more"},
    )


def withdrawn() -> NodeDraining:
    return NodeDraining(
        "this node is draining, and no other serves the model; `meshd undrain` puts it back to "
        "work",
        retry_after_s=DRAINING_RETRY_AFTER_S,
    )


def shutting_down() -> NodeDraining:
    return NodeDraining(
        "this node is shutting down and takes no new requests",
        retry_after_s=DRAINING_RETRY_AFTER_S,
    )


def _shown(name: str) -> str:
    return name if len(name) <= 128 else f"{name[:128]}…"


def _not_found(name: str, outcome: NotFound) -> str:
    shown = _shown(name)
    if outcome.reason is not None:
        return f"model `{shown}` is not served here: {outcome.reason}"
    if outcome.close:
        names = ", ".join(f"`{close}`" for close in outcome.close)
        return f"model `{shown}` is not known here; did you mean {names}?"
    if outcome.known:
        return f"model `{shown}` is not known here; GET /v1/models lists those that are"
    return f"model `{shown}` is not known here; no model is loaded (`meshd load REF` loads one)"
