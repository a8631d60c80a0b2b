"""Devices of this machine, and who says so: the drivers, the bus, the engine's own binary.

`take_reading` asks the drivers and is what a timer repeats; `changes` compares two readings;
`parse_list` reads what an engine lists; `agree` puts both words side by side. What is not told is
not guessed, and what is told twice is compared, never averaged.
"""

from meshd.runtime.devices.agreement import agree
from meshd.runtime.devices.changes import (
    Change,
    DeviceBack,
    DeviceLost,
    DriverChanged,
    changes,
    told,
)
from meshd.runtime.devices.cpu import read_memory
from meshd.runtime.devices.engine_list import EngineDevice, EngineList, parse_list
from meshd.runtime.devices.machine import read_devices, take_reading
from meshd.runtime.devices.memory_speed import measure_memory_speed
from meshd.runtime.devices.reading import Driver, Gpu, GpuProcess, Reading

__all__ = [
    "Change",
    "DeviceBack",
    "DeviceLost",
    "Driver",
    "DriverChanged",
    "EngineDevice",
    "EngineList",
    "Gpu",
    "GpuProcess",
    "Reading",
    "agree",
    "changes",
    "measure_memory_speed",
    "parse_list",
    "read_devices",
    "read_memory",
    "take_reading",
    "told",
]
