"""Directories that look like engines: shell scripts in place of binaries."""

from __future__ import annotations

from pathlib import Path

from meshd.runtime.probe import NEEDED_FLAGS

VERSION = "version: 0.5.0 (build 7, commit abcdef0)"
HELP = "\n".join(f"{flag} X   what it does" for flag in NEEDED_FLAGS) + "\n  UNIX socket paths too"
NO_DEVICES = "Available devices:\n  (none)"


def make_engine(
    directory: Path,
    *,
    version: str = VERSION,
    help_text: str = HELP,
    devices: str = NO_DEVICES,
    rpc_name: str | None = "ggml-rpc-server",
    extra: str = "",
) -> Path:
    """A llama-server that answers the three questions of a probe, and notes each in `asked`.

    `extra` is shell that runs before it answers, with the flag in `$1`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in (("version", version), ("help", help_text), ("list-devices", devices)):
        (directory / f"{name}.txt").write_text(text + "\n")
    program(
        directory / "llama-server",
        f'cd "{directory}" && echo "$1" >> asked\n{extra}\ncat "${{1#--}}.txt"\n',
    )
    if rpc_name is not None:
        program(directory / rpc_name, "exit 0\n")
    (directory / "libggml-base.so.0").write_bytes(b"a library")
    (directory / "libggml-base.so").symlink_to("libggml-base.so.0")
    return directory


def program(path: Path, script: str) -> Path:
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return path


def questions(directory: Path) -> list[str]:
    """What the engine was asked so far."""
    asked = directory / "asked"
    return asked.read_text().split() if asked.exists() else []
