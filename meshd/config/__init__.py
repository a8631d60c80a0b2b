"""Configuration: what can be set, where it comes from, what the environment says.

Only this package reads the environment.
"""

from meshd.config.addresses import is_address, is_invite, is_loopback, masked, split_address
from meshd.config.environment import (
    environment_of_children,
    hub_cache_dir,
    notify_socket,
    under_journal,
    user_config_dir,
    watchdog_limit_s,
)
from meshd.config.loading import Loaded, check_exposure, known_keys, load
from meshd.config.settings import NAME_PATTERN, ApiSettings, Config, EngineSettings, PeerSettings

__all__ = [
    "NAME_PATTERN",
    "ApiSettings",
    "Config",
    "EngineSettings",
    "Loaded",
    "PeerSettings",
    "check_exposure",
    "environment_of_children",
    "hub_cache_dir",
    "is_address",
    "is_invite",
    "is_loopback",
    "known_keys",
    "load",
    "masked",
    "notify_socket",
    "split_address",
    "under_journal",
    "user_config_dir",
    "watchdog_limit_s",
]
