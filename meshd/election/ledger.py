"""A node's own book of its devices' memory: what an engine may use is leased here first. Pure.

A lease is held by a model that this node hosts, or by a loan to another node's.

Sizes are bytes, devices are named as the engine calls them. Rules, numbered as in the code:

1. A lease is granted on all its devices or on none: half a model is no use to anybody.
2. A holder has at most one lease. A second one replaces the first if it fits where the first one
   was; otherwise the first one stays as it is.
3. A device that is not in the capacity has 0 bytes; nothing can be leased of it.
4. What an engine was measured to take is true whether it fits or not. A device can be overcommitted
   that way, or by a loss of capacity; it grants nothing more until what is leased fits again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeAlias

from meshd.ids import LoanId, ModelId
from meshd.sizes import format_size

Holder: TypeAlias = ModelId | LoanId
"""Loans have names no model can have by chance (`LoanId`)."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Memory granted to one holder."""

    holder: Holder
    epoch: int
    """Of the claim it was granted for."""
    memory: Mapping[str, int]
    """By device; never zero."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why a lease was not granted: the device that lacks most."""

    device: str
    needed: int
    free: int

    def __str__(self) -> str:
        return f"needs {format_size(self.needed)}, {format_size(self.free)} free on {self.device}"


class Ledger:
    """See the module's docstring. Negative sizes are the caller's bug: ValueError."""

    def __init__(self) -> None:
        self._capacity: dict[str, int] = {}
        self._leases: dict[Holder, Lease] = {}

    @property
    def leases(self) -> Mapping[Holder, Lease]:
        return MappingProxyType(self._leases)

    def holds(self, holder: Holder) -> bool:
        return holder in self._leases

    def leased(self) -> Mapping[str, int]:
        """Of each device of the capacity or of a lease, in the order of their names."""
        return self._leased_but(None)

    def free(self) -> Mapping[str, int]:
        """Of each device of the capacity; 0 where more is leased than there is."""
        leased = self.leased()
        return MappingProxyType(
            {d: max(0, whole - leased[d]) for d, whole in sorted(self._capacity.items())}
        )

    def overcommitted(self) -> str | None:
        """Where more is leased than there is, in words with figures; None if nowhere."""
        over = [
            f"{device}: {format_size(taken)} leased of {format_size(self._capacity.get(device, 0))}"
            for device, taken in self.leased().items()
            if taken > self._capacity.get(device, 0)
        ]
        return "; ".join(over) or None

    # -- changes ----------------------------------------------------------------------------------

    def set_capacity(self, memory: Mapping[str, int]) -> None:
        """What may be leased of each device in all. Leases that are out stay, fit or not (4)."""
        self._capacity = dict(_checked(memory))

    def lease(
        self,
        holder: Holder,
        epoch: int,
        memory: Mapping[str, int],
    ) -> Shortage | None:
        """Grant `memory` to `holder`, or say what is short and change nothing."""
        wanted = _checked(memory)
        taken = self._leased_but(holder)  # 2
        short = [
            Shortage(device, needed, free)
            for device, needed in wanted.items()
            if needed > (free := max(0, self._capacity.get(device, 0) - taken.get(device, 0)))
        ]
        if short:  # 1, 3, 4
            return max(short, key=lambda s: (s.needed - s.free, s.device))
        self._leases[holder] = Lease(holder, epoch, wanted)
        return None

    def measure(self, holder: Holder, memory: Mapping[str, int]) -> bool:
        """Correct the lease of `holder` by what its engine takes (4); whether that changed it. What
        is said of a holder without a lease came after its end, and is of no more interest."""
        measured = _checked(memory)
        before = self._leases.get(holder)
        if before is None or before.memory == measured:
            return False
        self._leases[holder] = replace(before, memory=measured)
        return True

    def release(self, holder: Holder) -> bool:
        """End the lease of `holder`; whether there was one."""
        return self._leases.pop(holder, None) is not None

    def _leased_but(self, excepted: Holder | None) -> Mapping[str, int]:
        total = dict.fromkeys(self._capacity, 0)
        for lease in self._leases.values():
            if lease.holder != excepted:
                for device, size in lease.memory.items():
                    total[device] = total.get(device, 0) + size
        return MappingProxyType(dict(sorted(total.items())))


def _checked(memory: Mapping[str, int]) -> Mapping[str, int]:
    """`memory` without the devices of which nothing is taken, as a mapping that cannot change."""
    if any(size < 0 for size in memory.values()):
        raise ValueError(f"memory below zero: {dict(memory)}")
    return MappingProxyType({device: size for device, size in memory.items() if size})
