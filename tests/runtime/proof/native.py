"""An engine that is a real program: what the kernel runs for it can be seen, and it links a library
that is named like a backend's."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.runtime.fake_engine import make_engine

SOURCE = r"""
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
int backend(void);
int main(int argc, char **argv) {
    char path[PATH_MAX], line[4096];
    ssize_t length = readlink("/proc/self/exe", path, sizeof path - 64);
    if (length < 0 || argc < 2) return 2;
    path[length] = 0;
    sprintf(strrchr(path, '/') + 1, "%.40s.txt", argv[1] + 2);
    FILE *file = fopen(path, "r");
    if (!file) return backend();
    while (fgets(line, sizeof line, file)) fputs(line, stdout);
    return 0;
}
"""


def compile_engine(directory: Path, *backends: str) -> None:
    """Leave a llama-server in `directory` that loads `libggml-BACKEND.so` for each."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in backends:
        (directory / f"{name}.c").write_text("int backend(void) { return 0; }\n")
        _cc(directory, "-shared", "-fPIC", "-o", f"libggml-{name}.so", f"{name}.c",
            f"-Wl,-soname,libggml-{name}.so")  # fmt: skip
    (directory / "server.c").write_text(SOURCE)
    libraries = [f"-lggml-{name}" for name in backends]
    _cc(directory, "-o", "llama-server", "server.c", "-L.", "-Wl,--no-as-needed", *libraries,
        "-Wl,-rpath,$ORIGIN")  # fmt: skip
    for path in directory.glob("*.c"):
        path.unlink()


def place_engine(template: Path, directory: Path, **options: str) -> Path:
    """The compiled engine in a directory of its own, with the answers of `make_engine`."""
    make_engine(directory, **options)
    for path in template.iterdir():
        (directory / path.name).unlink(missing_ok=True)
        (directory / path.name).write_bytes(path.read_bytes())
        (directory / path.name).chmod(0o755)
    return directory


def _cc(directory: Path, *arguments: str) -> None:
    subprocess.run(["cc", *arguments], cwd=directory, check=True)
