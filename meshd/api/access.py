"""Who may use the API: the key, and the names under which this node may be called.

A page in a browser must not reach a node on its visitor's machine. Two checks see to it: `Host`
must be an IP literal, localhost, the node's own name or one that was allowed (a rebinding attack
needs a name of its own), and `Origin`, if there is one, the same host or one that was allowed.
"""

from __future__ import annotations

import hmac
import ipaddress

from meshd.config import Config
from meshd.errors import HostNotAllowed, Unauthorized

REMEMBERED_HOSTS = 256

OPEN_PATHS = frozenset(("/livez", "/readyz"))
"""What a load balancer may ask without the key."""


class Access:
    def __init__(self, config: Config) -> None:
        self._key: bytes | None = None
        self.use_key(config.api_key)
        names = {"localhost", config.name.lower(), f"{config.name.lower()}.local"}
        self._names = names | {name.lower() for name in config.api.allowed_hosts}
        self._origins = frozenset(o.lower().rstrip("/") for o in config.api.allowed_origins)
        self._good_hosts: set[bytes] = set()

    def use_key(self, key: str | None) -> None:
        """From now on requests need this key; None: they need none."""
        self._key = None if key is None else key.encode()

    def check_host(self, host: bytes) -> None:
        """Raises HostNotAllowed."""
        if host in self._good_hosts:
            return
        name = host_name(host)
        if name is None or not (name in self._names or _is_address(name)):
            raise HostNotAllowed(
                f"this node does not answer to the host name `{host[:256].decode('latin-1')}`; "
                "use its IP address or localhost, or add the name to `api.allowed_hosts`"
            )
        if len(self._good_hosts) < REMEMBERED_HOSTS:
            self._good_hosts.add(host)

    def check_key(self, authorization: bytes | None, x_api_key: bytes | None) -> None:
        """Raises Unauthorized unless one of the two headers carries the key, if one is set."""
        key = self._key
        if key is None:
            return
        if authorization is not None and authorization[:7].lower() == b"bearer ":
            given: bytes | None = authorization[7:].strip()
        else:
            given = x_api_key
        if given is None or not hmac.compare_digest(given, key):
            what = "no" if given is None else "the wrong"
            raise Unauthorized(
                f"the request has {what} API key; send the one this node was started with as "
                "`Authorization: Bearer KEY`"
            )

    def check_origin(self, origin: str, host: str) -> bool:
        """Whether answers need CORS headers; raises HostNotAllowed for a foreign page."""
        normal = origin.lower().rstrip("/")
        if normal.partition("://")[2] == host.lower():
            return False
        if normal in self._origins or "*" in self._origins:
            return True
        raise HostNotAllowed(
            f"pages of `{origin[:256]}` may not use this node; add it to `api.allowed_origins`"
        )


def host_name(host: bytes) -> str | None:
    """The name in a `Host` header, without port and brackets, in lower case; None if malformed."""
    text = host.decode("latin-1").strip().lower()
    if text.startswith("["):
        name, bracket, port = text[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            return None
        port = port[1:]
    else:
        name, _, port = text.partition(":")
    if port and not port.isdigit():
        return None
    return name.rstrip(".") or None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
