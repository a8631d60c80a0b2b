"""Checks of the node: its directory, its daemon, its ports, its models."""

from __future__ import annotations

import http.client
import os
import platform
import socket
from collections import Counter

from meshd import __version__
from meshd.cli.checks.subject import Subject
from meshd.config import split_address
from meshd.errors import DaemonNotRunning, MeshdError
from meshd.kernel.findings import Fault, NotApplicable


def data_directory(subject: Subject) -> str:
    path = subject.config.data_dir
    if not path.exists():
        raise NotApplicable(f"{path} is not there yet; the first start makes it")
    if not path.is_dir() or not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise Fault(
            f"{path} cannot be written by this user",
            "run this as the user of the daemon, or name another directory with --data-dir",
        )
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise Fault(f"{path} is open to others (mode {mode:o})", f"chmod 700 {path}")
    return f"{path}, mode {mode:o}"


def daemon(subject: Subject) -> str:
    answer, path = subject.answer, subject.config.admin_socket
    if isinstance(answer, DaemonNotRunning):
        if path.exists() and not os.access(path, os.W_OK):
            raise Fault(answer.message, "run this as the user of the daemon")
        raise NotApplicable("meshd does not run on this data directory")
    if isinstance(answer, MeshdError):
        raise Fault(answer.message, "see `meshd logs`, and start it again")
    node = answer["node"]
    return f"{node['name']} {node['state']}, meshd {node['version']}"


def version(subject: Subject) -> str:
    """Of this command, and whether the daemon is the same."""
    here = f"meshd {__version__}, Python {platform.python_version()}, {platform.machine()}"
    if subject.status is None:
        return here
    running = subject.status["node"]["version"]
    if running != __version__:
        raise Fault(
            f"this command is meshd {__version__}, the daemon runs {running}",
            "restart the daemon, or use the command it was started with",
        )
    return f"{here}; the daemon runs the same"


def api_port(subject: Subject) -> str:
    if subject.status is None:
        return _free("listen", subject.config.listen)
    address = subject.status["node"]["listen"]
    host, port = reachable(address)
    connection = http.client.HTTPConnection(host, port, timeout=subject.around.answer_s)
    try:
        connection.request("GET", "/livez")
        answered = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise Fault(f"http://{address} does not answer: {error}", "see `meshd logs`") from None
    finally:
        connection.close()
    if answered != 200:
        raise Fault(f"http://{address}/livez answers {answered}", "see `meshd logs`")
    return f"http://{address}/v1 answers"


def peer_port(subject: Subject) -> str:
    if subject.status is None:
        return _free("peer-listen", subject.config.peer_listen)
    address = subject.status["node"]["peer_listen"]
    if address is None:
        raise NotApplicable("not open yet")
    try:
        socket.create_connection(reachable(address), timeout=subject.around.answer_s).close()
    except OSError as error:
        raise Fault(f"{address} does not answer: {error}", "see `meshd logs`") from None
    return f"{address} answers; from another machine: `meshd doctor --peer`"


def models(subject: Subject) -> str:
    """States of the models the mesh serves; one that failed is a fault."""
    known = subject.running()["models"]
    if not known:
        raise NotApplicable("there are none")
    failed = [model for model in known if model["state"] == "failed"]
    if failed:
        told = "; ".join(f"{m['id']}: {m['reason'] or 'no reason is known'}" for m in failed)
        raise Fault(told, f"`meshd logs {failed[0]['id']}` has the engine's own words")
    counts = Counter(model["state"] for model in known)
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))


def reachable(address: str) -> tuple[str, int]:
    """Where this machine reaches what listens at `address`."""
    host, port = split_address(address)
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port


def _free(flag: str, address: str) -> str:
    host, port = split_address(address)
    if port == 0:
        return f"{address}: the system will choose"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise Fault(
                f"{address} cannot be opened: {(error.strerror or str(error)).lower()}",
                f"stop what uses it, or choose another with --{flag}",
            ) from None
    return f"{address} is free"
