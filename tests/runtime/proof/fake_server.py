"""A llama-server that behaves as `mode.txt` beside it says. Speaks HTTP on a unix socket.

modes: gpu (all is well), cpu (claims layers on the device, weights on the CPU), partial (not all
layers), mute (ready, but no token ever comes), empty (tokens without timings), loading (never
ready), crash, memory, device (knows no such device).
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.runtime.fake_engine import program

SCRIPT = r"""
import json, os, socketserver, sys, time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

here = Path(__file__).parent
mode = (here / "mode.txt").read_text().strip()
args = dict(zip(sys.argv[1::1], sys.argv[2::1]))
(here / "argv.json").write_text(json.dumps(sys.argv[1:]))
(here / "pid.txt").write_text(str(os.getpid()))

def say(line):
    print(line, flush=True)

say("0.00.001 I srv  llama_server: initializing ...")
device = args["--device"]
if mode == "device":
    say(f'error while handling argument "--device": invalid device: {device}')
    sys.exit(1)
if mode == "memory":
    say("ggml_backend_cuda_buffer_type_alloc_buffer: allocating 4.60 MiB on device 0: "
        "cudaMalloc failed: out of memory")
    sys.exit(1)
if mode == "crash":
    say("CUDA error: no kernel image is available for execution on the device")
    os.abort()
buffer = "CPU_Mapped" if mode == "cpu" else device
done = 3 if mode == "partial" else 5
say(f"0.00.017 I load_tensors: offloaded {done}/5 layers to GPU")
say("0.00.018 I load_tensors:   CPU_Mapped model buffer size =     0.25 MiB")
say(f"0.00.018 I load_tensors:   {buffer} model buffer size =     4.60 MiB")

class Handler(BaseHTTPRequestHandler):
    def address_string(self):
        return "unix"
    def log_message(self, *_):
        pass
    def answer(self, body, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        if mode == "loading":
            self.answer({"error": {"message": "Loading model"}}, 503)
        elif self.path == "/health":
            self.answer({"status": "ok"})
        elif self.path == "/v1/models":
            self.answer({"data": [{"id": "m", "aliases": args["--alias"].split(",")}]})
        else:
            self.answer({"total_slots": 1, "default_generation_settings": {"n_ctx": 512}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if mode == "mute":
            time.sleep(600)
        timings = {} if mode == "empty" else {"predicted_per_second": 812.5}
        self.answer({"content": "x" * asked["n_predict"], "timings": timings})

class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

Server(args["--host"], Handler).serve_forever()
"""


def make_server(directory: Path, mode: str) -> Path:
    """The program, in a directory that will also hold what it was asked and its pid."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "mode.txt").write_text(mode)
    (directory / "server.py").write_text(SCRIPT)
    return program(
        directory / "llama-server", f'exec "{sys.executable}" "{directory}/server.py" "$@"\n'
    )
