"""`meshd service …`: this meshd as a systemd service, of the machine or of one user."""

from __future__ import annotations

import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from meshd.cli.options import json_option, print_json
from meshd.cli.service_unit import (
    GPU_GROUPS,
    UNIT,
    Scope,
    own_command,
    program_paths,
    unit_text,
    why_unreachable,
)
from meshd.config import user_config_dir
from meshd.errors import DaemonNotRunning, MeshdError

SYSTEM_UNITS = Path("/etc/systemd/system")
BOOTED = Path("/run/systemd/system")
"""There if and only if systemd is the init of this machine; see sd_booted(3)."""
LINGERING = Path("/var/lib/systemd/linger")
USER = "meshd"
STATE_DIR, CACHE_DIR = Path("/var/lib/meshd"), Path("/var/cache/meshd")
SYSTEMCTL_LIMIT_S = 240.0
"""A start may take two minutes, a stop that drains longer than one."""


@click.group()
def service() -> None:
    """Run meshd as a systemd service."""


def _scope_options(command: Any) -> Any:
    command = click.option(
        "--user", "scope", flag_value="user", help="Of the user who types this."
    )(command)
    return click.option(
        "--system", "scope", flag_value="system", help="Of the machine (the default for root)."
    )(command)


@service.command()
@_scope_options
@click.option("--no-start", is_flag=True, help="Have it started at the next boot only.")
def install(scope: Scope | None, no_start: bool) -> int:
    """Write the unit file, and start meshd now and at every boot. Can be repeated."""
    manager = _Manager.of(scope)
    manager.require_rights("install")
    manager.require_systemd(offline=no_start)
    if manager.scope == "system":
        _require_reach()
        _make_user()
    changed = manager.write(unit_text(manager.scope, own_command(), _groups(manager.scope)))
    click.echo(f"{manager.path} {'written' if changed else 'is as it should be'}")
    was_active = not no_start and manager.show().active
    manager.call("enable", UNIT)
    if not no_start:
        manager.call("start", UNIT)
        if changed and was_active:
            click.echo(f"it runs with its old unit until `{manager.command} restart meshd`")
        _print(manager.show())
    if manager.scope == "user" and not (LINGERING / _login()).exists():
        click.echo("it ends when you log out, until you say `loginctl enable-linger`")
    return 0


@service.command()
@_scope_options
def uninstall(scope: Scope | None) -> int:
    """Stop meshd (requests in flight finish) and remove its unit file. Data stays."""
    manager = _Manager.of(scope)
    manager.require_rights("uninstall")
    if not manager.path.exists():
        click.echo(f"there is no {manager.path}")
        return 0
    if BOOTED.is_dir():
        manager.call("disable", "--now", UNIT)
    else:
        manager.call("disable", UNIT)
    manager.path.unlink()
    if BOOTED.is_dir():
        manager.call("daemon-reload")
        manager.call("reset-failed", UNIT, may_fail=True)
    click.echo(f"{manager.path} removed")
    if manager.scope == "system":
        click.echo(
            f"left: {STATE_DIR} (identity, mesh), {CACHE_DIR} (weights, engines) and the user "
            f"{USER} they belong to; `userdel {USER}` and `rm -r` remove those too"
        )
    else:
        click.echo("left: the data, as `meshd run` by hand uses it")
    return 0


@service.command()
@_scope_options
@json_option
def status(scope: Scope | None, as_json: bool) -> int:
    """What systemd says of it. Exit code 0 if it is up, 3 if not."""
    manager = _Manager.of(scope)
    manager.require_systemd()
    state = manager.show()
    if as_json:
        print_json(asdict(state))
    else:
        _print(state)
    return 0 if state.active else DaemonNotRunning.exit_code


@dataclass(frozen=True, slots=True)
class _State:
    """Words are systemd's own; see systemctl(1)."""

    scope: Scope
    unit: str
    installed: bool
    enabled: bool
    state: str
    sub_state: str
    words: str
    """The node's own: what it told systemd last."""
    result: str
    pid: int | None
    restarts: int
    since: str
    reload_needed: bool
    """The unit file was changed after systemd read it."""

    @property
    def active(self) -> bool:
        return self.state in ("active", "reloading")


_PROPERTIES = (
    "ActiveState", "SubState", "StatusText", "Result", "MainPID", "NRestarts",
    "ActiveEnterTimestamp", "UnitFileState", "NeedDaemonReload",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Manager:
    scope: Scope
    path: Path

    @classmethod
    def of(cls, scope: Scope | None) -> _Manager:
        scope = scope or ("system" if os.geteuid() == 0 else "user")
        directory = SYSTEM_UNITS if scope == "system" else user_config_dir() / "systemd" / "user"
        return cls(scope, directory / UNIT)

    @property
    def command(self) -> str:
        return "systemctl" if self.scope == "system" else "systemctl --user"

    def require_rights(self, verb: str) -> None:
        if self.scope == "system" and os.geteuid() != 0:
            raise MeshdError(
                f"a service of the machine is root's to {verb}: `sudo "
                f"{' '.join(own_command())} service {verb} --system`; one of your own needs no "
                f"rights: `meshd service {verb} --user`"
            )

    def require_systemd(self, *, offline: bool = False) -> None:
        if not offline and not BOOTED.is_dir():
            raise MeshdError(
                "systemd does not run this machine; start `meshd run` with whatever does, or use "
                "`install --no-start` to prepare an image"
            )

    def write(self, text: str) -> bool:
        """Whether the unit file had to be changed."""
        if self.path.exists() and self.path.read_text() == text:
            return False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(text)
        self.path.chmod(0o644)
        if BOOTED.is_dir():
            self.call("daemon-reload")
        return True

    def call(self, *arguments: str, may_fail: bool = False) -> str:
        """What systemctl printed. Raises MeshdError with its own words."""
        try:
            done = subprocess.run(
                [*self.command.split(), "--no-ask-password", *arguments],
                capture_output=True,
                text=True,
                timeout=SYSTEMCTL_LIMIT_S,
                check=False,
            )
        except FileNotFoundError:
            raise MeshdError("there is no systemctl here, so no systemd either") from None
        except subprocess.TimeoutExpired:
            raise MeshdError(
                f"`{self.command} {' '.join(arguments)}` has not come back for "
                f"{SYSTEMCTL_LIMIT_S:.0f} s; see `{self.command} status meshd`"
            ) from None
        if done.returncode != 0 and not may_fail:
            raise MeshdError(
                f"`{self.command} {' '.join(arguments)}`: {done.stderr.strip()}{self._hint(done)}"
            )
        return done.stdout

    def _hint(self, done: subprocess.CompletedProcess[str]) -> str:
        if self.scope == "user" and "connect to bus" in done.stderr:
            return (
                "\nthere is no session of this user: log in as them instead of `su`, or "
                "`loginctl enable-linger` and `export XDG_RUNTIME_DIR=/run/user/$(id -u)`"
            )
        return ""

    def show(self) -> _State:
        printed = self.call("show", UNIT, f"--property={','.join(_PROPERTIES)}")
        said = dict(line.split("=", 1) for line in printed.splitlines() if "=" in line)
        pid = int(said.get("MainPID") or 0)
        return _State(
            scope=self.scope,
            unit=str(self.path),
            installed=self.path.exists(),
            enabled=said.get("UnitFileState") == "enabled",
            state=said.get("ActiveState", "unknown"),
            sub_state=said.get("SubState", "unknown"),
            words=said.get("StatusText", ""),
            result=said.get("Result", ""),
            pid=pid or None,
            restarts=int(said.get("NRestarts") or 0),
            since=said.get("ActiveEnterTimestamp", ""),
            reload_needed=said.get("NeedDaemonReload") == "yes",
        )


def _print(state: _State) -> None:
    if not state.installed and not state.active:
        click.echo(f"not installed: there is no {state.unit}; `meshd service install` makes it")
        return
    log = "journalctl -u meshd" if state.scope == "system" else "journalctl --user -u meshd"
    since = f" since {state.since}, pid {state.pid}" if state.active else f" ({state.result})"
    click.echo(f"{UNIT} ({state.scope}): {state.state}, {state.sub_state}{since}")
    for what, words in (
        ("node", state.words),
        ("at boot", "started" if state.enabled else "not started"),
        ("restarts", str(state.restarts)),
        ("unit", state.unit + (" (changed; not read yet)" if state.reload_needed else "")),
        ("log", f"{log} -f"),
    ):
        if words:
            click.echo(f"  {what:<9} {words}")


def _require_reach() -> None:
    for path in program_paths():
        reason = why_unreachable(path)
        if reason is not None:
            raise MeshdError(
                f"the service could not start this meshd: {reason}; install it where every user "
                "can read it: `python3 -m venv /opt/meshd`, `/opt/meshd/bin/pip install .` in the "
                "source, then `/opt/meshd/bin/meshd service install --system`"
            )


def _make_user() -> None:
    """A system user without a shell, if there is none of that name."""
    entry = f'u {USER} - "meshd node" {STATE_DIR}'
    done = subprocess.run(
        ["systemd-sysusers", "--inline", entry], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise MeshdError(f"the user {USER} could not be made: {done.stderr.strip()}")


def _groups(scope: Scope) -> list[str]:
    import grp

    there = {group.gr_name for group in grp.getgrall()} if scope == "system" else set()
    return [name for name in GPU_GROUPS if name in there]


def _login() -> str:
    import pwd

    return pwd.getpwuid(os.geteuid()).pw_name
