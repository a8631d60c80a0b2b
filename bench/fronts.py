"""What stands between client and engine: nothing, nginx, an aiohttp proxy, LiteLLM, meshd."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from bench.chats import chat_status
from bench.compiled import binary
from bench.machine import first_line, versions
from bench.processes import (
    BenchError,
    Stable,
    accepts,
    argv_of,
    children_of,
    free_port,
    wait_for,
)

DIRECT, NGINX, AIOHTTP, LITELLM, MESHD = "direct", "nginx", "aiohttp", "litellm", "meshd"
START_LIMIT_S = 90.0
"""LiteLLM imports for half a minute on a slow machine."""
SLOTS = 1024
"""More than streams are ever open: nobody queues, the proxy alone is measured."""

_NGINX_CONF = """\
daemon off;
worker_processes 1;
pid {dir}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path {dir}/body;
  proxy_temp_path {dir}/proxy;
  fastcgi_temp_path {dir}/fastcgi;
  uwsgi_temp_path {dir}/uwsgi;
  scgi_temp_path {dir}/scgi;
  keepalive_requests 100000000;
  upstream engine {{
    server 127.0.0.1:{upstream};
    keepalive 512;
    keepalive_requests 100000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engine;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""

_LITELLM_AT_HOME = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOG": "ERROR",
    # Whatever else it would fetch: a benchmark does not leave the machine.
    "HTTPS_PROXY": "http://127.0.0.1:9",
}


@dataclass(frozen=True, slots=True)
class Front:
    """A front that answers chats on `port`."""

    name: str
    port: int
    model: str
    """What requests name as `model`."""
    proxy_pid: int | None
    """The process whose CPU and memory count; None for direct."""
    engine_pid: int
    """The mock behind it."""
    version: str
    other_pids: tuple[int, ...] = ()
    """Further processes of the benchmark on a request's way; placed with the proxy."""


@dataclass(frozen=True, slots=True)
class Missing:
    """A front that cannot be measured here, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Places:
    """Where a benchmark's processes live."""

    work_dir: Path
    """Temporary; removed at the end."""
    weights: Path
    """A GGUF that passes meshd's checks; the mock never opens it."""


class Bench:
    """Starts fronts over one shared mock engine; meshd gets a mock of its own, as it would an
    engine: a child on a unix socket."""

    def __init__(self, stable: Stable, places: Places) -> None:
        self._stable = stable
        self._places = places
        self._mock_port = free_port()
        mock = stable.start(
            "mock",
            [str(binary("mock_engine")), "--parallel", str(SLOTS)],
            env={"MOCK_TCP_PORT": str(self._mock_port)},
        )
        self._mock_pid = mock.pid
        self._wait_accepts("mock", mock, self._mock_port)

    def start(self, name: str) -> Front | Missing:
        """Raises BenchError if a front that is installed does not come up."""
        starts: Mapping[str, Callable[[], Front | Missing]] = {
            DIRECT: self._direct,
            NGINX: self._nginx,
            AIOHTTP: self._aiohttp,
            LITELLM: self._litellm,
            MESHD: self._meshd,
        }
        front = starts[name]()
        if isinstance(front, Front):
            try:
                self._wait_answers(front)
            except BenchError as error:
                raise BenchError(f"{name}: {error}\n{self._stable.log_of(name)}") from None
            if name == MESHD:
                return _with_engine(front)
        return front

    def _direct(self) -> Front:
        return Front(DIRECT, self._mock_port, "mock", None, self._mock_pid, "")

    def _nginx(self) -> Front | Missing:
        program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
        if program is None:
            return Missing(NGINX, "not installed (Debian: apt install nginx-light)")
        port, directory = free_port(), self._places.work_dir / "nginx"
        directory.mkdir()
        # As root its worker would be `nobody`, who must reach the temporary directories.
        user = "user root;\n" if Path("/proc/self").stat().st_uid == 0 else ""
        conf = directory / "nginx.conf"
        conf.write_text(
            user + _NGINX_CONF.format(dir=directory, port=port, upstream=self._mock_port)
        )
        master = self._stable.start(NGINX, [program, "-p", str(directory), "-c", str(conf)])
        self._wait_accepts(NGINX, master, port)
        wait_for(lambda: children_of(master.pid), limit_s=10, what="nginx has a worker")
        worker = children_of(master.pid)[0]
        return Front(NGINX, port, "mock", worker, self._mock_pid, first_line(program, "-v"))

    def _aiohttp(self) -> Front:
        port = free_port()
        argv = [sys.executable, "-m", "bench.aiohttp_proxy", str(port), str(self._mock_port)]
        child = self._stable.start(AIOHTTP, argv)
        version = f"aiohttp {versions('aiohttp')['aiohttp']}"
        return Front(AIOHTTP, port, "mock", child.pid, self._mock_pid, version)

    def _litellm(self) -> Front | Missing:
        program = shutil.which("litellm") or shutil.which(
            "litellm", path=str(Path(sys.executable).parent)
        )
        if program is None:
            return Missing(LITELLM, "not installed")
        port, conf = free_port(), self._places.work_dir / "litellm.yaml"
        upstream = f"http://127.0.0.1:{self._mock_port}/v1"
        parameters = {"model": "openai/mock", "api_base": upstream, "api_key": "none"}
        # Without a key, like the others here: it listens on loopback for some minutes.
        general = {"dangerously_permit_weak_or_unset_master_key": True}
        models = [{"model_name": "mock", "litellm_params": parameters}]
        # JSON is YAML.
        conf.write_text(json.dumps({"model_list": models, "general_settings": general}))
        argv = [program, "--config", str(conf), "--host", "127.0.0.1", "--port", str(port)]
        child = self._stable.start(LITELLM, [*argv, "--num_workers", "1"], env=_LITELLM_AT_HOME)
        version = first_line(program, "-v", env=_LITELLM_AT_HOME)
        return Front(LITELLM, port, "mock", child.pid, self._mock_pid, version)

    def _meshd(self) -> Front:
        work, port = self._places.work_dir, free_port()
        runtime = work / "runtime"
        runtime.mkdir()
        (runtime / "llama-server").symlink_to(binary("mock_engine"))
        argv = [str(Path(sys.executable).with_name("meshd")), "run"]
        argv += ["--runtime-dir", str(runtime), "--model", str(self._places.weights)]
        argv += ["--listen", f"127.0.0.1:{port}", "--data-dir", str(work / "data")]
        argv += ["--peer-listen", "127.0.0.1:0"]
        argv += ["--no-mdns", "--log-level", "warning"]
        settings = {"MESHD_ENGINE__PARALLEL": str(SLOTS), "XDG_CACHE_HOME": str(work / "cache")}
        child = self._stable.start(MESHD, argv, env=settings)
        name = self._places.weights.stem
        version = first_line(argv[0], "version")
        return Front(MESHD, port, name, child.pid, child.pid, version)

    def _wait_accepts(self, name: str, child: Popen[bytes], port: int) -> None:
        wait_for(
            lambda: accepts(port) or child.poll() is not None, limit_s=START_LIMIT_S, what=name
        )
        if child.poll() is not None:
            raise BenchError(f"{name} ended with {child.returncode}\n{self._stable.log_of(name)}")

    def _wait_answers(self, front: Front) -> None:
        def answers() -> bool:
            if front.proxy_pid is not None and not Path(f"/proc/{front.proxy_pid}/exe").exists():
                raise BenchError("it ended instead of serving")
            return chat_status(front.port, front.model) == 200

        wait_for(answers, limit_s=START_LIMIT_S, what="a chat is answered 200", step_s=0.1)


def _with_engine(front: Front) -> Front:
    """meshd's own mock is its child."""
    assert front.proxy_pid is not None
    for pid in children_of(front.proxy_pid):
        if "--alias" in argv_of(pid):
            return Front(front.name, front.port, front.model, front.proxy_pid, pid, front.version)
    raise BenchError("meshd runs no engine of its own")
