"""What to give up, step by step, when an engine does not run as asked."""

from __future__ import annotations

from dataclasses import dataclass, replace

from meshd.runtime.launch import LaunchSpec

MIN_CONTEXT = 2048
"""Below this a model is of little use, and the context no longer what its memory goes to."""


@dataclass(frozen=True, slots=True)
class Rung:
    spec: LaunchSpec
    words: str
    """What this step changes: "a context of 2048 tokens"."""


def next_rung(spec: LaunchSpec) -> Rung | None:
    """The next smaller way to run `spec`; None if there is none.

    The order: 1. half the context, down to 2,048 tokens; 2. a plain f16 KV cache instead of a
    quantised one; 3. one slot; 4. half the layers on the device, down to none.
    """
    if spec.context > MIN_CONTEXT:  # 1
        context = max(MIN_CONTEXT, spec.context // 2)
        return Rung(replace(spec, context=context), f"a context of {context} tokens")
    if spec.kv_type not in (None, "f16"):  # 2
        return Rung(replace(spec, kv_type=None), "a KV cache of type f16")
    if spec.parallel > 1:  # 3
        return Rung(replace(spec, parallel=1), "one request at a time")
    if spec.gpu_layers:  # 4
        layers = spec.gpu_layers // 2
        return Rung(replace(spec, gpu_layers=layers), f"{layers} layers on the device")
    return None


def given_up(asked: LaunchSpec, now: LaunchSpec) -> str | None:
    """All that `now` lacks of `asked`, in words for status; None if nothing."""
    lacks = []
    if now.context != asked.context:
        lacks.append(f"context of {now.context} instead of {asked.context} tokens")
    if now.kv_type != asked.kv_type:
        lacks.append(f"KV cache of type f16 instead of {asked.kv_type}")
    if now.parallel != asked.parallel:
        lacks.append(f"{now.parallel} instead of {asked.parallel} requests at a time")
    if now.gpu_layers != asked.gpu_layers:
        lacks.append(f"{now.gpu_layers} instead of {asked.gpu_layers} layers on the device")
    return ", ".join(lacks) or None
