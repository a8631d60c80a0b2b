"""A Debian 12 with systemd as its init, in a container, with this checkout installed in it.

The tree is made once by debootstrap and copied for each run. The container has a network of its
own with nothing but loopback, so two nodes in it can make a mesh and reach nobody else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import psutil

import meshd
from meshd import config
from tests.conftest import wait_until

TOOLS = {
    "systemd-nspawn": "systemd-container",
    "debootstrap": "debootstrap",
    "nsenter": "util-linux",
}
PACKAGES = ("systemd-sysv", "python3", "libgomp1", "iproute2", "procps")
SUITE = "bookworm"
PYTHON = (3, 11)
"""That of the tree: packages of this environment are used in it as they are."""
BUILD_LIMIT_S = 900.0
BOOT_LIMIT_S = 60.0
COMMAND_LIMIT_S = 180.0
REBOOTED = 133
"""Exit status of `systemd-nspawn --keep-unit` whose container asked for a reboot."""

MESHD = "/opt/meshd/bin/meshd"
ENGINE = "/opt/engine"
_PREFIX = "/opt/meshd"
_CODE, _PACKAGES = f"{_PREFIX}/code", f"{_PREFIX}/packages"


def missing() -> str | None:
    """Why no machine can be made here, naming what would help; None if one can."""
    if os.geteuid() != 0:
        return "a container with systemd needs root"
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            return f"`{tool}` is not installed (Debian: apt install {package})"
    if sys.version_info[:2] != PYTHON:
        return f"Debian 12 has Python {PYTHON[0]}.{PYTHON[1]}, and this environment another one"
    return None


class Machine:
    """`run` types a command in it. Files are read and written below `root`."""

    def __init__(self, engine_dir: Path) -> None:
        self._engine_dir = engine_dir
        self._home = Path(tempfile.mkdtemp(prefix="machine-", dir=_cache()))
        self.root = self._home / "root"
        self._process: subprocess.Popen[bytes] | None = None
        self._init = 0

    def __enter__(self) -> Machine:
        subprocess.run(["cp", "-a", "--reflink=auto", _tree(), self.root], check=True)
        self._install()
        self.boot()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            if self._init:
                # The end of its first process is that of all in it; that of nspawn is not.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._init, signal.SIGKILL)
            self._process.kill()
            self._process.wait(BOOT_LIMIT_S)
        shutil.rmtree(self._home)

    def _install(self) -> None:
        """A virtual environment as in the documentation; what pip would copy is mounted."""
        subprocess.run(
            ["chroot", self.root, "python3", "-m", "venv", "--without-pip", _PREFIX], check=True
        )
        for directory in (f"{_CODE}/meshd", _PACKAGES, ENGINE):
            (self.root / directory[1:]).mkdir(parents=True)
        (site,) = (self.root / _PREFIX[1:]).glob("lib/python3*/site-packages")
        (site / "meshd.pth").write_text(f"{_CODE}\n{_PACKAGES}\n")
        script = self.root / MESHD[1:]
        script.write_text(f"#!{_PREFIX}/bin/python\nfrom meshd.cli import main\nmain()\n")
        script.chmod(0o755)

    def boot(self) -> None:
        """Returns when systemd has started what it starts."""
        packages = Path(psutil.__file__).parent.parent
        mounts = {
            Path(meshd.__file__).parent: f"{_CODE}/meshd",
            packages: _PACKAGES,
            self._engine_dir.resolve(): ENGINE,
        }
        with self.console.open("ab") as console:
            self._process = subprocess.Popen(
                [
                    *("systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit"),
                    *("--private-network", "--console=pipe", "--link-journal=no"),
                    *(f"--directory={self.root}", "--machine=meshd-test"),
                    *(f"--bind-ro={source}:{target}" for source, target in mounts.items()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
            )
        wait_until(self._booted, timeout_s=BOOT_LIMIT_S, what=f"a boot; see\n{self.words()}")

    @property
    def console(self) -> Path:
        return self._home / "console"

    def words(self) -> str:
        return self.console.read_text(errors="replace")[-3000:]

    def _booted(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.words()
        self._init = next(self._inits(), 0)
        if not self._init:
            return False
        state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
        return state in ("running", "degraded")

    def _inits(self) -> Iterator[int]:
        """The process that is number 1 in the container, by its number here."""
        assert self._process is not None
        for child in psutil.Process(self._process.pid).children():
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{child.pid}/status").read_text()
                numbers = status.partition("NSpid:")[2].split("\n")[0].split()
                if len(numbers) == 2 and numbers[1] == "1":
                    yield child.pid

    def command(self, *argv: str) -> list[str]:
        """What types `argv` in it, as root."""
        inside = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"]
        return ["nsenter", "--target", str(self._init), "--all", "--", *inside, *argv]

    def run(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_LIMIT_S,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def reboot(self) -> None:
        assert self._process is not None
        self.run("systemctl", "reboot", check=False)
        assert self._process.wait(BOOT_LIMIT_S) == REBOOTED, self.words()
        self.boot()

    def kill(self, pid: int, number: signal.Signals) -> None:
        """`pid` as it is known in the container."""
        self.run("kill", f"-{int(number)}", str(pid))


def _cache() -> Path:
    directory = config.load().config.cache_dir / "meshd" / "tests"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _tree() -> Path:
    """The pristine Debian; made if there is none with these packages."""
    wanted = hashlib.sha256(" ".join((SUITE, *PACKAGES)).encode()).hexdigest()[:8]
    tree = _cache() / f"debian-{SUITE}-{wanted}"
    if not tree.exists():
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=_cache()))
        subprocess.run(
            [
                *("debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}"),
                *(SUITE, str(unfinished), _mirror()),
            ],
            check=True,
            stdout=sys.stderr,
            timeout=BUILD_LIMIT_S,
        )
        unfinished.chmod(0o755)
        unfinished.rename(tree)
    return tree


def _mirror() -> str:
    """Where this machine itself gets Debian from, if it is one."""
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI)"]
    found = subprocess.run(
        [*asked, "Created-By: Packages", f"Codename: {SUITE}"], capture_output=True, text=True
    ).stdout.split()
    return found[0] if found else "http://deb.debian.org/debian"
