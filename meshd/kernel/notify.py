"""What a service tells the manager that started it: the protocol of sd_notify(3).

One datagram of `NAME=value` lines to the unix socket whose name is in `$NOTIFY_SOCKET`; a name that
begins with `@` is in Linux's abstract namespace. There is no answer.
"""

from __future__ import annotations

import contextlib
import socket
import time

SEND_LIMIT_S = 1.0
"""A manager that does not read may hold a service up this long, and no longer."""
MICROSECONDS = 1_000_000


class Notifier:
    """Sends to `address`; without one, or with one that cannot be reached, nothing happens: nobody
    is there to be told, and a service must not end because its manager went away."""

    def __init__(self, address: str | None) -> None:
        # vsock addresses are for managers outside a virtual machine, and only for those.
        self._address = address if address and address[0] in "/@" else None

    @property
    def heard(self) -> bool:
        """Whether there is anybody to tell."""
        return self._address is not None

    def ready(self) -> None:
        """The start, or a reload, is complete."""
        self.tell("READY=1")

    def status(self, words: str) -> None:
        """One line for people; `systemctl status` shows it."""
        self.tell(f"STATUS={_one_line(words)}")

    def alive(self) -> None:
        """The watchdog's next limit runs from here."""
        self.tell("WATCHDOG=1")

    def reloading(self) -> None:
        """To be followed by `ready`, whatever came of it."""
        now = int(time.clock_gettime(time.CLOCK_MONOTONIC) * MICROSECONDS)
        self.tell("RELOADING=1", f"MONOTONIC_USEC={now}")

    def stopping(self, limit_s: float) -> None:
        """The end begins, and takes at most `limit_s` even where the unit allows less."""
        self.tell("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(limit_s * MICROSECONDS)}")

    def main_pid(self, pid: int) -> None:
        """Another process is the service from now on."""
        self.tell(f"MAINPID={pid}")

    def tell(self, *assignments: str) -> None:
        """Send `NAME=value` lines, as one message."""
        if self._address is None:
            return
        name = self._address
        target = f"\0{name[1:]}" if name.startswith("@") else name
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel,
        ):
            channel.settimeout(SEND_LIMIT_S)
            channel.sendto("\n".join(assignments).encode(), target)


def _one_line(words: str) -> str:
    """A line break would begin another assignment."""
    return " ".join(words.split())
