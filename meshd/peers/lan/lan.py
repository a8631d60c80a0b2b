"""Multicast DNS on the LAN: sockets, an announcement, and what others announce.

Every table that others feed is capped, with the policy beside the number.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from meshd.config import split_address
from meshd.peers.lan.announcement import (
    SERVICE_TYPE,
    Announcement,
    Found,
    dialable,
    properties_of,
    read_service,
)

if TYPE_CHECKING:
    from zeroconf import ServiceStateChange, Zeroconf
    from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

log = logging.getLogger(__name__)

RESOLVE_S: Final = 2.0
CLOSE_S: Final = 1.0
MAX_FOUND: Final = 256
MAX_RESOLVING: Final = 16
"""Services whose records are being asked for. Full-policy: one more is dropped; whoever announces
names without records would otherwise make this node ask for ever."""


class Lan:
    """One set of multicast sockets: browses from the start, announces what it is told to.

    Raises what `trouble` names if there are no sockets to be had. `only_here`: on loopback only,
    for nodes that nobody else can reach.
    """

    def __init__(
        self,
        heard: Callable[[str, Found], None],
        forgotten: Callable[[str], None] = lambda _: None,
        *,
        only_here: bool = False,
    ) -> None:
        from zeroconf.asyncio import AsyncServiceBrowser

        self.only_here = only_here
        self._heard = heard
        self._forgotten = forgotten
        self._tasks: set[asyncio.Future[None]] = set()
        self._resolving: set[str] = set()
        self._announced: tuple[Announcement, AsyncServiceInfo] | None = None
        # Its own complaints are about single packets and interfaces; ours say what it means.
        logging.getLogger("zeroconf").setLevel(logging.ERROR)
        self._zeroconf = _open_sockets(only_here)
        self._browser: AsyncServiceBrowser = AsyncServiceBrowser(
            self._zeroconf.zeroconf, SERVICE_TYPE, handlers=[self._changed]
        )

    async def announce(self, announcement: Announcement | None) -> None:
        """Announce this, in place of what was announced before."""
        before = self._announced
        if before is not None and announcement == before[0]:
            return
        info = None if announcement is None else _service_info(announcement)
        if before is not None and (info is None or info.name != before[1].name):
            self._announced = None
            self._finish(await self._zeroconf.async_unregister_service(before[1]))
            before = None
        if announcement is None or info is None:
            return
        self._announced = (announcement, info)
        if before is not None:
            self._finish(await self._zeroconf.async_update_service(info))
            return
        # "Cooperating": a record of this name on the LAN is our own, of the last run.
        self._finish(await self._zeroconf.async_register_service(info, cooperating_responders=True))

    async def follow_interfaces(self) -> None:
        """Open and close sockets as interfaces came and went."""
        if not self.only_here:
            await self._zeroconf.async_update_interfaces()

    async def close(self) -> None:
        """Say goodbye and close, in `CLOSE_S` at most."""
        for task in tuple(self._tasks):
            task.cancel()
        with suppress(*trouble()):
            async with asyncio.timeout(CLOSE_S / 2):
                await self._browser.async_cancel()
                await self._zeroconf.async_unregister_all_services()
        with suppress(*trouble()):
            async with asyncio.timeout(CLOSE_S / 2):
                await self._zeroconf.async_close()

    # -- its own ----------------------------------------------------------------------------------

    def _changed(
        self,
        zeroconf: Zeroconf,
        service_type: str,
        name: str,
        state_change: ServiceStateChange,
    ) -> None:
        """Called by the browser, with these names."""
        from zeroconf import ServiceStateChange
        from zeroconf.asyncio import AsyncServiceInfo

        if state_change is ServiceStateChange.Removed:
            self._forgotten(name)
            return
        info = AsyncServiceInfo(service_type, name)
        if info.load_from_cache(zeroconf):
            self._read(info)
        elif len(self._resolving) < MAX_RESOLVING and name not in self._resolving:
            self._resolving.add(name)
            task = asyncio.create_task(self._resolve(info), name="discovery:resolve")
            task.add_done_callback(lambda _: self._resolving.discard(name))
            self._keep(task)

    async def _resolve(self, info: AsyncServiceInfo) -> None:
        with suppress(*trouble()):
            if await info.async_request(self._zeroconf.zeroconf, RESOLVE_S * 1000):
                self._read(info)

    def _read(self, info: AsyncServiceInfo) -> None:
        found = read_service(info.properties, info.port, info.parsed_addresses())
        if found is not None:
            self._heard(info.name, found)

    def _finish(self, sending: Awaitable[None]) -> None:
        """Let the repeats of an announcement go out while other things happen."""
        self._keep(asyncio.ensure_future(sending))

    def _keep(self, task: asyncio.Future[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Future[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("multicast DNS: %s", error)


async def find(
    matches: Callable[[Found], bool], timeout_s: float, *, enough: int = MAX_FOUND
) -> list[Found]:
    """Services on the LAN that match, heard within `timeout_s`; sooner if `enough` are.

    For commands: opens sockets of its own. Raises OSError if multicast cannot be used.
    """
    results: dict[str, Found] = {}
    done = asyncio.Event()

    def heard(instance: str, found: Found) -> None:
        if matches(found) and len(results) < MAX_FOUND:
            results[instance] = found
            if len(results) >= enough:
                done.set()

    try:
        lan = Lan(heard)
    except trouble() as error:
        raise OSError(str(error)) from None
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await done.wait()
    finally:
        await lan.close()
    return sorted(results.values(), key=lambda f: f.node_id)


async def find_mesh(name: str, timeout_s: float) -> list[Found]:
    """Members, on the LAN, of any mesh of that name. Raises OSError if multicast cannot be used."""
    return await find(lambda found: found.mesh_name == name, timeout_s)


def _service_info(announcement: Announcement) -> AsyncServiceInfo:
    from zeroconf.asyncio import AsyncServiceInfo

    label = announcement.node_id[:16]
    hosts = dict.fromkeys(split_address(address)[0] for address in announcement.addresses)
    return AsyncServiceInfo(
        SERVICE_TYPE,
        f"{label}.{SERVICE_TYPE}",
        port=announcement.port,
        properties=properties_of(announcement),
        server=f"meshd-{label}.local.",
        parsed_addresses=[host for host in hosts if dialable(host)],
    )


def _open_sockets(only_here: bool) -> AsyncZeroconf:
    """Sockets of both families; of one, where a machine lacks the other."""
    from zeroconf import InterfaceChoice, IPVersion
    from zeroconf.asyncio import AsyncZeroconf

    if only_here:
        return AsyncZeroconf(interfaces=["127.0.0.1"])
    problem: Exception = OSError("there is no interface")
    for version in (IPVersion.All, IPVersion.V4Only, IPVersion.V6Only):
        try:
            return AsyncZeroconf(interfaces=InterfaceChoice.All, ip_version=version)
        except trouble() as error:
            problem = error
    raise problem


def trouble() -> tuple[type[Exception], ...]:
    """What multicast may fail with. RuntimeError: the library's word for a missing interface."""
    from zeroconf import Error

    return (OSError, RuntimeError, Error)  # OSError: TimeoutError is one
