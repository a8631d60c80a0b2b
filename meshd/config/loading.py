"""How a configuration comes to be: its layers, merged, checked, explained.

Flags over `MESHD_*` environment over file over defaults. Every value knows where it came from, so
that `meshd config show` can say it and an error can name the place to mend.
"""

from __future__ import annotations

import difflib
import os
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from meshd.config.addresses import is_address, is_loopback, masked, split_address
from meshd.config.environment import ENVIRONMENT_PREFIX, SECTION_SEPARATOR, home_of
from meshd.config.settings import Config, Section
from meshd.errors import BadConfig


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
    _check_client(config)
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


# -- layers ---------------------------------------------------------------------------------------


def _default_data_dir(environ: Mapping[str, str]) -> str:
    for variable in ("MESHD_DATA_DIR", "STATE_DIRECTORY"):
        if environ.get(variable):
            return environ[variable].split(":")[0]
    base = environ.get("XDG_DATA_HOME") or str(home_of(environ) / ".local/share")
    return f"{base}/meshd"


def _defaults(environ: Mapping[str, str], data_dir: Path) -> dict[str, Any]:
    host_name = socket.gethostname().split(".")[0]
    cleaned = "".join(c if c.isalnum() or c in "._-" else "-" for c in host_name).lstrip("._-")
    return {
        "name": cleaned or "node",
        "data_dir": str(data_dir),
        "cache_dir": environ.get("XDG_CACHE_HOME") or str(home_of(environ) / ".cache"),
    }


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


def _check_client(config: Config) -> None:
    """A client writes no deployments: what it was started with would be forgotten silently."""
    if not config.client:
        return
    if config.model:
        raise BadConfig("a client node hosts no models; leave --model out", param="model")
    if config.auto:
        raise BadConfig("a client node chooses no models; leave --auto out", param="auto")


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
