"""What happened to the devices between two readings."""

from __future__ import annotations

from dataclasses import dataclass

from meshd.runtime.devices.reading import Reading
from meshd.view import DeviceView


@dataclass(frozen=True, slots=True)
class DeviceLost:
    """It could be used before and cannot be now."""

    device: DeviceView
    """As it was when it could be used."""
    reason: str


@dataclass(frozen=True, slots=True)
class DeviceBack:
    """It can be used now and could not before: repaired, plugged in, or made (a MIG instance)."""

    device: DeviceView


@dataclass(frozen=True, slots=True)
class DriverChanged:
    """Another version of a driver answers, or it began or ceased to tell its version."""

    vendor: str
    before: str | None
    now: str | None


Change = DeviceLost | DeviceBack | DriverChanged


def changes(old: Reading, new: Reading) -> tuple[Change, ...]:
    """Drivers first, then devices in the order of their reading; nothing if all is as it was.

    Free memory and processes are no change. A device is the same by its uuid; without one, by its
    backend, its name and its place among those of that name.
    """
    versions = {driver.vendor: driver.version for driver in new.drivers}
    drivers = [
        DriverChanged(driver.vendor, driver.version, versions[driver.vendor])
        for driver in old.drivers
        if driver.vendor in versions and driver.version != versions[driver.vendor]
    ]
    before, now = _usable(old), _usable(new)
    lost = [DeviceLost(d, _why(d, new)) for key, d in before.items() if key not in now]
    back = [DeviceBack(device) for key, device in now.items() if key not in before]
    return (*drivers, *lost, *back)


def told(change: Change) -> str:
    """The change as a line for people."""
    match change:
        case DeviceLost(device, reason):
            return f"{_called(device)} cannot be used any more: {reason}"
        case DeviceBack(device):
            return f"{_called(device)} can be used now"
        case DriverChanged(vendor, before, now):
            return f"{vendor} driver: now {now or 'none'}, before {before or 'none'}"


def _called(device: DeviceView) -> str:
    return f"{device.name} ({device.uuid})" if device.uuid else device.name


def _usable(reading: Reading) -> dict[tuple[str, ...], DeviceView]:
    found: dict[tuple[str, ...], DeviceView] = {}
    seen: dict[tuple[str, str], int] = {}
    for gpu in reading.gpus:
        view = gpu.view
        place = seen.get((view.backend, view.name), 0)
        seen[view.backend, view.name] = place + 1
        if view.problem is None:
            found[(view.uuid,) if view.uuid else (view.backend, view.name, str(place))] = view
    return found


def _why(device: DeviceView, now: Reading) -> str:
    """The first of: the problem of the device itself; the driver's, if none of its devices can be
    used; that of a device of its kind that cannot even be named; that nobody lists it."""
    alike = [gpu.view for gpu in now.gpus if gpu.view.backend == device.backend]
    for view in alike:
        if device.uuid is not None and view.uuid == device.uuid and view.problem is not None:
            return view.problem
    driver = now.driver_of(device.backend)
    if driver is not None and driver.problem is not None and all(v.problem for v in alike):
        return driver.problem
    for view in alike:
        if view.uuid is None and view.problem is not None:
            return view.problem
    return f"the driver does not list {device.name} any more"
