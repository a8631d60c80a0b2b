"""Configuration: flags over `MESHD_*` environment over file over defaults.

Only this module reads the environment. Every value knows where it came from, so that
`meshd config show` can say it and an error can name the place to mend.
"""

from __future__ import annotations

import difflib
import os
import re
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from meshd.errors import BadConfig
from meshd.sizes import SIZE_OR_SHARE_PATTERN, SIZE_PATTERN

ENVIRONMENT_PREFIX = "MESHD_"
SECTION_SEPARATOR = "__"
"""`MESHD_API__QUEUE_PER_MODEL=64` sets `queue_per_model` of section `api`."""

Seconds = Annotated[float, Field(ge=0, le=86_400)]
_ADDRESS = r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]\s]+):\d{1,5}"
Address = Annotated[str, StringConstraints(pattern=f"^{_ADDRESS}$")]

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
"""Names of nodes and meshes."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ApiSettings(Section):
    """[api]: the HTTP side on :9337."""

    max_body_bytes: int = Field(32 * 1024 * 1024, ge=1024, le=1 << 30)
    """Longest request body, bytes. Images in chat messages need room; each one costs memory."""
    max_connections: int = Field(1024, ge=8, le=65_536)
    """Open client connections; one more is answered 503. Each needs a file descriptor."""
    head_timeout_s: Seconds = 10.0
    """From the first moment of a connection to a complete request head."""
    body_timeout_s: Seconds = 60.0
    """From the head to the last byte of the body."""
    idle_timeout_s: Seconds = 75.0
    """How long a kept-alive connection may be silent between requests."""
    first_byte_timeout_s: Seconds = 600.0
    """From admission to the engine's first byte (504 after that). A long prompt on a small machine
    takes minutes before the first token of an answer that is not streamed."""
    queue_per_model: int = Field(256, ge=0, le=65_536)
    """Requests that may wait for a free slot of one model; one more is 429. Longer queues trade
    refusals for waiting time."""
    wait_s: Seconds = 0.0
    """How long a request for a loading model waits when it carries no `x-meshd-wait-s`."""
    allowed_hosts: tuple[str, ...] = ()
    """Further DNS names clients may use in `Host`. IP addresses and localhost always may: a
    rebinding attack needs a name."""
    allowed_origins: tuple[str, ...] = ()
    """Web origins (`https://app.example`) whose pages may call this API; `*` for all."""


class EngineSettings(Section):
    """[engine]: llama-server processes."""

    context: int | None = Field(None, ge=128)
    """Tokens of context per slot; None takes what the model was trained for, at most 8,192."""
    parallel: int | None = Field(None, ge=1, le=1024)
    """Slots; None leaves it at 4. More slots share the memory of the context."""
    threads: int | None = Field(None, ge=1)
    extra_args: tuple[str, ...] = ()
    """Appended to llama-server's command line as they are."""
    start_silence_s: Seconds = 120.0
    """A starting engine that shows no progress (output, I/O) for this long has failed."""
    probe_interval_s: Seconds = 5.0
    """Health and slot probe of a ready engine. Shorter notices a hang sooner."""
    hang_after_s: Seconds = 60.0
    """A ready engine that answered no probe and made no progress for this long is restarted."""
    canary_interval_s: Seconds = 60.0
    """An idle engine generates one token this often, to prove it still can; 0 turns it off."""
    stop_grace_s: Seconds = 10.0
    """From SIGTERM to SIGKILL."""
    reprove_s: Annotated[float, Field(ge=10, le=30 * 86_400)] = 3600.0
    """The engine and its devices are proved again this often, and when something changed."""
    restart_budget: int = Field(5, ge=0, le=100)
    """Restarts within `restart_window_s` before the engine is degraded, and then given up."""
    restart_window_s: Seconds = 600.0
    log_bytes: int = Field(4 * 1024 * 1024, ge=65_536)
    """Size at which an engine's log file is rotated; three old ones are kept."""


class PeerSettings(Section):
    """[peers]: the side that faces other nodes."""

    preset: Literal["lan", "wan"] = "lan"
    """Timing of failure detection. `lan` notices a killed node in under 1.5 s and a silent one in
    under 4 s; `wan` allows for longer and less even round trips and takes about five times that."""
    dial_timeout_s: Annotated[float, Field(gt=0, le=60)] = 4.0
    """From a connection attempt to a node's answer to our hello."""
    max_links: int = Field(64, ge=4, le=1024)
    """Control links kept open; above that the least recently used one is closed. Each costs a file
    descriptor and some 100 KiB at both ends."""
    max_streams: int = Field(512, ge=8, le=16_384)
    """Streams (relayed requests) that other nodes may have open here at once."""


class CacheSettings(Section):
    """[cache]: the weights on this machine."""

    budget: Annotated[str, StringConstraints(pattern=SIZE_OR_SHARE_PATTERN)] | None = None
    """How much the Hugging Face cache may take: a size such as `500GB`, or a share of its disk such
    as `80%`. Models used longest ago go first when a new one needs room. Default: no limit."""
    reserve: Annotated[str, StringConstraints(pattern=SIZE_OR_SHARE_PATTERN)] = "2GB"
    """Free space that no download may touch."""
    pins: tuple[str, ...] = ()
    """REFs of models that are never removed to make room."""
    workers: int = Field(4, ge=1, le=32)
    """Transfers at once while a model is fetched. More helps against slow single connections."""
    from_peers: bool = True
    """Fetch from nodes that hold the weights verified, and serve them to others."""
    stall_s: Annotated[float, Field(ge=1, le=3600)] = 60.0
    """A source that sends nothing for this long is given up."""
    scrub_days: Annotated[float, Field(ge=0, le=3650)] = 30.0
    """Every file that was verified is hashed again in the background this often; 0 turns it off."""
    scrub_rate: Annotated[str, StringConstraints(pattern=SIZE_PATTERN)] = "50MB"
    """Bytes a second the background check reads at most."""


class Config(Section):
    """The effective configuration. Top-level names are those of the flags of `meshd run`."""

    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    """Name of this node, for people; default: the machine's host name."""
    listen: Address = "127.0.0.1:9337"
    """API address. An address other than loopback is refused without an API key."""
    peer_listen: Address = "0.0.0.0:9338"
    """Where other nodes reach this one: everything between nodes, encrypted and authenticated."""
    advertise: tuple[Address, ...] = ()
    """Addresses other nodes are told to use, HOST:PORT; default: those of this machine's network
    interfaces. Needed behind NAT."""
    mesh: Annotated[str, StringConstraints(pattern=NAME_PATTERN)] = "default"
    """Name of the mesh this node founds if it belongs to none and joins none."""
    join: tuple[str, ...] = Field((), repr=False)
    """Invite tokens (secrets), the name of a mesh, or HOST:PORT of members of the mesh this node
    is in."""
    client: bool = False
    """Use the mesh and host nothing: no engine, no capacity in the advert."""
    mdns: bool = True
    """Look for members on the LAN, and let them find this node."""
    model: tuple[str, ...] = ()
    """REFs to load at start."""
    api_key: str | None = Field(None, min_length=8, repr=False)
    api_key_file: Path | None = None
    data_dir: Path
    cache_dir: Path
    """Parent of `meshd/runtimes` (`$XDG_CACHE_HOME`, else `~/.cache`)."""
    runtime_dir: Path | None = None
    """Directory with a llama-server of your own."""
    require_gpu: bool = False
    """Refuse to start, instead of running on the CPU, when the proof of a GPU fails."""
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    drain_s: Seconds = 30.0
    """How long a stop waits for requests in flight."""
    api: ApiSettings = ApiSettings()
    engine: EngineSettings = EngineSettings()
    peers: PeerSettings = PeerSettings()
    cache: CacheSettings = CacheSettings()

    @property
    def listen_address(self) -> tuple[str, int]:
        return split_address(self.listen)

    @property
    def peer_listen_address(self) -> tuple[str, int]:
        return split_address(self.peer_listen)

    @property
    def mesh_dir(self) -> Path:
        """Membership: certificates, invites, deny list, remembered addresses."""
        return self.data_dir / "mesh"

    @property
    def weights_dir(self) -> Path:
        """What is known of the weights in the Hugging Face cache; made again when it is lost."""
        return self.cache_dir / "meshd" / "weights"

    @property
    def models_dir(self) -> Path:
        """Where the built-in model is made."""
        return self.cache_dir / "meshd" / "models"

    @property
    def run_dir(self) -> Path:
        """Sockets of children; emptied at start."""
        return self.data_dir / "run"

    @property
    def log_dir(self) -> Path:
        return self.data_dir / "logs"

    @property
    def admin_socket(self) -> Path:
        return self.data_dir / "admin.sock"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration and, for each dotted key that is not a default, where its value came from."""

    config: Config
    sources: Mapping[str, str]
    flags: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold secrets
    file: Path | None = None

    def again(self) -> Loaded:
        """The same, with what is in the files now. Raises BadConfig."""
        return load(self.flags, file=self.file)


def load(
    flags: Mapping[str, Any] | None = None,
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Loaded:
    """The effective configuration.

    `flags`: dotted keys with values, None meaning "not given". `file`: `--config`; without it
    `<data-dir>/config.toml` is read if it exists. Raises BadConfig naming key, source and the
    nearest right key.
    """
    environ = os.environ if environ is None else environ
    layers: list[tuple[str, dict[str, Any]]] = []
    flag_values = {key: value for key, value in (flags or {}).items() if value not in (None, ())}
    env_values = _environment(environ)
    data_dir = Path(flag_values.get("data_dir") or _default_data_dir(environ)).expanduser()
    path = file if file is not None else data_dir / "config.toml"
    layers.append(("default", _defaults(environ, data_dir)))
    layers.append((str(path), _file(path, required=file is not None)))
    layers.extend((f"environment {name}", {key: value}) for name, key, value in env_values)
    layers.append(("flag", flag_values))

    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, values in layers:
        for key, value in values.items():
            _check_key(key, source)
            merged[key] = value
            sources[key] = source
    merged["data_dir"] = data_dir.absolute()
    try:
        config = Config.model_validate(_nest(merged))
    except ValidationError as error:
        raise BadConfig(_explain(error, sources)) from None
    config = _with_key_file(config)
    _check_ports(config)
    if config.client and config.model:
        raise BadConfig("a client node hosts no models; leave --model out", param="model")
    check_exposure(config)
    origins = {k: v for k, v in sources.items() if v != "default"}
    return Loaded(config, origins, flags or {}, file)


def known_keys() -> tuple[str, ...]:
    """Every dotted key there is."""
    keys: list[str] = []
    for name, info in Config.model_fields.items():
        section = _section_of(info.annotation)
        keys += [name] if section is None else [f"{name}.{k}" for k in section.model_fields]
    return tuple(keys)


def split_address(address: str) -> tuple[str, int]:
    """`127.0.0.1:9337` or `[::1]:9337` as (host, port)."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def is_address(text: str) -> bool:
    """Whether `text` is HOST:PORT of somebody who can be dialled; IPv6 in brackets."""
    return bool(re.fullmatch(_ADDRESS, text)) and 0 < split_address(text)[1] <= 65_535


def is_invite(text: str) -> bool:
    """Whether `text` claims to be an invite token, whatever it is worth."""
    return re.match(r"meshd\d{1,6}-", text.strip().lower()) is not None


def masked(value: Any) -> Any:
    """`value`, or what is in it, with every invite token replaced by `(invite)`."""
    if isinstance(value, str):
        return "(invite)" if is_invite(value) else value
    if isinstance(value, (list, tuple)):
        return [masked(item) for item in value]
    return value


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def environment_of_children(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment a child process gets: ours, less meshd's own settings and secrets."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith((ENVIRONMENT_PREFIX, "LLAMA_ARG_", "NOTIFY_", "WATCHDOG_"))
    }
    kept.update(extra or {})
    return kept


def hub_cache_dir() -> Path:
    """Where `huggingface_hub` keeps models; its own rules, without importing it."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or str(_home(os.environ) / ".cache")
    return Path(base) / "huggingface" / "hub"


def user_config_dir() -> Path:
    """Where programs of this user keep their settings; systemd its units."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or _home(os.environ) / ".config")


def under_journal() -> bool:
    """Whether standard error is the systemd journal, which stamps lines itself."""
    status = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def notify_socket() -> str | None:
    """Where the service manager that started this process listens; see `kernel.notify`."""
    return os.environ.get("NOTIFY_SOCKET")


def watchdog_limit_s() -> float | None:
    """How long the service manager waits for a sign of life of this process; None: it does not.
    sd_watchdog_enabled(3): the variables may have been meant for a parent."""
    limit, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID")
    if not limit.isdecimal() or int(limit) == 0 or pid not in (None, str(os.getpid())):
        return None
    return int(limit) / 1_000_000


# -- layers ---------------------------------------------------------------------------------------


def _default_data_dir(environ: Mapping[str, str]) -> str:
    for variable in ("MESHD_DATA_DIR", "STATE_DIRECTORY"):
        if environ.get(variable):
            return environ[variable].split(":")[0]
    base = environ.get("XDG_DATA_HOME") or str(_home(environ) / ".local/share")
    return f"{base}/meshd"


def _defaults(environ: Mapping[str, str], data_dir: Path) -> dict[str, Any]:
    host_name = socket.gethostname().split(".")[0]
    cleaned = "".join(c if c.isalnum() or c in "._-" else "-" for c in host_name).lstrip("._-")
    return {
        "name": cleaned or "node",
        "data_dir": str(data_dir),
        "cache_dir": environ.get("XDG_CACHE_HOME") or str(_home(environ) / ".cache"),
    }


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ["HOME"]) if environ.get("HOME") else Path.home()


def _file(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        if required:
            raise BadConfig(f"configuration file {path} does not exist") from None
        return {}
    except OSError as error:
        raise BadConfig(f"configuration file {path} cannot be read: {error.strerror}") from None
    try:
        tree = tomllib.loads(text.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadConfig(f"configuration file {path} is not valid TOML: {error}") from None
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        field = Config.model_fields.get(key)
        if isinstance(value, dict) and (field is None or _section_of(field.annotation)):
            flat |= {f"{key}.{inner}": v for inner, v in value.items()}
        else:
            flat[key] = value
    return flat


def _environment(environ: Mapping[str, str]) -> list[tuple[str, str, Any]]:
    """(variable, dotted key, value) of every `MESHD_*` variable; lists are comma-separated."""
    found = []
    for name in sorted(environ):
        if not name.startswith(ENVIRONMENT_PREFIX):
            continue
        key = name.removeprefix(ENVIRONMENT_PREFIX).lower().replace(SECTION_SEPARATOR, ".")
        value: Any = environ[name]
        if _is_list(key):
            value = tuple(item.strip() for item in value.split(",") if item.strip())
        found.append((name, key, value))
    return found


# -- checks ---------------------------------------------------------------------------------------


def _check_key(key: str, source: str) -> None:
    keys = known_keys()
    if key in keys:
        return
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    hint = f"; did you mean `{close[0]}`?" if close else "; `meshd config show` lists all keys"
    raise BadConfig(f"unknown key `{key}` ({source}){hint}", param=key)


def _explain(error: ValidationError, sources: Mapping[str, str]) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"])
        source = next((v for k, v in sources.items() if key == k or key.startswith(f"{k}.")), "")
        given = "" if "key" in key else f" (given: {masked(problem['input'])!r})"
        lines.append(f"`{key}` from {source or 'default'}: {problem['msg']}{given}")
    return "; ".join(lines)


def _with_key_file(config: Config) -> Config:
    if config.api_key_file is None:
        return config
    if config.api_key is not None:
        raise BadConfig("`api_key` and `api_key_file` are both set; keep one")
    try:
        key = config.api_key_file.expanduser().read_text().strip()
    except OSError as error:
        raise BadConfig(
            f"`api_key_file` {config.api_key_file} cannot be read: {error.strerror}"
        ) from None
    if len(key) < 8:
        raise BadConfig(f"`api_key_file` {config.api_key_file}: a key has at least 8 characters")
    return config.model_copy(update={"api_key": key})


def _check_ports(config: Config) -> None:
    for key, address in (("listen", config.listen), ("peer_listen", config.peer_listen)):
        if split_address(address)[1] > 65_535:  # 0 lets the system choose
            raise BadConfig(f"`{key}` {address}: a port is 0 to 65535", param=key)
    for address in config.advertise:
        if not is_address(address) or not address.isascii() or len(address) > 255:
            raise BadConfig(
                f"`advertise` {address}: give HOST:PORT as others can dial it, port 1 to 65535",
                param="advertise",
            )


def check_exposure(config: Config) -> None:
    """Raises BadConfig if strangers could use the API, or a socket would have too long a name."""
    host, _ = config.listen_address
    if not is_loopback(host) and config.api_key is None:
        raise BadConfig(
            f"`listen` {config.listen} can be reached from other machines; set an API key "
            "(--api-key-file FILE) or listen on 127.0.0.1",
            param="listen",
        )
    socket_path = config.run_dir / "0123456789abcdef.sock"
    if len(os.fsencode(socket_path)) > 104:
        raise BadConfig(
            f"`data_dir` {config.data_dir} is too long: unix sockets in it would pass the "
            "system's limit of 107 bytes; choose a shorter --data-dir",
            param="data_dir",
        )


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        section, dot, name = key.partition(".")
        if dot:
            tree.setdefault(section, {})[name] = value
        else:
            tree[key] = value
    return tree


def _section_of(annotation: Any) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _is_list(key: str) -> bool:
    section, dot, name = key.partition(".")
    holder = Config.model_fields.get(section)
    if holder is None:
        return False
    if dot:
        inner = _section_of(holder.annotation)
        holder = inner.model_fields.get(name) if inner else None
    return holder is not None and tuple in (
        getattr(holder.annotation, "__origin__", None),
        *(getattr(a, "__origin__", None) for a in get_args(holder.annotation)),
    )
