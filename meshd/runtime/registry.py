"""The engines of this machine, and which one runs."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

from pydantic import ValidationError

from meshd.errors import EngineMissing, EngineRejected, NotFound
from meshd.kernel.files import write_atomic
from meshd.runtime.probe import SERVER, engine_files, probe, sha256_of
from meshd.runtime.proof.binary import read_binary
from meshd.runtime.proof.evidence import Evidence
from meshd.runtime.proof.judge import judge
from meshd.runtime.record import RuntimeRecord, cpu_features

RECORD = "record.json"
REMEMBERED_LIMIT = 16
"""Adopted directories whose probe is kept; the oldest goes first."""

log = logging.getLogger(__name__)


class Registry:
    """`<cache>/meshd/runtimes/<id>/`, each with a `record.json`; `current` names the one in use.

    What was adopted from elsewhere is remembered in `adopted.json`, so that it is probed again
    only when its files changed. Blocking.
    """

    def __init__(self, cache_dir: Path) -> None:
        self.directory = cache_dir / "meshd" / "runtimes"
        self._current = self.directory / "current"
        self._adopted = self.directory / "adopted.json"

    def list(self) -> tuple[RuntimeRecord, ...]:
        """Engines built here, newest first. One without a readable record is left out."""
        records = []
        for path in self.directory.glob(f"*/{RECORD}"):
            try:
                record = RuntimeRecord.model_validate_json(path.read_bytes())
            except (OSError, ValidationError):
                continue
            # A directory of another name is one whose publishing was interrupted.
            if record.build is not None and record.id == path.parent.name:
                records.append(record.placed_in(path.parent))
        return tuple(sorted(records, key=lambda r: r.probed_at, reverse=True))

    def current(self) -> str | None:
        """The id that `use` chose."""
        try:
            return self._current.read_text().strip() or None
        except (OSError, UnicodeDecodeError):
            return None

    def get(self, runtime_id: str) -> RuntimeRecord:
        """Raises NotFound, naming those there are."""
        for record in self.list():
            if record.id == runtime_id:
                return record
        known = ", ".join(r.id for r in self.list()) or "none"
        raise NotFound(f"no engine `{runtime_id}` was built here; there are: {known}")

    def use(self, runtime_id: str) -> RuntimeRecord:
        """Choose what the next start runs. Raises NotFound, or EngineRejected if its files are not
        those that were built."""
        record = self.get(runtime_id)
        if not record.unchanged():
            findings = "; ".join(self.verify(runtime_id)) or "its files have changed"
            raise EngineRejected(f"{runtime_id} cannot be used: {findings}; build it again")
        write_atomic(self._current, f"{record.id}\n".encode())
        return record

    def verify(self, runtime_id: str) -> tuple[str, ...]:
        """What is wrong with an engine: nothing, if every hash fits, it still runs, and the first
        layer of its proof holds."""
        record = self.get(runtime_id)
        findings: list[str] = []
        for binary in record.binaries:
            path = Path(binary.path)
            if not path.is_file():
                findings.append(f"{path} is missing")
            elif sha256_of(path) != binary.sha256:
                findings.append(f"{path} is not the file that was built (its sha256 differs)")
        known = {binary.name for binary in record.binaries}
        findings += [
            f"{path} does not belong to what was built"
            for path in engine_files(Path(record.directory))
            if path.name not in known
        ]
        if not findings:
            try:
                seen = probe(Path(record.directory))
            except EngineRejected as error:
                findings.append(error.message)
            else:
                if seen.version != record.version:
                    findings.append(f"it says {seen.version}, the record {record.version}")
        if not findings:
            evidence = Evidence(record.backend, time.time(), read_binary(record))
            findings += [layer.problem for layer in judge(evidence).layers if layer.problem]
        return tuple(findings)

    def find(self, runtime_dir: Path | None) -> RuntimeRecord:
        """The engine to run:

        1. the one in `runtime_dir`, if that is given: it or nothing;
        2. the one chosen with `meshd runtime use`;
        3. the newest one built here, for this processor, whose files are unchanged; one that sees
           no device it was built for only if there is no other;
        4. a llama-server on PATH, after a probe.

        Raises EngineMissing saying how to get one, or EngineRejected for 1.
        """
        if runtime_dir is not None:  # 1
            directory = runtime_dir.expanduser().absolute()
            # People name the build directory too.
            if not (directory / SERVER).is_file() and (directory / "bin" / SERVER).is_file():
                directory /= "bin"
            return self._adopt(directory)
        built = [r for r in self.list() if r.unchanged()]
        chosen = self.current()
        for record in built:  # 2
            if record.id == chosen:
                return record
        if chosen is not None:
            log.warning("engine %s, chosen with `meshd runtime use`, is gone or changed", chosen)
        cpu = cpu_features()
        fitting = [r for r in built if r.build is None or r.build.cpu in ("", cpu)]
        if fitting:  # 3
            return next((r for r in fitting if r.lists_its_devices), fitting[0])
        on_path = shutil.which(SERVER)
        tried = ""
        if on_path is not None:  # 4
            try:
                return self._adopt(_home_of(Path(on_path).absolute()))
            except EngineRejected as error:
                tried = f" (the one on PATH is not usable: {error.message})"
        if built:
            strange = ", ".join(record.id for record in built)
            tried += f" ({strange}: built on another processor)"
        raise EngineMissing(
            "there is no llama.cpp engine for this machine; `meshd runtime build --backend cpu` "
            f"builds one, --runtime-dir names a directory with yours{tried}"
        )

    def _adopt(self, directory: Path) -> RuntimeRecord:
        """Probe a directory, or remember the probe of its unchanged files."""
        remembered = self._remembered()
        known = remembered.pop(str(directory), None)
        if known is not None and _same_files(known, directory):
            return known
        record = probe(directory)
        remembered[str(directory)] = record
        kept = list(remembered.values())[-REMEMBERED_LIMIT:]
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomic(self._adopted, b"\n".join(r.model_dump_json().encode() for r in kept))
        except OSError as error:  # a full or read-only cache costs the next start a probe, no more
            log.warning("probe of %s cannot be remembered: %s", directory, error)
        return record

    def _remembered(self) -> dict[str, RuntimeRecord]:
        try:
            lines = self._adopted.read_bytes().splitlines()
            records = [RuntimeRecord.model_validate_json(line) for line in lines]
        except (OSError, ValidationError):
            return {}
        return {r.directory: r for r in records}


def _same_files(record: RuntimeRecord, directory: Path) -> bool:
    """Whether `directory` still holds the engine of `record`: no file changed, gone or added."""
    names = {path.name for path in engine_files(directory)}
    return names == {binary.name for binary in record.binaries} and record.unchanged()


def _home_of(program: Path) -> Path:
    """Where the program on PATH really lies: its libraries and its sisters are there, not beside a
    link to it. A link to a launcher of another name leads nowhere useful."""
    real = program.resolve()
    return real.parent if real.name == program.name else program.parent
