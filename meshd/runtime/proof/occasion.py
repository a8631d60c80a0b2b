"""When a proof has to be made again: the difference between two cheap looks. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from meshd.view import DeviceView

ASLEEP_S = 5.0
"""Seconds by which the clock that runs in suspend may lead before the machine has slept; both are
read within microseconds, and the rest is a margin for one that is stopped in a debugger."""
RETRY_S = 60.0
"""A proof that failed is tried again this often, if that is sooner than the ordinary time."""


@dataclass(frozen=True, slots=True)
class Glance:
    """What can be seen in milliseconds, every few seconds."""

    engine: str
    """Id of the engine's record."""
    unchanged: bool
    """Its files are those of the record, by size and time."""
    asleep_s: float
    """Seconds the machine has spent suspended since it was started."""
    devices: frozenset[tuple[str, str, str]]
    """(backend, uuid or name, driver version) of every device without a problem."""
    listed: tuple[str, ...] | None = None
    """The devices the engine lists, by name; None if it was not asked this time."""


def glance_at(
    engine: str,
    unchanged: bool,
    asleep_s: float,
    devices: tuple[DeviceView, ...],
    listed: tuple[str, ...] | None,
) -> Glance:
    sound = [d for d in devices if d.problem is None]
    return Glance(
        engine,
        unchanged,
        asleep_s,
        frozenset((d.backend, d.uuid or d.name, d.driver or "") for d in sound),
        listed,
    )


def occasion(
    last: Glance, now: Glance, *, age_s: float, interval_s: float, passed: bool
) -> str | None:
    """Why to prove again, in words for the log; None if nothing calls for it.

    `age_s`: of the last proof; `interval_s`: the ordinary time between two; `passed`: whether it
    did.
    """
    if now.engine != last.engine:
        return f"the engine is another one: {now.engine}"
    if now.unchanged != last.unchanged:
        return "files of the engine have changed"
    if now.asleep_s - last.asleep_s > ASLEEP_S:
        return f"the machine was suspended for {now.asleep_s - last.asleep_s:.0f} s"
    gone, come = last.devices - now.devices, now.devices - last.devices
    if gone or come:
        return _devices(gone, come)
    if None not in (last.listed, now.listed) and now.listed != last.listed:
        return f"the engine now lists {', '.join(now.listed or ()) or 'no device'}"
    if age_s >= (interval_s if passed else min(interval_s, RETRY_S)):
        return f"{age_s:.0f} s have passed since the last proof"
    return None


def _devices(gone: frozenset[tuple[str, str, str]], come: frozenset[tuple[str, str, str]]) -> str:
    drivers = {(b, n): driver for b, n, driver in come}
    for backend, name, driver in sorted(gone):
        if (backend, name) in drivers:
            return f"the driver of {name} is now {drivers[backend, name]}, it was {driver}"
        return f"{backend} device {name} is gone"
    return f"{sorted(come)[0][0]} device {sorted(come)[0][1]} is there again"
