"""What is said of two readings."""

from __future__ import annotations

from dataclasses import replace

from meshd.runtime.devices import (
    DeviceBack,
    DeviceLost,
    Driver,
    DriverChanged,
    Gpu,
    GpuProcess,
    Reading,
    changes,
    told,
)
from meshd.view import DeviceView

CPU = DeviceView("A CPU", "cpu", None, 64, 48, True, None)
DRIVER = Driver("NVIDIA", "580.95.05", None)


def gpu(uuid: str | None, problem: str | None = None, name: str = "NVIDIA H200") -> Gpu:
    return Gpu(DeviceView(name, "cuda", uuid, 140, 139, False, "9.0", problem=problem), 0)


def reading(*gpus: Gpu, driver: Driver = DRIVER) -> Reading:
    return Reading(gpus, CPU, (driver, Driver("AMD", None, "not loaded")))


BOTH = reading(gpu("GPU-a"), gpu("GPU-b"))


def test_nothing_happened() -> None:
    assert changes(BOTH, BOTH) == ()
    other_order = reading(gpu("GPU-b"), gpu("GPU-a"))
    assert changes(BOTH, other_order) == ()


def test_memory_and_processes_are_no_change() -> None:
    busy = replace(
        gpu("GPU-a"),
        view=replace(gpu("GPU-a").view, memory_free_bytes=1),
        processes=(GpuProcess(1, 2, "x"),),
    )
    assert changes(reading(gpu("GPU-a")), reading(busy)) == ()


def test_one_is_not_listed_any_more() -> None:
    (lost,) = changes(BOTH, reading(gpu("GPU-a")))
    assert lost == DeviceLost(gpu("GPU-b").view, "the driver does not list NVIDIA H200 any more")


def test_one_got_a_problem() -> None:
    (lost,) = changes(BOTH, reading(gpu("GPU-a"), gpu("GPU-b", "it fell off the bus")))
    assert lost == DeviceLost(gpu("GPU-b").view, "it fell off the bus")


def test_one_cannot_even_be_named() -> None:
    nameless = gpu(None, "it fell off the bus", "NVIDIA GPU 1")
    (lost,) = changes(BOTH, reading(gpu("GPU-a"), nameless))
    assert lost == DeviceLost(gpu("GPU-b").view, "it fell off the bus")


def test_the_driver_went_away() -> None:
    gone = reading(driver=Driver("NVIDIA", None, "version mismatch"))
    first, *lost = changes(BOTH, gone)
    assert first == DriverChanged("NVIDIA", "580.95.05", None)
    assert lost == [
        DeviceLost(gpu("GPU-a").view, "version mismatch"),
        DeviceLost(gpu("GPU-b").view, "version mismatch"),
    ]
    assert [type(change) for change in changes(gone, BOTH)] == [
        DriverChanged,
        DeviceBack,
        DeviceBack,
    ]


def test_the_driver_was_updated() -> None:
    updated = reading(*BOTH.gpus, driver=replace(DRIVER, version="590.48.01"))
    assert changes(BOTH, updated) == (DriverChanged("NVIDIA", "580.95.05", "590.48.01"),)


def test_one_came_back() -> None:
    broken = reading(gpu("GPU-a", "lost"), gpu("GPU-b"))
    assert changes(broken, BOTH) == (DeviceBack(gpu("GPU-a").view),)
    assert changes(reading(gpu("GPU-b")), BOTH) == (DeviceBack(gpu("GPU-a").view),)


def test_devices_without_uuid_are_counted() -> None:
    twins = reading(gpu(None), gpu(None))
    assert changes(twins, twins) == ()
    (lost,) = changes(twins, reading(gpu(None)))
    assert isinstance(lost, DeviceLost)


def test_what_the_log_says() -> None:
    lost = DeviceLost(gpu("GPU-b").view, "it fell off the bus")
    assert told(lost) == "NVIDIA H200 (GPU-b) cannot be used any more: it fell off the bus"
    assert told(DeviceBack(gpu(None).view)) == "NVIDIA H200 can be used now"
    assert told(DriverChanged("NVIDIA", "580.95.05", None)) == (
        "NVIDIA driver: now none, before 580.95.05"
    )
