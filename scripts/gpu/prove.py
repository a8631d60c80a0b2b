"""The steps of prove.sh: one finding each, printed as a table at the end."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORK = Path(os.environ["WORK"]).absolute()
API_PORT = 19337
READY_S = 240.0
LAYERS, WIDTH, FEED_FORWARD = 48, 1024, 8192
"""A model of 2.6 GB."""
TOKENS = 256


@dataclass(frozen=True)
class Finding:
    what: str
    good: bool
    seen: str


class Lab:
    """Commands of meshd in a cache and a data directory of their own."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.environ = {
            **{k: v for k, v in os.environ.items() if not k.startswith("MESHD_")},
            "XDG_CACHE_HOME": str(WORK / "cache"),
            "HF_HOME": str(WORK / "hf"),
        }
        self.model = WORK / "prove-F16.gguf"

    def note(self, what: str, good: bool, seen: str) -> None:
        self.findings.append(Finding(what, good, seen))
        print(f"{'✓' if good else '✗'} {what}: {seen}", flush=True)

    def meshd(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "meshd", *words],
            env={**self.environ, **environ},
            capture_output=True,
            text=True,
        )

    def told(self, *words: str, **environ: str) -> Any:
        """The JSON a command prints."""
        done = self.meshd(*words, "--json", **environ)
        if not done.stdout.strip():
            raise SystemExit(f"meshd {' '.join(words)}: {done.stderr}")
        return json.loads(done.stdout)

    def build(self, backend: str) -> dict[str, Any]:
        began = time.monotonic()
        words = ["runtime", "build", "--backend", backend]
        if source := os.environ.get("SOURCE"):
            words += ["--source", source]
        if jobs := os.environ.get("JOBS"):
            words += ["--jobs", jobs]
        done = subprocess.run(
            [sys.executable, "-m", "meshd", *words], env=self.environ, stdout=subprocess.PIPE
        )
        seconds = time.monotonic() - began
        found = [r for r in self.told("runtime", "ls") if r["backend"] == backend and r["build"]]
        self.note(
            f"build of the {backend} engine",
            done.returncode == 0 and bool(found),
            f"{found[0]['id'] if found else 'none'} in {seconds:.0f} s",
        )
        if not found:
            raise SystemExit(self.table())
        engine: dict[str, Any] = found[0]
        return engine

    @contextmanager
    def daemon(self, *flags: str, **environ: str) -> Iterator[Daemon]:
        data = WORK / "data"
        shutil.rmtree(data, ignore_errors=True)
        words = ["run", "--data-dir", str(data), "--listen", f"127.0.0.1:{API_PORT}"]
        words += ["--peer-listen", "127.0.0.1:0", "--no-mdns", "--config", str(self.talkative())]
        words += flags
        with (WORK / "daemon.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "meshd", *words],
                env={**self.environ, **environ},
                stderr=log,
            )
        try:
            yield Daemon(process, data)
        finally:
            process.terminate()
            process.wait(60)

    def talkative(self) -> Path:
        """A configuration whose engines tell where their layers went."""
        path = WORK / "config.toml"
        path.write_text('[engine]\nextra_args = ["--verbosity", "4"]\n')
        return path

    def table(self) -> str:
        width = max(len(f.what) for f in self.findings)
        lines = [f"| {'what':<{width}} | | seen |", f"|{'-' * (width + 2)}|---|---|"]
        lines += [
            f"| {f.what:<{width}} | {'✓' if f.good else '✗'} | {f.seen} |" for f in self.findings
        ]
        return "\n".join(lines)


class Daemon:
    def __init__(self, process: subprocess.Popen[bytes], data_dir: Path) -> None:
        self.process = process
        self.data_dir = data_dir

    def request(self, method: str, path: str, body: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", API_PORT, timeout=300)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"})
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def wait(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Its status when `condition` holds, or the last one when time is up or it has ended."""
        status: dict[str, Any] = {}
        until = time.monotonic() + READY_S
        while time.monotonic() < until and self.process.poll() is None:
            try:
                status = self.request("GET", "/mesh/status")
            except OSError:
                pass
            else:
                if condition(status):
                    break
            time.sleep(0.5)
        return status


def smi() -> list[list[str]]:
    query = "name,uuid,memory.total,compute_cap,driver_version"
    out = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [[word.strip() for word in line.split(",")] for line in out.strip().splitlines()]


def gpus(lab: Lab) -> None:
    told = [d for d in lab.told("gpus") if d["backend"] == "cuda"]
    seen = smi()
    same = len(told) == len(seen) and all(
        (d["name"], d["uuid"], d["compute_capability"], d["driver"]) == (s[0], s[1], s[3], s[4])
        and abs(d["memory_total_bytes"] - float(s[2]) * 2**20) < 0.02 * d["memory_total_bytes"]
        and d["engine_name"]
        and d["problem"] is None
        for d, s in zip(told, seen, strict=True)
    )
    names = ", ".join(f"{d['name']} ({d['engine_name']}, {d['problem'] or 'agreed'})" for d in told)
    lab.note("`meshd gpus` = nvidia-smi", same, names or "none")


def doctor(lab: Lab, what: str, *, failing: str | None = None, **environ: str) -> None:
    """All green, or exactly what `failing` names among what failed."""
    findings = lab.told("doctor", "--data-dir", str(WORK / "data"), **environ)
    failed = [f"{f['step']}: {f['evidence']}" for f in findings if f["state"] == "failed"]
    good = not failed if failing is None else any(failing in line for line in failed)
    lab.note(what, good, "; ".join(failed)[:300] or f"{len(findings)} checks, none failed")


def served(lab: Lab) -> None:
    """The large model on the GPU, and the proof."""
    if not lab.model.exists():
        from meshd.cache.builtin import write_model

        write_model(lab.model, layers=LAYERS, width=WIDTH, feed_forward=FEED_FORWARD, name="prove")
    name = lab.model.stem
    with lab.daemon("--require-gpu", "--model", str(lab.model)) as daemon:
        status = daemon.wait(
            lambda s: (
                any(m["id"] == name and m["state"] == "ready" for m in s["models"])
                and s["runtime"]["proof"]["level"] == "runtime"
            )
        )
        runtime = status.get("runtime") or {}
        proof = runtime.get("proof") or {}
        lab.note(
            "proof on CUDA0",
            runtime.get("backend") == "cuda" and bool(proof.get("passed")),
            f"{runtime.get('backend')}, {proof.get('level')}; "
            + "; ".join((proof.get("evidence") or ["nothing"])[-4:])[:400]
            + (f"; {proof['problem']}" if proof.get("problem") else ""),
        )
        body = {"model": name, "max_tokens": TOKENS, "ignore_eos": True,
                "messages": [{"role": "user", "content": "Say something long"}]}  # fmt: skip
        answer = daemon.request("POST", "/v1/chat/completions", body)
        timings = answer.get("timings", {})
        log = "".join(p.read_text(errors="replace") for p in daemon.data_dir.glob("logs/**/*.log*"))
        offload = [line for line in log.splitlines() if "offloaded" in line]
        apps = subprocess.run(
            ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"],
            capture_output=True, text=True,
        ).stdout.strip().replace("\n", "; ")  # fmt: skip
        lab.note(
            f"{lab.model.stat().st_size / 1e9:.1f} GB served from the GPU",
            bool(timings.get("predicted_per_second"))
            and any(f"{LAYERS + 1}/{LAYERS + 1}" in line for line in offload),
            f"{timings.get('predicted_per_second', 0):.0f} tok/s, "
            f"prompt {timings.get('prompt_per_second', 0):.0f} tok/s, "
            f"{offload[-1].split(':')[-1].strip() if offload else 'no offload line'}, "
            f"nvidia-smi: {apps or 'no process listed'}",
        )
        doctor(lab, "doctor beside the running node")


def refused(lab: Lab, what: str, *, word: str, **environ: str) -> None:
    """`--require-gpu` does not start; without it the node says `cpu` and why."""
    with lab.daemon("--require-gpu", **environ) as daemon:
        try:
            code: int | None = daemon.process.wait(READY_S)
        except subprocess.TimeoutExpired:
            code = None
    lines = (WORK / "daemon.log").read_text().strip().splitlines() or ["nothing"]
    lab.note(f"{what}: --require-gpu", code == 78, f"exit {code}: {lines[-1][-200:]}")
    with lab.daemon(**environ) as daemon:
        status = daemon.wait(
            lambda s: bool(s["runtime"]) and word in (s["runtime"]["proof"]["problem"] or "")
        )
    runtime = status.get("runtime") or {}
    problem = (runtime.get("proof") or {}).get("problem") or ""
    lab.note(
        f"{what}: said to be", runtime.get("backend") == "cpu" and word in problem,
        f"{runtime.get('backend')}, {problem[:250]}",
    )  # fmt: skip


def lies(lab: Lab, cuda: dict[str, Any]) -> None:
    refused(lab, "no device visible", word="lists no such device", CUDA_VISIBLE_DEVICES="")
    cpu = lab.build("cpu")
    lab.meshd("runtime", "use", cpu["id"])
    doctor(lab, "CPU engine beside a GPU", failing="backend")
    lab.meshd("runtime", "use", cuda["id"])
    server = Path(cuda["directory"]) / "llama-server"
    fresh = server.with_suffix(".fresh")
    shutil.copy2(server, fresh)
    try:
        status = server.stat()
        shutil.copyfile(Path(cpu["directory"]) / "llama-server", server)
        os.utime(server, ns=(status.st_atime_ns, status.st_mtime_ns))
        verified = lab.meshd("runtime", "verify", cuda["id"])
        lab.note(
            "old binary put back: verify",
            verified.returncode == 1,
            (verified.stdout + verified.stderr).strip()[:300],
        )
        doctor(lab, "old binary put back: doctor", failing="installed")
    finally:
        fresh.replace(server)
    verified = lab.meshd("runtime", "verify", cuda["id"])
    lab.note("the fresh one again", verified.returncode == 0, verified.stdout.strip()[:200])


def main() -> int:
    lab = Lab()
    steps = os.environ.get("STEPS", "all")
    cuda = lab.build("cuda")
    if steps != "build":
        lab.meshd("runtime", "use", cuda["id"])
        gpus(lab)
        doctor(lab, "doctor before the first start")
        served(lab)
        lies(lab, cuda)
    print("\n" + lab.table())
    return 0 if all(finding.good for finding in lab.findings) else 1


if __name__ == "__main__":
    sys.exit(main())
