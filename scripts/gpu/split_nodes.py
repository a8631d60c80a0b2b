"""The nodes of split.sh: daemons on one machine, each with its own GPU, and what they run."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prove import WORK, Lab

from bench.processes import argv_of, children_of
from meshd.cli.client import AdminClient
from meshd.errors import MeshdError

LIMIT_S = 300.0
POLL_S = 0.02
CHAT = {"messages": [{"role": "user", "content": "Say something"}], "max_tokens": 1}


class SplitNode:
    """`meshd run`; started and killed as often as one likes, with one data directory."""

    def __init__(
        self, lab: Lab, name: str, number: int, model: Path, engine_dir: str, **environ: str
    ) -> None:
        self.name = name
        self.data_dir = WORK / f"split-{name}"
        self.port = 19347 + number
        self._lab = lab
        self._model = model
        self._argv = [sys.executable, "-m", "meshd", "run", "--name", name, "--no-mdns"]
        self._argv += ["--runtime-dir", engine_dir]
        self._argv += ["--data-dir", str(self.data_dir), "--listen", f"127.0.0.1:{self.port}"]
        self._argv += ["--peer-listen", f"127.0.0.1:{19447 + number}"]
        self._environ = {**lab.environ, **environ}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *flags: str) -> float:
        """Returns when it answers; the moment of its start."""
        began = time.monotonic()
        with (WORK / f"split-{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._argv, *flags], env=self._environ, stdout=log, stderr=log
            )
        self.wait(lambda: self.status() is not None, "it answers")
        return began

    def stop(self) -> None:
        """SIGTERM, and SIGKILL after a minute."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> float:
        """SIGKILL; the moment it was sent."""
        assert self._process is not None
        killed_at = time.monotonic()
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        return killed_at

    # -- asking -----------------------------------------------------------------------------------

    @property
    def admin(self) -> AdminClient:
        return AdminClient(self.data_dir / "admin.sock")

    def invite(self) -> str:
        wanted = {"ttl_s": 3600, "uses": 1, "role": "member", "issuer": False}
        token: str = self.admin.post("/invite", wanted)["token"]
        return token

    def load(self, **wishes: Any) -> float:
        """Seconds until the model is served, from the order on."""
        began = time.monotonic()
        self.admin.post("/load", {"ref": str(self._model), "parallel": 1, **wishes})
        self.wait(lambda: self.model().get("state") == "ready", "the model is served")
        return time.monotonic() - began

    def unload(self) -> None:
        self.admin.post("/unload", {"model": self._model.stem, "drain_s": 1})
        self.wait(lambda: not self.model().get("hosts"), "the model is unloaded")

    def status(self) -> dict[str, Any] | None:
        """None while it does not answer."""
        try:
            status: dict[str, Any] = self.admin.get("/status")
        except MeshdError:
            return None
        return status

    def model(self) -> dict[str, Any]:
        """As it sees it; empty if it does not know it."""
        models = (self.status() or {}).get("models", ())
        return next((m for m in models if m["id"] == self._model.stem), {})

    def sees(self, name: str) -> bool:
        peers = (self.status() or {}).get("peers", ())
        return any(p["name"] == name and p["state"] == "alive" for p in peers)

    def plan(self) -> dict[str, Any]:
        """That of its own engine."""
        plans = [h["plan"] for h in self.model().get("hosts", ()) if h["node"] == self.name]
        return plans[0] if plans else {}

    def chat(self) -> tuple[int, str]:
        """Status and code of an error: `0` if there was no answer at all."""
        body = json.dumps({"model": self._model.stem, **CHAT})
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", body, headers)
            answer = connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            return 0, str(error)
        finally:
            connection.close()
        code = "" if answer.status == 200 else str(json.loads(text)["error"]["code"])
        return answer.status, code

    def tunnel_bytes(self) -> float:
        """What went through its tunnels so far, both ways."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        finally:
            connection.close()
        found = re.findall(r"^meshd_tunnel_bytes_total\{.*\} (\S+)$", text, re.MULTILINE)
        return sum(map(float, found))

    # -- its processes ----------------------------------------------------------------------------

    def running(self, program: str) -> list[int]:
        """Pids of its children that run `program`; of llama-servers, those that serve the model,
        for others are started to be asked or tried."""
        assert self._process is not None
        if self._process.poll() is not None:
            return []
        argvs = {pid: argv_of(pid) or ("",) for pid in children_of(self._process.pid)}
        found = {pid: argv for pid, argv in argvs.items() if program in argv[0]}
        if program == "llama-server":
            return [pid for pid, argv in found.items() if str(self._model) in argv]
        return list(found)

    def engine_socket(self) -> Path:
        """By a way that is short enough for a socket, wherever WORK is."""
        (pid,) = self.running("llama-server")
        argv = argv_of(pid)
        return Path(f"/proc/{pid}/cwd") / argv[argv.index("--host") + 1]

    def wait(
        self, condition: Callable[[], object], what: str, *, limit_s: float = LIMIT_S
    ) -> float:
        """The moment at which `condition` held. Ends the script with the log after `limit_s`."""
        until = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > until:
                log = (WORK / f"split-{self.name}.log").read_text(errors="replace")[-3000:]
                raise SystemExit(
                    f"{self._lab.table()}\n\n{self.name}: not within {limit_s:g} s: {what}\n"
                    f"{json.dumps(self.model())}\n{log}"
                )
            time.sleep(POLL_S)
        return time.monotonic()
