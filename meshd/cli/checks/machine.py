"""Checks of the machine: device files, limits, clock, disks."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

from meshd.cli.checks.clock import moment
from meshd.cli.checks.subject import Subject
from meshd.config import Config
from meshd.kernel.findings import Fault, NotApplicable
from meshd.sizes import format_size, parse_size_or_share

DEVICE_FILES = ("nvidia[0-9]*", "nvidiactl", "nvidia-uvm", "kfd", "dri/renderD*")
"""What CUDA, ROCm and Vulkan open."""
DATA_RESERVE_BYTES = 100_000_000
"""For logs and what the node keeps."""
OWN_FILES = 128
"""Descriptors of a node beside connections: listeners, logs, pipes of children, libraries."""
UNLIMITED = float("inf")


def device_files(subject: Subject) -> str:
    """Whether this user may open the GPUs' device files."""
    if subject.config.client:
        raise NotApplicable("a client runs no engine")
    found = [path for name in DEVICE_FILES for path in sorted(subject.around.dev.glob(name))]
    if not found:
        raise NotApplicable(f"there are no device files of a GPU in {subject.around.dev}")
    shut = [path for path in found if not os.access(path, os.R_OK | os.W_OK)]
    if shut:
        group = _group_of(shut[0])
        raise Fault(
            f"{', '.join(map(str, shut))} cannot be opened by this user",
            f"`usermod -aG {group} USER` and log in again; in a container pass the devices on, in "
            "a unit name them with DeviceAllow=",
        )
    return f"{', '.join(path.name for path in found)}: can be opened"


def limits(subject: Subject) -> str:
    """Open files, locked memory, memory of the cgroup: of the daemon if it runs, else of here.

    A node that starts may raise its soft limit, so that only the hard one is in its way.
    """
    pid = subject.daemon_pid
    path = subject.around.proc / str(pid or "self") / "limits"
    try:
        held = _limits_of(path)
        soft, hard = held["Max open files"]
    except (OSError, KeyError):
        raise NotApplicable(f"{path} does not tell them") from None
    needed = files_needed(subject.config)
    allowed = hard if pid is None else soft
    if allowed < needed:
        raise Fault(
            f"{allowed:.0f} open files are allowed{'' if pid is None else ' to the daemon'}; with "
            f"api.max_connections and peers.max_streams as they are it may need {needed}",
            f"LimitNOFILE={needed} in the unit, or `ulimit -n {needed}` before the start; or lower "
            "those settings",
        )
    locked = held.get("Max locked memory", (UNLIMITED, UNLIMITED))[0]
    if "--mlock" in subject.config.engine.extra_args and locked != UNLIMITED:
        raise Fault(
            f"engine.extra_args has --mlock, and {format_size(locked)} may be locked in memory",
            "LimitMEMLOCK=infinity in the unit, or `ulimit -l unlimited` before the start",
        )
    return (
        f"open files {_count(soft)} of {_count(hard)}, at most {needed} needed; locked memory "
        f"{'unlimited' if locked == UNLIMITED else format_size(locked)}; {_memory(subject)}"
    )


def clock(subject: Subject) -> str:
    """Whether a time service keeps it, and whether it is behind what this node wrote."""
    now = time.time()
    try:
        written = subject.config.data_dir.stat().st_mtime
    except OSError:
        written = 0.0
    if written > now + 60:
        raise Fault(
            f"it says {moment(now)}, and {subject.config.data_dir} was written {moment(written)}",
            "set the clock: certificates and invites are refused when it is wrong",
        )
    kept = subject.around.clock_is_kept()
    if kept:
        return f"{moment(now)}, kept by a time service"
    if kept is None:
        raise NotApplicable(f"{moment(now)}; the kernel does not tell whether somebody keeps it")
    if not (subject.around.run / "systemd" / "system").is_dir():
        raise NotApplicable(
            f"{moment(now)}, kept by no time service in here; that of the machine around this "
            "container is enough"
        )
    raise Fault(
        f"{moment(now)}, but no time service keeps the clock",
        "`timedatectl set-ntp true`, or install chrony: certificates and invites have dates",
    )


def disk(subject: Subject) -> str:
    """Room for weights, and for what the node writes."""
    config = subject.config
    words = []
    for path, what in ((subject.around.hub, "weights"), (config.data_dir, "data")):
        usage = shutil.disk_usage(_existing(path))
        reserve = DATA_RESERVE_BYTES
        if what == "weights":
            reserve = parse_size_or_share(config.cache.reserve, usage.total)
        if usage.free < reserve:
            raise Fault(
                f"{format_size(usage.free)} are free for {what} in {path}, less than "
                f"{format_size(reserve)} that stay free",
                "`meshd cache prune` shows what can go; or set HF_HOME to a larger disk"
                if what == "weights"
                else "make room, or name another directory with --data-dir",
            )
        words.append(f"{format_size(usage.free)} free for {what} in {path}")
    return "; ".join(words)


def files_needed(config: Config) -> int:
    """Descriptors of a node whose limits are all reached: a stream has two ends."""
    return (
        2 * config.api.max_connections
        + 2 * config.peers.max_streams
        + config.peers.max_links
        + OWN_FILES
    )


def _limits_of(path: Path) -> dict[str, tuple[float, float]]:
    """(soft, hard) by name, out of `/proc/PID/limits`."""
    found = {}
    for line in path.read_text().splitlines()[1:]:
        match = re.match(r"(Max [\w ]+?)\s{2,}(\d+|unlimited)\s+(\d+|unlimited)", line)
        if match:
            found[match[1]] = (_number(match[2]), _number(match[3]))
    return found


def _number(word: str) -> float:
    return UNLIMITED if word == "unlimited" else float(word)


def _count(number: float) -> str:
    return "unlimited" if number == UNLIMITED else f"{number:.0f}"


def _memory(subject: Subject) -> str:
    from meshd.runtime.devices import read_memory

    total, available = read_memory(subject.around.proc, subject.around.cgroups)
    if not total:
        return "memory unknown"
    return f"{format_size(available)} of {format_size(total)} of memory available, cgroups included"


def _group_of(path: Path) -> str:
    """The group that may open it."""
    import grp

    try:
        return grp.getgrgid(path.stat().st_gid).gr_name
    except (KeyError, OSError):
        return "video"


def _existing(path: Path) -> Path:
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
