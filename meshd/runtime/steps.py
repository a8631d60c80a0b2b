"""Runs the programs of a build, hears how far they are, and says why one failed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from meshd.config import environment_of_children
from meshd.errors import BuildFailed, MeshdError, NoSpace

_STEP = re.compile(r"^\[(\d+)/(\d+)\]")
_GUARD = Path(__file__).with_name("guard.py")
_OOM_SCORE_ADJ = 500
"""A compiler is what the kernel should end first when memory runs out."""
_END_LIMIT_S = 10.0
"""How long ninja may take to end its compilers before it is killed."""
_LINES_KEPT = 400
_ABSENT = {
    "CUDA::cublas": "cuBLAS is missing: `apt install libcublas-dev-13-0` (the number is the "
    "toolkit's), `dnf install libcublas-devel-13-0` or `pacman -S cuda`",
    "cublas_v2.h": "cuBLAS' headers are missing: `apt install libcublas-dev-13-0` (the number is "
    "the toolkit's) or `dnf install libcublas-devel-13-0`",
    "CUDA Toolkit not found": "CUDA's headers and libraries are missing beside nvcc: `apt install "
    "cuda-toolkit-13-0` or `dnf install cuda-toolkit-13-0`, from NVIDIA's repository",
    "unsupported GNU version": "the host compiler is newer than this nvcc allows; install an older "
    "one and name it, as in NVCC_CCBIN=g++-13",
    'provided by "hipblas"': "hipBLAS is missing: `apt install hipblas-dev rocblas-dev` or `dnf "
    "install hipblas-devel rocblas-devel`",
    'provided by "SPIRV-Headers"': "the SPIR-V headers are missing: `apt install spirv-headers`, "
    "`dnf install spirv-headers-devel` or `pacman -S spirv-headers`",
    "Could NOT find Vulkan": "Vulkan's headers and loader are missing: `apt install libvulkan-dev "
    "glslc`, `dnf install vulkan-devel glslc` or `pacman -S vulkan-devel shaderc`",
}
"""What CMake or a compiler says when a part of a toolkit is absent, and what to install."""


def fraction_of(line: str) -> float | None:
    """How far ninja is, from `[7/224] Building …`; None for any other line."""
    match = _STEP.match(line)
    return int(match[1]) / max(1, int(match[2])) if match else None


def failure_of(program: str, status: int, lines: Sequence[str], log: Path) -> MeshdError:
    """The line that tells, out of the last ones that `program` wrote before it failed."""
    where = f"(all of it is in {log})"
    text = "\n".join(lines)
    if "No space left on device" in text:
        return NoSpace(
            f"{program} ran out of disk; make room, then build again: it goes on {where}"
        )
    if re.search(r"Killed signal terminated program|signal 9|: Killed$", text, re.MULTILINE):
        return BuildFailed(
            f"{program}: a compiler was killed, as a rule for want of memory; build again with "
            f"fewer at once: --jobs 1 {where}"
        )
    telling = [n for n, line in enumerate(lines) if re.search(r"\berror\b", line, re.IGNORECASE)]
    words = lines[telling[0]].strip() if telling else (lines[-1].strip() if lines else "no output")
    if words.startswith("CMake Error"):  # what is wrong stands below it
        below = (line.strip() for line in lines[telling[0] + 1 :])
        words = " ".join((words, next((line for line in below if line), "")))
    told = f"{words.strip()}; {remedy}" if (remedy := _remedy(text)) else words.strip()
    return BuildFailed(f"{program} failed with status {status}: {told} {where}")


def _remedy(text: str) -> str | None:
    return next((remedy for sign, remedy in _ABSENT.items() if sign in text), None)


def run_step(
    command: Sequence[str],
    log: Path,
    hear: Callable[[str], None],
    environ: Mapping[str, str] | None = None,
) -> None:
    """Run in a process group of its own, which ends with us on any way out, kill -9 included.

    Its output goes to `log` and, line by line, to `hear`. Raises BuildFailed or NoSpace.
    """
    last: deque[str] = deque(maxlen=_LINES_KEPT)
    # SIGTERM, not SIGKILL: ninja passes it on to its compilers, each in a group of its own.
    guard = [sys.executable, "-I", "-S", str(_GUARD), str(os.getpid()), str(_OOM_SCORE_ADJ)]
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        process = subprocess.Popen(
            [*guard, str(int(signal.SIGTERM)), "--", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
            env=environment_of_children(environ),
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                if line.startswith("FAILED:"):
                    last.clear()  # what came before was well
                last.append(line.rstrip())
                hear(line)
            status = process.wait()
        except BaseException:
            _end(process)
            raise
        finally:
            process.stdout.close()
    if status != 0:
        raise failure_of(Path(command[0]).name, status, tuple(last), log)


def _end(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        try:
            process.wait(_END_LIMIT_S)
            return
        except subprocess.TimeoutExpired:
            continue
