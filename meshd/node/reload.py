"""What SIGHUP changes in a node that runs. Pure.

Only what can change without anybody noticing: how much is logged, and the API key. Everything else
has machines, sockets or promises to other nodes behind it, and waits for a restart; it is named.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshd.config import Config, check_exposure

RELOADED = ("log_level", "api_key", "api_key_file")


@dataclass(frozen=True, slots=True)
class Reload:
    config: Config
    """What the node runs with from now on."""
    changed: tuple[str, ...]
    waiting: tuple[str, ...]
    """Keys that differ and need a restart."""

    def words(self) -> str:
        """Names of keys, never their values: some are secrets."""
        done = f"changed {', '.join(self.changed)}" if self.changed else "nothing has changed"
        return f"{done}; after a restart: {', '.join(self.waiting)}" if self.waiting else done


def reload(running: Config, wanted: Config) -> Reload:
    """Raises BadConfig if the node, on the address it listens on now, could be used by strangers
    without a key."""
    config = running.model_copy(update={key: getattr(wanted, key) for key in RELOADED})
    check_exposure(config)
    differing = [k for k in Config.model_fields if getattr(running, k) != getattr(wanted, k)]
    return Reload(
        config,
        changed=tuple(key for key in differing if key in RELOADED),
        waiting=tuple(key for key in differing if key not in RELOADED),
    )
