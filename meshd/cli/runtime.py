"""`meshd runtime …`: works without a daemon."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from meshd import config
from meshd.cli.options import json_option, print_json, size
from meshd.errors import EngineMissing, EngineRejected

if TYPE_CHECKING:
    from meshd.runtime.record import RuntimeRecord
    from meshd.runtime.registry import Registry


def _architectures(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> str | None:
    """`sm_90,12.1` in CMake's words; `native` is what this machine has, the default."""
    if value is None or value == "native":
        return None
    from meshd.runtime.nvcc import parse_architectures

    try:
        return ";".join(parse_architectures(value))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.group()
def runtime() -> None:
    """The llama.cpp engines of this machine."""


@runtime.command("ls")
@json_option
def list_runtimes(as_json: bool) -> int:
    """List the engines of this machine; `*` marks the one the next start runs."""
    from meshd.runtime.build import unfinished

    registry = _registry()
    records = list(registry.list())
    running = _running(registry)
    if running is not None and running.id not in {r.id for r in records}:
        records.append(running)
    current = running.id if running is not None else None
    if as_json:
        print_json([{**r.model_dump(mode="json"), "current": r.id == current} for r in records])
        return 0
    if not records:
        click.echo("there is no engine here; `meshd runtime build --backend cpu` builds one")
    for record in records:
        mark = "*" if record.id == current else " "
        state = "" if record.unchanged() else "  CHANGED since it was built; `meshd runtime verify`"
        origin = "" if record.build is not None else "  (found on PATH)"
        code = f"  {_architectures_of(record)}" if _architectures_of(record) else ""
        click.echo(f"{mark} {record.id}  {record.version}{code}  {record.directory}{origin}{state}")
    for name, work, size_bytes in unfinished(_cache_dir()):
        click.echo(
            f"- {name}  not finished, {size(size_bytes)}; the same build command goes on, "
            f"`rm -r {work}` gives it up"
        )
    return 0


def _architectures_of(record: RuntimeRecord) -> str:
    """`sm_90 sm_121` for an engine built for CUDA; empty for others."""
    listed = record.build.cmake_cache.get("CMAKE_CUDA_ARCHITECTURES") if record.build else None
    return " ".join(f"sm_{word}" for word in listed.split(";")) if listed else ""


@runtime.command()
@click.option(
    "--backend",
    type=click.Choice(["cpu", "cuda", "rocm", "vulkan", "metal"]),
    required=True,
    help="What it computes on.",
)
@click.option(
    "--cuda-arch",
    metavar="LIST",
    callback=_architectures,
    help="CUDA architectures, as in 121 or 90;100 (default: those of this machine's GPUs).",
)
@click.option("--source", metavar="S", help="Directory, tarball or git+URL@TAG (default: pinned).")
@click.option("--jobs", type=click.IntRange(min=1), help="Compilers at once.")
@click.option("--if-missing", is_flag=True, help="Do nothing if there is a usable engine.")
@json_option
def build(
    backend: str,
    cuda_arch: str | None,
    source: str | None,
    jobs: int | None,
    if_missing: bool,
    as_json: bool,
) -> int:
    """Build an engine from source; an interrupted build goes on where it stopped."""
    if cuda_arch is not None and backend != "cuda":
        raise click.UsageError(f"--cuda-arch goes with --backend cuda, not {backend}")
    from meshd.runtime.build import build as run_build
    from meshd.runtime.choices import BuildOptions

    record = _running(_registry()) if if_missing else None
    if record is None:
        options = BuildOptions(backend, cuda_arch, source, jobs)
        try:
            with _Progress() as show:
                record = run_build(options, _cache_dir(), show)
        except KeyboardInterrupt:
            click.echo("interrupted; the same command goes on from here", err=True)
            return 130
    if as_json:
        print_json(record.model_dump(mode="json"))
    else:
        click.echo(f"engine {record.id}: {record.version}")
    return 0


@runtime.command()
@click.argument("runtime_id", required=False, metavar="[ID]")
@json_option
def verify(runtime_id: str | None, as_json: bool) -> int:
    """Hash the files of an engine, or of all, and see whether they still run."""
    registry = _registry()
    ids = [registry.get(runtime_id).id] if runtime_id else [r.id for r in registry.list()]
    findings = {name: registry.verify(name) for name in ids}
    if as_json:
        print_json({name: list(found) for name, found in findings.items()})
    elif not findings:
        click.echo("no engine was built here")
    for name, found in findings.items() if not as_json else ():
        click.echo(f"{name}: {'ok' if not found else '; '.join(found)}")
    return 1 if any(findings.values()) else 0


@runtime.command()
@click.argument("runtime_id", metavar="ID")
def use(runtime_id: str) -> int:
    """Choose the engine the next start runs."""
    record = _registry().use(runtime_id)
    click.echo(f"{record.id} will run from the next start of meshd on")
    return 0


def _cache_dir() -> Path:
    return config.load().config.cache_dir


def _registry() -> Registry:
    from meshd.runtime.registry import Registry

    return Registry(_cache_dir())


def _running(registry: Registry) -> RuntimeRecord | None:
    try:
        return registry.find(None)
    except (EngineMissing, EngineRejected):
        return None


class _Progress:
    """A bar on a terminal, a line each tenth elsewhere."""

    def __enter__(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self._bar: Progress | None = None
        self._said: tuple[str, int] | None = None
        if not console.is_terminal:
            return self._line
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"),
            TimeElapsedColumn(), console=console,
        )  # fmt: skip
        self._bar.start()
        self._task = self._bar.add_task("", total=1.0)
        return self._draw

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _draw(self, words: str, fraction: float) -> None:
        assert self._bar is not None
        self._bar.update(self._task, description=words, completed=fraction)

    def _line(self, words: str, fraction: float) -> None:
        tenth = (words, int(fraction * 10))
        if tenth != self._said:
            self._said = tenth
            click.echo(f"{words} {fraction:.0%}" if fraction else words, err=True)
