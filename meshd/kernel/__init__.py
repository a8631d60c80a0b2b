"""kernel: how a machine is driven, and what a service is.

May come in: the machine protocol, its driver, clocks, bounded pools, the flight recorder, small
durable files. May not come in: anything that knows what a model, a peer or a request is.
"""

from meshd.kernel.board import Board
from meshd.kernel.clock import Clock, ManualClock, MonotonicClock
from meshd.kernel.driver import Driver
from meshd.kernel.files import DirectoryLock, write_atomic
from meshd.kernel.flight import FlightRecorder
from meshd.kernel.machine import Machine
from meshd.kernel.pool import Pool
from meshd.kernel.service import Service, ServiceStack

__all__ = [
    "Board",
    "Clock",
    "DirectoryLock",
    "Driver",
    "FlightRecorder",
    "Machine",
    "ManualClock",
    "MonotonicClock",
    "Pool",
    "Service",
    "ServiceStack",
    "write_atomic",
]
