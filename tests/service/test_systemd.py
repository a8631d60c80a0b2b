"""`meshd service install --system` on a booted Debian 12, as the documentation types it.

The tests are one story, in this order, of one machine: install, use, harm, reboot, uninstall. A
second node in the container, which systemd merely starts, is the rest of the mesh.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from typing import Any

import pytest

from tests.conftest import wait_until
from tests.service.machine import ENGINE, MESHD, Machine

pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.timeout(420)]

DATA = "/var/lib/meshd"
OTHER_DATA = "/var/lib/other"
API = "http://127.0.0.1:9337"
EXPOSURE_LIMIT = 4.0
WATCHDOG_S, ABORT_S, RESTART_S = 30.0, 10.0, 2.0
"""As in the unit file."""
START_S = 20.0
DRAIN_S = 90.0
"""A busy machine takes long for the stream of a test."""

OTHER_UNIT = f"""\
[Service]
Environment=HOME=/root
ExecStart={MESHD} run --name other --mesh home --no-mdns --data-dir {OTHER_DATA} \\
  --listen 127.0.0.1:9437 --peer-listen 127.0.0.1:9438 --advertise 127.0.0.1:9438
[Install]
WantedBy=multi-user.target
"""
ENVIRONMENT = f"""\
MESHD_JOIN={{token}}
MESHD_MODEL=builtin
MESHD_MDNS=false
MESHD_RUNTIME_DIR={ENGINE}
MESHD_ENGINE__THREADS=1
MESHD_DRAIN_S={DRAIN_S:.0f}
MESHD_PEER_LISTEN=127.0.0.1:9338
MESHD_ADVERTISE=127.0.0.1:9338
"""
STREAM = f"""\
import json, urllib.request
body = {{"model": "builtin", "stream": True, "max_tokens": 3000, "ignore_eos": True,
        "messages": [{{"role": "user", "content": "x"}}]}}
request = urllib.request.Request("{API}/v1/chat/completions", json.dumps(body).encode(),
                                 {{"Content-Type": "application/json"}})
for line in urllib.request.urlopen(request, timeout=120):
    if line.startswith(b"data: "):
        print(line[6:].decode().strip(), flush=True)
"""
"""Prints the events of a long answer as they come."""


class Node:
    """The installed service, as its machine sees it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def systemd(self) -> dict[str, Any]:
        """`meshd service status --json`."""
        said = self.machine.run(MESHD, "service", "status", "--json", check=False).stdout
        state: dict[str, Any] = json.loads(said)
        return state

    def status(self) -> dict[str, Any]:
        said = self.machine.run(MESHD, "status", "--json", "--data-dir", DATA, check=False).stdout
        status: dict[str, Any] = json.loads(said) if said else {}
        return status

    def pid(self) -> int:
        return int(self.systemd()["pid"] or 0)

    def processes(self) -> dict[int, str]:
        """All there are of the user meshd: number and command line."""
        listed = self.machine.run("ps", "-o", "pid=,args=", "-u", "meshd", check=False).stdout
        return {int(line.split()[0]): line for line in listed.splitlines()}

    def engines(self) -> set[int]:
        return {pid for pid, args in self.processes().items() if "--alias" in args}

    def model_state(self) -> str:
        models = self.status().get("models", ())
        return next((m["state"] for m in models if m["id"] == "builtin"), "")

    def in_mesh(self) -> bool:
        """Whether it sees the other node alive, in the mesh that one founded."""
        status = self.status()
        peers = {peer["name"]: peer["state"] for peer in status.get("peers", ())}
        return bool(status and status["mesh"]["name"] == "home" and peers == {"other": "alive"})

    def wait_serving(self, timeout_s: float = 60.0) -> None:
        wait_until(
            lambda: self.model_state() == "ready" and self.in_mesh(),
            timeout_s=timeout_s,
            what=f"a model and a mesh; {self.journal()}",
        )

    def wait_other_process(self, than: int, timeout_s: float) -> float:
        """Seconds until another process is the service, and active."""
        began = time.monotonic()

        def changed() -> bool:
            now = self.systemd()
            return now["state"] == "active" and now["pid"] not in (None, than)

        wait_until(changed, timeout_s=timeout_s, what=f"a restart; {self.journal()}")
        return time.monotonic() - began

    def journal(self) -> str:
        return self.machine.run(
            *("journalctl", "-u", "meshd", "-o", "cat", "-n", "200", "--no-pager"), check=False
        ).stdout

    def get(self, path: str) -> int:
        """Status of an answer of the API; 0 if there is none."""
        code = (
            "import sys, urllib.request, urllib.error\n"
            f"try: print(urllib.request.urlopen('{API}{path}', timeout=5).status)\n"
            "except urllib.error.HTTPError as error: print(error.code)\n"
            "except OSError: print(0)\n"
        )
        return int(self.machine.run("python3", "-c", code).stdout)


@pytest.fixture(scope="module")
def node(machine: Machine) -> Node:
    """Installed, told by the environment file to join the other one and to load a model."""
    units = machine.root / "etc/systemd/system"
    (units / "other.service").write_text(OTHER_UNIT)
    machine.run("systemctl", "enable", "--now", "other")
    invite = (MESHD, "invite", "--json", "--data-dir", OTHER_DATA)
    wait_until(
        lambda: machine.run(*invite, check=False).returncode == 0, timeout_s=30, what="an invite"
    )
    token = json.loads(machine.run(*invite).stdout)["token"]
    secrets = machine.root / "etc/meshd/environment"
    secrets.parent.mkdir()
    secrets.write_text(ENVIRONMENT.format(token=token))
    secrets.chmod(0o600)
    machine.run(MESHD, "service", "install", "--system")
    return Node(machine)


def test_active_means_that_it_listens(node: Node) -> None:
    """`install` came back when systemd called it active. The port for other nodes opens when it
    has been let in, which a start does not wait for; later starts find it in its mesh."""
    assert "127.0.0.1:9337" in node.machine.run("ss", "-Hltn").stdout
    said = node.systemd()
    assert (said["state"], said["enabled"]) == ("active", True)
    assert said["words"].startswith("ready; ")
    node.wait_serving()
    assert "1 of 1 models ready; 1 other node alive" in node.systemd()["words"]

    node.machine.run("systemctl", "restart", "meshd")
    listening = node.machine.run("ss", "-Hltn").stdout
    assert "127.0.0.1:9337" in listening
    assert "127.0.0.1:9338" in listening
    journal = node.journal()
    assert 0 <= journal.rfind("API listens") < journal.rfind("Started meshd")
    assert node.get("/readyz") == 200


def test_it_is_not_active_while_it_cannot_listen(node: Node) -> None:
    node.machine.run("systemctl", "stop", "meshd")
    holder = node.machine.command(
        "python3", "-c", "import socket, sys\n"
        "s = socket.create_server(('127.0.0.1', 9338)); print(flush=True); sys.stdin.read()",
    )  # fmt: skip
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as held:
        assert held.stdout is not None
        held.stdout.readline()
        assert node.machine.run("systemctl", "start", "meshd", check=False).returncode != 0
        assert node.systemd()["state"] != "active"
        assert "9338" in node.journal()
        held.communicate()
    node.machine.run("systemctl", "reset-failed", "meshd", check=False)
    node.machine.run("systemctl", "start", "meshd")
    node.wait_serving()


def test_it_gives_up_what_it_does_not_need(node: Node, measured: list[str]) -> None:
    report = node.machine.run("systemd-analyze", "security", "--no-pager", "meshd.service").stdout
    found = re.search(r"Overall exposure level for meshd.service: ([\d.]+)", report)
    assert found is not None, report
    measured.append(found[0])
    assert float(found[1]) <= EXPOSURE_LIMIT
    node.machine.run("systemd-analyze", "verify", "/etc/systemd/system/meshd.service")
    for pid in {node.pid(), *node.engines()}:
        status = node.machine.run("cat", f"/proc/{pid}/status").stdout
        facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert facts["NoNewPrivs"] == "1"
        assert facts["Seccomp"] == "2"
        assert int(facts["CapBnd"], 16) == int(facts["CapEff"], 16) == 0
        assert facts["Uid"].split()[0] != "0"
    assert oct((node.machine.root / DATA[1:]).stat().st_mode & 0o777) == "0o700"


def test_reload(node: Node) -> None:
    pid = node.pid()
    settings = node.machine.root / DATA[1:] / "config.toml"
    settings.write_text('log_level = "debug"\nmesh = "elsewhere"\n')
    node.machine.run("systemctl", "reload", "meshd")
    done = "SIGHUP: changed log_level; after a restart: mesh"
    wait_until(lambda: done in node.journal(), what="a reload")
    assert node.pid() == pid
    settings.write_text("log_level = \n")
    node.machine.run("systemctl", "reload", "meshd")
    wait_until(lambda: "everything stays as it is" in node.journal(), what="a refusal")
    assert node.get("/livez") == 200
    assert node.systemd()["state"] == "active"
    settings.unlink()


def test_installing_again_changes_nothing(node: Node) -> None:
    pid = node.pid()
    said = node.machine.run(MESHD, "service", "install", "--system").stdout
    assert "is as it should be" in said
    assert node.pid() == pid


def test_killed_it_comes_back_and_leaves_no_engine(node: Node, measured: list[str]) -> None:
    pid, before = node.pid(), set(node.processes())
    assert node.engines()
    node.machine.kill(pid, signal.SIGKILL)
    took = node.wait_other_process(pid, RESTART_S + START_S)
    measured.append(f"active again {took:.1f} s after kill -9")
    assert not before & set(node.processes())
    node.wait_serving()


def test_stopped_it_is_restarted_by_the_watchdog(node: Node, measured: list[str]) -> None:
    pid, before = node.pid(), set(node.processes())
    node.machine.kill(pid, signal.SIGSTOP)
    took = node.wait_other_process(pid, WATCHDOG_S + ABORT_S + RESTART_S + START_S)
    measured.append(f"active again {took:.1f} s after kill -STOP")
    journal = node.journal()
    assert "Watchdog timeout" in journal
    assert "Fatal Python error: Aborted" in journal, "it says where it was"
    assert not before & set(node.processes())
    node.wait_serving()


def test_a_stop_lets_a_stream_finish(node: Node, measured: list[str]) -> None:
    stream = subprocess.Popen(
        node.machine.command("python3", "-c", STREAM), stdout=subprocess.PIPE, text=True
    )
    assert stream.stdout is not None
    events = [stream.stdout.readline() for _ in range(3)]
    began = time.monotonic()
    stop = subprocess.Popen(node.machine.command("systemctl", "stop", "meshd"))
    state = ("systemctl", "show", "--value", "--property=ActiveState", "meshd")
    wait_until(
        lambda: node.machine.run(*state).stdout == "deactivating\n", what="the stop to begin"
    )
    while_draining = node.get("/readyz")
    rest, _ = stream.communicate(timeout=60)
    drained = time.monotonic() - began
    assert stop.wait(60) == 0
    measured.append(f"the stream ended {drained:.1f} s after the stop began")
    lines = [*events, *rest.splitlines()]
    assert lines[-1] == "[DONE]", lines[-3:]
    assert '"finish_reason":"length"' in lines[-2]
    assert while_draining == 503, "new requests are refused while the stream goes on"
    said = node.systemd()
    assert (said["state"], said["result"]) == ("inactive", "success")
    assert node.processes() == {}
    node.machine.run("systemctl", "start", "meshd")
    node.wait_serving()


def test_after_a_reboot_it_is_in_its_mesh_again(node: Node, measured: list[str]) -> None:
    before = node.status()
    node.machine.reboot()
    began = time.monotonic()
    node.wait_serving()
    measured.append(f"model and mesh {time.monotonic() - began:.1f} s after systemd was up")
    after = node.status()
    for what in ("node", "mesh"):
        assert after[what]["id"] == before[what]["id"]


def test_uninstall_leaves_data_only(node: Node) -> None:
    root = node.machine.root
    written = [root / "etc/systemd/system/meshd.service",
               root / "etc/systemd/system/multi-user.target.wants/meshd.service"]  # fmt: skip
    assert all(path.is_symlink() or path.exists() for path in written)
    node.machine.run(MESHD, "service", "uninstall", "--system")
    assert not any(path.is_symlink() or path.exists() for path in written)
    assert node.processes() == {}
    assert node.machine.run(MESHD, "service", "status", check=False).returncode == 3
    assert {"logs", "mesh"} <= {path.name for path in (root / DATA[1:]).iterdir()}
    node.machine.run(MESHD, "service", "uninstall", "--system")


def test_a_user_installs_it_for_himself(machine: Machine) -> None:
    """Last: it listens where the other one did."""
    home = machine.root / "home/ann"
    machine.run("useradd", "--create-home", "--uid", "1500", "ann")
    # What user@1500.service does where there is a login manager.
    runtime = "/run/user/1500"
    machine.run("install", "-d", "-o", "ann", "-g", "ann", "-m", "0700", runtime)
    machine.run(
        *("systemd-run", "--unit=ann", "--service-type=notify", "--property=User=ann"),
        *("--property=Delegate=yes", f"--setenv=XDG_RUNTIME_DIR={runtime}"),
        *("/lib/systemd/systemd", "--user"),
    )
    secrets = home / ".config/meshd/environment"
    secrets.parent.mkdir(parents=True)
    secrets.write_text("MESHD_MDNS=false\nMESHD_PEER_LISTEN=127.0.0.1:9338\n")
    machine.run("chown", "-R", "ann:", "/home/ann")
    environment = ("env", "HOME=/home/ann", f"XDG_RUNTIME_DIR={runtime}")
    as_ann = ("runuser", "-u", "ann", "--", *environment)

    said = machine.run(*as_ann, MESHD, "service", "install").stdout
    assert "meshd.service (user): active, running" in said
    assert "enable-linger" in said
    unit = home / ".config/systemd/user/meshd.service"
    assert unit.exists()
    assert "127.0.0.1:9338" in machine.run("ss", "-Hltn").stdout
    status = json.loads(machine.run(*as_ann, MESHD, "status", "--json").stdout)
    assert status["node"]["state"] == "ready"
    assert (home / ".local/share/meshd/mesh").is_dir()

    machine.run(*as_ann, MESHD, "service", "uninstall")
    assert not unit.exists()
    assert machine.run(*as_ann, MESHD, "service", "status", check=False).returncode == 3
    assert "127.0.0.1:9338" not in machine.run("ss", "-Hltn").stdout
