"""The store huggingface_hub shares between repositories: `<hub>/blobs/<xx>/<hash>`. Blocking.

Where it is in use, a repository's blob is a link into it. Beside each payload lie its lock and a
list of the links to it, relative to the hub, one a line; huggingface_hub writes a line before it
makes the link, and takes none out when the link goes. So a payload may go when the list is there,
can be read, and no link of it leads to the payload any more. What is in doubt stays.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Final

from meshd.cache.locks import try_lock

MARKER: Final = ".huggingface-shared-blobs"
LAYOUT: Final = "1"
"""The only layout that is known; another is left alone."""
SHARED_LOCK_MODE: Final = 0o666
MAX_LIST_BYTES: Final = 4 * 1024 * 1024

_PAYLOAD = re.compile(r"([0-9a-f]{2})/(\1[0-9a-f]{62})")


def payload_of(blob: Path, hub: Path) -> Path | None:
    """Where in the shared store the link `blob` leads, None if it is no such link."""
    try:
        target = os.path.normpath(blob.parent / blob.readlink())
    except OSError:
        return None  # not there, or no link
    store = os.path.normpath(hub / "blobs")
    if not target.startswith(f"{store}/") or not _PAYLOAD.fullmatch(target[len(store) + 1 :]):
        return None
    return Path(target)


def bytes_of(blob: Path, hub: Path) -> Path:
    """Where the bytes of a blob lie: in it, or in the store."""
    return payload_of(blob, hub) or blob


def sweep(payload: Path, hub: Path) -> int:
    """Remove `payload` (of `payload_of`) if nothing links to it any more; the bytes it took.

    0 if it stays: it is linked, its list is missing, it is locked, or it cannot be removed.
    """
    links = payload.with_name(f"{payload.name}.refs")
    try:
        if (hub / "blobs" / MARKER).read_text().strip() != LAYOUT:
            return 0
        with try_lock(payload.with_name(f"{payload.name}.lock"), mode=SHARED_LOCK_MODE) as held:
            status = payload.lstat()
            if not held or not stat.S_ISREG(status.st_mode) or _is_linked(payload, links, hub):
                return 0
            payload.unlink()
            links.unlink(missing_ok=True)
    except (OSError, UnicodeDecodeError):
        return 0
    return status.st_size


def _is_linked(payload: Path, links: Path, hub: Path) -> bool:
    """Raises OSError if there is no list."""
    if links.stat().st_size > MAX_LIST_BYTES:
        return True
    candidates = (hub / line for line in links.read_text().splitlines())
    return any(payload_of(candidate, hub) == payload for candidate in candidates)
