"""`meshd gpus`: what drivers list, what the engine lists, and what is wrong. Needs no daemon."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from meshd.cli.options import console, json_option, load_config, print_json, size
from meshd.errors import EngineMissing, EngineRejected

if TYPE_CHECKING:
    from meshd.runtime.devices import EngineList, Gpu, Reading
    from meshd.runtime.record import RuntimeRecord


@click.command()
@click.option(
    "--runtime-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory of the engine to ask (default: the one the next start runs).",
)
@json_option
def gpus(runtime_dir: Path | None, as_json: bool) -> int:
    """Devices of this machine: as the drivers list them, as the engine's own binary lists them,
    and where the two disagree."""
    from meshd.runtime.devices import agree, take_reading

    reading = take_reading()
    listing, engine = ask_engine(runtime_dir)
    if listing is not None:
        reading = agree(reading, listing, os.environ)
    notes = [*(f"{d.vendor}: {d.problem}" for d in reading.drivers if d.problem), engine]
    if as_json:
        print_json(as_data(reading))
        for note in notes:
            click.echo(note, err=True)
        return 0
    out = console()
    out.print(_table(reading))
    for line in (*_problems(reading), *_processes(reading), *notes):
        out.print(line, markup=False)
    return 0


def ask_engine(runtime_dir: Path | None) -> tuple[EngineList | None, str]:
    """What the engine's own binary lists, None if there is no engine; and a line about it."""
    from meshd.runtime.devices import EngineList, parse_list
    from meshd.runtime.probe import ask_listing
    from meshd.runtime.registry import Registry

    configured = load_config(None)
    try:
        record = Registry(configured.cache_dir).find(runtime_dir or configured.runtime_dir)
    except (EngineMissing, EngineRejected) as error:
        return None, f"engine: {error.message}"
    built_for = _built_for(record)
    try:
        listing = parse_list(ask_listing(Path(record.server_path)), built_for)
    except EngineRejected as error:
        return EngineList(built_for, (), (error.message,)), f"engine {record.id}: {error.message}"
    names = ", ".join(device.name for device in listing.devices) or "no GPU"
    return listing, f"engine {record.id}, built for {built_for}, lists {names}"


def _built_for(record: RuntimeRecord) -> str:
    """An engine that was adopted while its device was out of reach was recorded as one for the
    CPU; the libraries beside it tell better."""
    from meshd.runtime.proof.backends import DEVICE_PREFIXES, linked_as

    for backend in DEVICE_PREFIXES if record.build is None else ():
        if any(b.name.startswith(f"libggml-{linked_as(backend)}.") for b in record.binaries):
            return backend
    return record.backend


def as_data(reading: Reading) -> list[dict[str, Any]]:
    """The devices for `--json`: fields of `devices` in `/mesh/status`, and what only this tells."""
    gpus = [
        {
            **asdict(gpu.view),
            "index": gpu.index,
            "parent": gpu.parent,
            "processes": None if gpu.processes is None else [asdict(p) for p in gpu.processes],
        }
        for gpu in reading.gpus
    ]
    cpu = {**asdict(reading.cpu), "index": None, "parent": None, "processes": None}
    return [*gpus, cpu]


def _table(reading: Reading) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    headings = ("DEVICE", "BACKEND", "ENGINE", "FREE", "MEMORY", "COMPUTE", "DRIVER", "UUID")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    parents = [gpu.parent for gpu in reading.gpus]
    for device, parent in zip(reading.devices, [*parents, None], strict=True):
        mark = "" if device.problem is None else " ✗"
        table.add_row(
            ("  " if parent else "") + escape(device.name) + mark,
            device.backend,
            device.engine_name or "-",
            size(device.memory_free_bytes),
            size(device.memory_total_bytes) + (" (the machine's)" if device.unified else ""),
            device.compute_capability or "-",
            device.driver or "-",
            device.uuid or "-",
        )
    return table


def _problems(reading: Reading) -> list[str]:
    return [f"✗ {_called(g)}: {g.view.problem}" for g in reading.gpus if g.view.problem]


def _processes(reading: Reading) -> list[str]:
    lines = []
    for gpu in reading.gpus:
        for process in gpu.processes or ():
            name = process.name or "not seen from here"
            used = process.used_bytes
            told = "memory, not told how much" if used is None else size(used)
            lines.append(f"{_called(gpu)}: pid {process.pid} ({name}) uses {told}")
    return lines


def _called(gpu: Gpu) -> str:
    """The name, with the engine's or the driver's number: there may be eight alike."""
    number = gpu.view.engine_name or (None if gpu.index is None else f"#{gpu.index}")
    return f"{gpu.view.name} ({number})" if number else gpu.view.name
