"""`meshd service`: the text of the units, and what is asked of systemd. No systemd is touched: a
program of that name writes down what it was asked. tests/service has the real one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from meshd.cli import service
from meshd.cli.main import main
from meshd.cli.service_unit import (
    HIDDEN,
    Scope,
    own_command,
    quoted,
    unit_text,
    why_unreachable,
)

SYSTEM_SERVICE = """\
Type=notify
NotifyAccess=main
ExecStart=/opt/meshd/bin/meshd run
ExecReload=/bin/kill -HUP $MAINPID
TimeoutStartSec=2min
TimeoutStopSec=90s
WatchdogSec=30s
TimeoutAbortSec=10s
Restart=on-failure
RestartSec=2s
RestartPreventExitStatus=2 78
KillMode=mixed
OOMPolicy=continue
User=meshd
Group=meshd
SupplementaryGroups=video render
StateDirectory=meshd
StateDirectoryMode=0700
CacheDirectory=meshd
CacheDirectoryMode=0700
WorkingDirectory=%S/meshd
UMask=0077
Environment=XDG_CACHE_HOME=%C/meshd HF_HOME=%C/meshd/huggingface CUDA_CACHE_PATH=%C/meshd/cuda
Environment=PYTHONUNBUFFERED=1
EnvironmentFile=-/etc/meshd/environment
LimitNOFILE=65536
LimitMEMLOCK=infinity
DevicePolicy=closed
DeviceAllow=char-nvidia* rw
DeviceAllow=char-drm rw
DeviceAllow=char-kfd rw
DeviceAllow=char-nvhost* rw
DeviceAllow=/dev/nvmap rw
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
ProtectProc=invisible
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
RestrictSUIDSGID=yes
RestrictNamespaces=yes
RestrictRealtime=yes
LockPersonality=yes
RemoveIPC=yes
KeyringMode=private
ProtectClock=yes
ProtectHostname=yes
ProtectControlGroups=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
"""
"""Written down, so that nothing falls out of the template unseen."""
ROOT_ONLY = (
    "User=", "Group=", "SupplementaryGroups=", "StateDirectory", "CacheDirectory", "Device",
    "Protect", "Private", "CapabilityBoundingSet=", "AmbientCapabilities=", "RuntimeDirectory",
)  # fmt: skip
"""What the manager of a user cannot do, or would put data where `meshd run` by hand does not."""

FAKE_SYSTEMCTL = """\
#!/bin/sh
echo "$*" >> "{log}"
case "$*" in
  *show*) cat "{state}" ;;
  *start*) [ ! -e "{broken}" ] || {{ echo "Job for meshd.service failed." >&2; exit 1; }} ;;
esac
"""
RUNNING = """\
ActiveState=active
SubState=running
StatusText=ready; no model loaded; alone in its mesh
Result=success
MainPID=4711
NRestarts=1
ActiveEnterTimestamp=Wed 2026-11-25 04:30:00 UTC
UnitFileState=enabled
NeedDaemonReload=no
"""


def settings(text: str, section: str = "Service") -> list[str]:
    inside = text.partition(f"[{section}]\n")[2].partition("\n[")[0]
    return [line for line in inside.splitlines() if line and not line.startswith("#")]


def test_the_system_unit() -> None:
    text = unit_text("system", ["/opt/meshd/bin/meshd"], ["video", "render"])
    assert settings(text) == SYSTEM_SERVICE.splitlines()
    assert settings(text, "Install") == ["WantedBy=multi-user.target"]
    assert {"StartLimitIntervalSec=10min", "StartLimitBurst=5"} <= set(settings(text, "Unit"))
    assert not [line for line in settings(unit_text("system", ["/x"])) if line.startswith("Supp")]


def test_the_user_unit_asks_for_nothing_that_needs_root() -> None:
    text = unit_text("user", ["/opt/meshd/bin/meshd"])
    assert not [line for line in settings(text) if line.startswith(ROOT_ONLY)]
    same = set(settings(text)) & set(SYSTEM_SERVICE.splitlines())
    assert {"Type=notify", "WatchdogSec=30s", "KillMode=mixed", "NoNewPrivileges=yes"} <= same
    assert settings(text, "Install") == ["WantedBy=default.target"]


@pytest.mark.parametrize("scope", ["system", "user"])
def test_systemd_finds_nothing_wrong_with_it(scope: Scope, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze (Debian: apt install systemd)")
    unit = tmp_path / "meshd.service"
    unit.write_text(unit_text(scope, [sys.executable, "-m", "meshd"], ["video"]))
    done = subprocess.run(
        ["systemd-analyze", "verify", f"--{scope}", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        env={"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_words_of_a_command_line() -> None:
    assert quoted("/opt/meshd/bin/meshd") == "/opt/meshd/bin/meshd"
    assert quoted("/opt/my meshd/100%/$x") == '"/opt/my meshd/100%%/$$x"'
    assert quoted('a"b\\') == '"a\\"b\\\\"'


def test_the_command_is_the_meshd_that_runs() -> None:
    command = own_command()
    assert Path(command[0]).parent == Path(sys.executable).parent
    done = subprocess.run([*command, "version"], capture_output=True, check=True, cwd="/")
    assert done.stdout


def test_what_the_service_cannot_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_unreachable(Path("/usr/bin/env")) is None
    assert "does not see" in (why_unreachable(Path("/home/ann/.venv/bin/meshd")) or "")
    monkeypatch.setattr("meshd.cli.service_unit.HIDDEN", HIDDEN[:0])
    program = tmp_path / "meshd"
    program.write_text("")
    program.chmod(0o700)
    assert "closed to other users" in (why_unreachable(program) or "")
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    assert "No such file" in (why_unreachable(link) or "")


# -- commands, of a user: the same code writes units of the machine -------------------------------


class Fake:
    """A systemctl that only takes notes."""

    def __init__(self, directory: Path) -> None:
        self._log = directory / "asked"
        self._state = directory / "state"
        self._broken = directory / "broken"
        self._log.touch()
        self.says(RUNNING)
        program = directory / "systemctl"
        program.write_text(
            FAKE_SYSTEMCTL.format(log=self._log, state=self._state, broken=self._broken)
        )
        program.chmod(0o755)

    def says(self, state: str) -> None:
        self._state.write_text(state)

    def break_starts(self) -> None:
        self._broken.touch()

    def asked(self) -> list[str]:
        """Verbs since the last call."""
        lines = self._log.read_text().splitlines()
        self._log.write_text("")
        assert all(line.startswith("--user --no-ask-password ") for line in lines)
        return [" ".join(line.split()[2:4]) for line in lines]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(service, "BOOTED", tmp_path)
    monkeypatch.setattr(service, "LINGERING", tmp_path / "linger")
    return Fake(directory)


@pytest.fixture
def meshd(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[object, str]]:
    def run(*arguments: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as left:
            main(["service", *arguments])
        printed = capsys.readouterr()
        return left.value.code, printed.out + printed.err

    return run


Meshd = Callable[..., tuple[object, str]]


def test_install_status_uninstall(fake: Fake, meshd: Meshd, tmp_path: Path) -> None:
    unit = tmp_path / "config/systemd/user/meshd.service"
    code, said = meshd("install", "--user")
    assert code == 0, said
    assert unit.read_text() == unit_text("user", own_command())
    assert unit.stat().st_mode & 0o777 == 0o644
    assert "written" in said
    assert "enable-linger" in said
    assert fake.asked() == [
        "daemon-reload", "show meshd.service", "enable meshd.service", "start meshd.service",
        "show meshd.service",
    ]  # fmt: skip

    code, said = meshd("install", "--user")
    assert code == 0
    assert "is as it should be" in said
    assert "daemon-reload" not in fake.asked()

    code, said = meshd("status", "--user", "--json")
    assert code == 0
    state = json.loads(said)
    assert (state["state"], state["pid"], state["restarts"]) == ("active", 4711, 1)
    assert state["words"] == "ready; no model loaded; alone in its mesh"
    assert state["enabled"] is True
    fake.asked()

    code, said = meshd("uninstall", "--user")
    assert code == 0
    assert not unit.exists()
    assert fake.asked() == ["disable --now", "daemon-reload", "reset-failed meshd.service"]
    assert meshd("uninstall", "--user")[0] == 0
    assert fake.asked() == []


def test_a_changed_unit_does_not_cut_off_what_runs(
    fake: Fake, meshd: Meshd, tmp_path: Path
) -> None:
    unit = tmp_path / "config/systemd/user/meshd.service"
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\n")
    code, said = meshd("install", "--user")
    assert code == 0
    assert "until `systemctl --user restart meshd`" in said
    assert "restart meshd.service" not in fake.asked()


def test_one_that_does_not_run(fake: Fake, meshd: Meshd) -> None:
    fake.says("ActiveState=inactive\nSubState=dead\nResult=success\nMainPID=0\nNRestarts=0\n")
    code, said = meshd("status", "--user")
    assert code == 3
    assert "not installed" in said
    assert meshd("install", "--user", "--no-start")[0] == 0
    assert "start meshd.service" not in fake.asked()
    code, said = meshd("status", "--user")
    assert code == 3
    assert "inactive, dead (success)" in said


def test_a_start_that_fails_says_what_systemd_says(fake: Fake, meshd: Meshd) -> None:
    fake.break_starts()
    code, said = meshd("install", "--user")
    assert code == 1
    assert "Job for meshd.service failed." in said


def test_only_root_installs_for_the_machine(
    fake: Fake, meshd: Meshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    code, said = meshd("install", "--system")
    assert code == 1
    assert "sudo" in said
    assert fake.asked() == []


def test_without_systemd(
    fake: Fake, meshd: Meshd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(service, "BOOTED", tmp_path / "none")
    code, said = meshd("install", "--user")
    assert code == 1
    assert "systemd does not run this machine" in said
