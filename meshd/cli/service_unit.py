"""The unit file of this meshd: which program it starts, and whether a service could."""

from __future__ import annotations

import importlib.resources
import os
import stat
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

Scope = Literal["system", "user"]

UNIT = "meshd.service"
GPU_GROUPS = ("video", "render")
"""Who may open /dev/dri and /dev/kfd; not every machine has both."""
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")
"""What ProtectHome and PrivateTmp keep from the system service."""


def unit_text(scope: Scope, command: Sequence[str], groups: Iterable[str] = ()) -> str:
    """The unit that runs `command` followed by `run`; `groups`: which of GPU_GROUPS exist."""
    template = importlib.resources.files("meshd.cli") / "units" / f"{scope}.service"
    names = " ".join(groups)
    return (
        template.read_text(encoding="utf-8")
        .replace("@MESHD@", " ".join(map(quoted, command)))
        .replace("@GROUPS@\n", f"SupplementaryGroups={names}\n" if names else "")
    )


def quoted(word: str) -> str:
    """One word of a command line in a unit file; see "Command lines" in systemd.service(5)."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if any(c.isspace() or c in "\"';\\" for c in word) else escaped


def own_command() -> list[str]:
    """What starts the meshd that runs now, wherever the shell may find another one."""
    script = Path(sys.executable).with_name("meshd")
    if script.is_file() and os.access(script, os.X_OK):
        return [str(script)]
    return [sys.executable, "-P", "-m", "meshd"]


def program_paths() -> list[Path]:
    """What has to be readable to start it: the command, the interpreter, the code."""
    import meshd

    return [Path(own_command()[0]), Path(sys.base_prefix), Path(meshd.__file__)]


def why_unreachable(path: Path) -> str | None:
    """Why the system service, which is another user, cannot use `path`; None if it can."""
    for place in (path.absolute(), path.resolve()):
        for hidden in HIDDEN:
            if place.is_relative_to(hidden):
                return f"{place} lies below {hidden}, which the service does not see"
        for step in (place, *place.parents):
            try:
                mode = step.stat().st_mode
            except OSError as error:
                return f"{step}: {error.strerror}"
            wanted = stat.S_IXOTH if stat.S_ISDIR(mode) else stat.S_IROTH
            if not mode & wanted:
                return f"{step} is closed to other users"
    return None
