"""The checks of `meshd doctor`: this machine and its node, whether or not it runs."""

from __future__ import annotations

import http.client
import os
import socket
from collections.abc import Callable
from typing import Any

from meshd.cli.client import AdminClient
from meshd.config import Config, split_address
from meshd.errors import DaemonNotRunning, MeshdError
from meshd.kernel.findings import Fault, Finding, NotApplicable, Verdict

ANSWER_S = 3.0


def examine(config: Config, tell: Callable[[Finding], None] = lambda _: None) -> list[Finding]:
    """Every check, in order; `tell` gets each as it is known. Writes nothing but what a start of
    the node would (the memory of a probed engine)."""
    checkup = _Checkup(config)
    findings: list[Finding] = []
    for step, look in (
        ("data", checkup.data_directory),
        ("engine", checkup.engine),
        ("daemon", checkup.daemon),
        ("api port", checkup.api_port),
        ("peer port", checkup.peer_port),
        ("mesh", checkup.mesh),
    ):
        findings.append(_outcome(step, look))
        tell(findings[-1])
    return findings


def _outcome(step: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(step, Verdict.PASSED, look())
    except NotApplicable as reason:
        return Finding(step, Verdict.SKIPPED, str(reason))
    except Fault as fault:
        return Finding(step, Verdict.FAILED, fault.evidence, fault.remedy)


class _Checkup:
    def __init__(self, config: Config) -> None:
        self._config = config
        self._status: dict[str, Any] | None = None

    def data_directory(self) -> str:
        path = self._config.data_dir
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

    def engine(self) -> str:
        if self._config.client:
            raise NotApplicable("a client runs none")
        from meshd.runtime.registry import Registry

        try:
            record = Registry(self._config.cache_dir).find(self._config.runtime_dir)
        except MeshdError as error:
            raise Fault(
                error.message,
                "`meshd runtime build --backend cpu`, or --runtime-dir with binaries that run here",
            ) from None
        proof = record.to_view().proof
        if not proof.passed:
            last = proof.evidence[-1] if proof.evidence else "the probe did not pass"
            raise Fault(f"{record.id}: {last}", f"`meshd runtime verify {record.id}`")
        return f"{record.id}: {record.version}, proof {proof.level}"

    def daemon(self) -> str:
        path = self._config.admin_socket
        try:
            self._status = AdminClient(path, timeout_s=ANSWER_S).get("/status")
        except DaemonNotRunning as error:
            if path.exists() and not os.access(path, os.W_OK):
                raise Fault(error.message, "run this as the user of the daemon") from None
            raise NotApplicable("meshd does not run on this data directory") from None
        except MeshdError as error:
            raise Fault(error.message, "see `meshd logs`, and start it again") from None
        node = self._status["node"]
        return f"{node['name']} {node['state']}, meshd {node['version']}"

    def api_port(self) -> str:
        if self._status is None:
            return self._free("listen", self._config.listen)
        address = self._status["node"]["listen"]
        host, port = _reachable(address)
        connection = http.client.HTTPConnection(host, port, timeout=ANSWER_S)
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

    def peer_port(self) -> str:
        if self._status is None:
            return self._free("peer-listen", self._config.peer_listen)
        address = self._status["node"]["peer_listen"]
        if address is None:
            raise NotApplicable("not open yet")
        try:
            socket.create_connection(_reachable(address), timeout=ANSWER_S).close()
        except OSError as error:
            raise Fault(f"{address} does not answer: {error}", "see `meshd logs`") from None
        return f"{address} answers; from another machine: `meshd doctor --peer`"

    def mesh(self) -> str:
        if self._status is None:
            raise NotApplicable("meshd does not run")
        mesh = self._status["mesh"]
        state = mesh.get("state", "member")
        if state == "none":
            raise NotApplicable(mesh.get("reason") or "in none")
        if state != "member":
            raise Fault(
                f"{mesh['name']}: {state}, {mesh.get('reason') or 'no reason is known'}",
                "see `meshd status`; `meshd doctor --peer HOST:PORT` looks at the way to a member",
            )
        return f"{mesh['name']}, {mesh['alive']} of {mesh['members']} nodes alive"

    def _free(self, flag: str, address: str) -> str:
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


def _reachable(address: str) -> tuple[str, int]:
    """Where this machine reaches what listens at `address`."""
    host, port = split_address(address)
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port
