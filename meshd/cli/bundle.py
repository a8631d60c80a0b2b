"""`meshd doctor --bundle`: what a bug report needs, in one file, without secrets.

Each part is text, gathered by itself: one that cannot be had has the reason in its place. All of it
goes through the redactor, and nothing is added after that.
"""

from __future__ import annotations

import importlib.metadata
import io
import platform
import re
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import orjson

from meshd import config as configuration
from meshd.cli.client import AdminClient
from meshd.cli.config import describe
from meshd.cli.logs import tail
from meshd.cli.redaction import Redactor, secrets_in
from meshd.config import Config, Loaded, environment_of_children
from meshd.errors import MeshdError
from meshd.kernel.files import write_atomic

LOG_LINES: Final = 2000
"""Last lines of a log."""
LOGS: Final = 12
"""Logs of engines, the youngest first."""
PART_CHARACTERS: Final = 2_000_000
"""Of one part; of a longer one the end."""
VARIABLES: Final = re.compile(
    r"(HF|HUGGINGFACE|XDG|CUDA|NVIDIA|HIP|ROCR|GGML|LLAMA|OMP|LD|LC|LANG|PATH|HTTPS?|NO)(_|$)"
    r"|.*_DIRECTORY$",
    re.IGNORECASE,
)
"""Environment variables that change what a node does."""
OF_PROC: Final = ("meminfo", "loadavg", "version", "cmdline", "driver/nvidia/version")
FOLDER: Final = "meshd-doctor"
ANSWER_S: Final = 10.0
KEYS: Final = ("*.key", "mesh/*.key")
"""Private keys in the data directory; they are read to be known again."""


def write_bundle(
    file: Path,
    loaded: Loaded,
    findings: Sequence[Mapping[str, Any]],
    *,
    hide_names: bool = False,
) -> None:
    """Write `file`, a tar.gz of mode 0600. Blocking, seconds. Raises MeshdError if it cannot be
    written."""
    environment = environment_of_children()  # meshd's own variables are in the configuration
    status = _status(loaded.config)
    names = names_in(loaded.config, status) if hide_names else ()
    known = secrets_of(loaded.config, environment)
    redactor = Redactor.of(known, home=str(Path.home()), names=names)
    parts = gather(loaded, findings, status, environment)
    archive = pack({name: redactor.redact(text) for name, text in parts.items()})
    try:
        write_atomic(file.absolute(), archive)
    except OSError as error:
        raise MeshdError(f"{file} cannot be written: {error.strerror}") from None


def gather(
    loaded: Loaded,
    findings: Sequence[Mapping[str, Any]],
    status: Mapping[str, Any] | str,
    environment: Mapping[str, str],
) -> dict[str, str]:
    """Text by name in the archive; not redacted yet."""
    config = loaded.config
    parts = {
        "doctor.json": _json(list(findings)),
        "status.json": status if isinstance(status, str) else _json(status),
        "config.txt": "\n".join(describe(loaded)),
        "environment.txt": _environment(environment),
        "versions.txt": _attempt(_versions),
        "machine.txt": _machine(),
        "engine/list-devices.txt": _attempt(partial(_list_devices, config)),
        "engine/record.json": _attempt(partial(_record, config)),
        "engine/build.log": _attempt(partial(_build_log, config)),
        "flight.txt": _attempt(partial(_flight, config)),
    }
    for path in _logs(config.log_dir):
        parts[f"logs/{path.name}"] = _attempt(partial(_end_of, path))
    return {name: text[-PART_CHARACTERS:] for name, text in parts.items()}


def pack(parts: Mapping[str, str]) -> bytes:
    """A tar.gz that says nothing of who made it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in parts.items():
            data = text.encode(errors="replace")
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            member.size, member.mode, member.mtime = len(data), 0o600, int(time.time())
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def secrets_of(config: Config, environment: Mapping[str, str]) -> tuple[str, ...]:
    """What this machine knows to be secret: keys and invites of the configuration, variables, the
    hub's token, lines of private keys."""
    found = [config.api_key or "", *(wish for wish in config.join if configuration.is_invite(wish))]
    found += secrets_in(environment)
    files = [path for pattern in KEYS for path in config.data_dir.glob(pattern)]
    home = Path(environment.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    files += [home / "token", home / "stored_tokens"]
    if token_path := environment.get("HF_TOKEN_PATH"):
        files.append(Path(token_path))
    for path in files:
        found += _secret_words(path)
    return tuple(found)


def names_in(config: Config, status: Mapping[str, Any] | str) -> tuple[str, ...]:
    """Names of this machine, its node, its mesh and the other nodes."""
    found = {platform.node(), platform.node().partition(".")[0], config.name, config.mesh}
    if not isinstance(status, str):
        found |= {status["node"]["name"], status["mesh"]["name"]}
        found |= {peer["name"] for peer in status["peers"]}
    return tuple(found - {"", "default", "localhost", "node"})


def _status(config: Config) -> Mapping[str, Any] | str:
    try:
        answer: dict[str, Any] = AdminClient(config.admin_socket, timeout_s=ANSWER_S).get("/status")
    except MeshdError as error:
        return f"{error.message}\n"
    return answer


def _attempt(look: Callable[[], str]) -> str:
    try:
        return look()
    except MeshdError as error:
        return f"{error.message}\n"
    except OSError as error:
        return f"{error}\n"


def _environment(environment: Mapping[str, str]) -> str:
    """Variables that matter; those whose name says secret only by name."""
    told = {name: value for name, value in environment.items() if VARIABLES.match(name)}
    hidden = set(secrets_in(told))
    return "".join(
        f"{name}={'(secret)' if value in hidden else value}\n"
        for name, value in sorted(told.items())
    )


def _versions() -> str:
    lines = [f"Python {platform.python_version()} ({platform.python_implementation()})"]
    needed = [
        re.split(r"[^\w.-]", line)[0]
        for line in importlib.metadata.requires("meshd") or ()
        if "extra ==" not in line
    ]
    for name in ("meshd", *dict.fromkeys(needed)):
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} (not installed)")
    return "\n".join(lines) + "\n"


def _machine(proc: Path = Path("/proc")) -> str:
    files = [f"== {name}\n{_attempt((proc / name).read_text)}" for name in OF_PROC]
    return "\n".join(["uname: " + " ".join(platform.uname()), *files])


def _record(config: Config) -> str:
    from meshd.runtime.registry import Registry

    return Registry(config.cache_dir).find(config.runtime_dir).model_dump_json(indent=1)


def _build_log(config: Config) -> str:
    from meshd.runtime.registry import Registry

    registry = Registry(config.cache_dir)
    record = registry.find(config.runtime_dir)
    return _end_of(registry.directory / f"{record.id}.log")


def _list_devices(config: Config) -> str:
    from meshd.runtime.probe import ask_devices
    from meshd.runtime.registry import Registry

    record = Registry(config.cache_dir).find(config.runtime_dir)
    return "\n".join(ask_devices(Path(record.server_path))) or "(none)"


def _flight(config: Config) -> str:
    lines: list[str] = AdminClient(config.admin_socket, timeout_s=ANSWER_S).get("/flight")["lines"]
    return "\n".join(lines)


def _logs(directory: Path) -> list[Path]:
    """The daemon's, the last flight record, and the youngest of engines."""
    own = [path for path in (directory / "meshd.log", directory / "flight.txt") if path.is_file()]
    others = [path for path in directory.glob("*.log") if path not in own]
    return own + sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)[:LOGS]


def _end_of(path: Path) -> str:
    return "".join(tail(path, LOG_LINES, follow=False))


def _secret_words(path: Path) -> Iterable[str]:
    """Everything in a file of secrets that is too long to be a word of its format."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return ()
    return re.findall(r"[\w+/=.-]{16,}", text)


def _json(value: Any) -> str:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()
