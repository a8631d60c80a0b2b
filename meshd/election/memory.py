"""What of this node's memory may be leased, and when that is measured again. Pure; bytes.

1. Nothing may be leased before an engine is known, and for an accelerator not before it was tried
   and its devices were looked at by the names the engine gives them: until then it is not known on
   what a model would run.
2. While an engine loads, what it has taken so far is missing from the free memory and leased as
   well; so no reading counts that was taken meanwhile, not even once it is loaded. The same
   while memory is lent to other nodes: what they have taken of it so far is not known. How fast a
   memory is counts from any reading.
3. A reading that differs from the last one by little says nothing: free memory is never still.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from meshd.election.fit import HOST, Budget, budgets
from meshd.view import DeviceView, Layer, RuntimeView

CPU: Final = "cpu"
STILL_SHARE: Final = 32
"""A change by less than one such part is none (3)."""


def untried(
    runtime: RuntimeView | None, devices: Sequence[DeviceView], problem: str | None
) -> str | None:
    """Why nothing can be said of this node's memory yet (1), in words; None if it can. `problem`:
    why there is no engine."""
    if runtime is None:
        return problem or "looking for an engine on this machine"
    if runtime.built_for == CPU:
        return None
    layers = runtime.proof.layers
    if not any(layer.layer is Layer.RUNTIME or not layer.passed for layer in layers):
        return f"its engine is being tried on {runtime.built_for}"
    if runtime.backend != CPU and not any(device.engine_name for device in devices):
        return "its devices are being looked at"
    return None


class Memory:
    """`limit`: `--max-vram`."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._devices: Sequence[DeviceView] | None = None
        self.budgets: tuple[Budget, ...] = ()
        """As last measured; empty before."""

    @property
    def capacity(self) -> Mapping[str, int]:
        return {budget.device: budget.usable for budget in self.budgets}

    def measure(
        self, devices: Sequence[DeviceView], held: Mapping[str, int], *, calm: bool
    ) -> bool:
        """Take over a reading; whether the budgets changed by it. `held`: by this node's engines,
        of what is missing from the free memory, under the names the engine gives. `calm`: no
        engine of this node is loading, and nothing is lent."""
        if devices is self._devices or not devices:
            return False
        self._devices = devices
        found = budgets(devices, held=held, limit=self._limit)
        if self.budgets and not calm:  # 2
            found = _with_speeds(self.budgets, found)
        if not _differ(self.budgets, found):
            return False
        self.budgets = found
        return True

    def counted(self, taken: Mapping[str, int]) -> Mapping[str, int]:
        """What an engine takes, by device of the budgets: where an accelerator's memory is the
        machine's, what lies in main memory lies there."""
        host = next((budget.device for budget in self.budgets if budget.host), HOST)
        found: dict[str, int] = {}
        for device, size in taken.items():
            name = host if device == HOST else device
            found[name] = found.get(name, 0) + size
        return found


def _with_speeds(old: Sequence[Budget], new: Sequence[Budget]) -> tuple[Budget, ...]:
    speeds = {budget.device: budget.bytes_per_s for budget in new}
    return tuple(replace(b, bytes_per_s=speeds.get(b.device, b.bytes_per_s)) for b in old)


def _differ(old: Sequence[Budget], new: Sequence[Budget]) -> bool:
    if [b.device for b in old] != [b.device for b in new]:
        return True
    return any(
        abs(a.usable - b.usable) > a.usable // STILL_SHARE or a.bytes_per_s != b.bytes_per_s
        for a, b in zip(old, new, strict=True)
    )
