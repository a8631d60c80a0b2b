"""The engines of this machine, and which one runs."""

from __future__ import annotations

import shutil
from pathlib import Path

from pydantic import ValidationError

from meshd.errors import EngineMissing, EngineRejected, NotFound
from meshd.kernel.files import write_atomic
from meshd.runtime.probe import SERVER, probe, sha256_of
from meshd.runtime.record import RuntimeRecord

RECORD = "record.json"


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
                records.append(RuntimeRecord.model_validate_json(path.read_bytes()))
            except (OSError, ValidationError):
                continue
        built = [r for r in records if r.build is not None]
        return tuple(sorted(built, key=lambda r: r.probed_at, reverse=True))

    def current(self) -> str | None:
        """The id that `use` chose."""
        try:
            return self._current.read_text().strip() or None
        except FileNotFoundError:
            return None

    def get(self, runtime_id: str) -> RuntimeRecord:
        """Raises NotFound, naming those there are."""
        for record in self.list():
            if record.id == runtime_id:
                return record
        known = ", ".join(r.id for r in self.list()) or "none"
        raise NotFound(f"no engine `{runtime_id}` was built here; there are: {known}")

    def use(self, runtime_id: str) -> RuntimeRecord:
        """Choose what the next start runs."""
        record = self.get(runtime_id)
        write_atomic(self._current, f"{record.id}\n".encode())
        return record

    def verify(self, runtime_id: str) -> tuple[str, ...]:
        """What is wrong with an engine: nothing, if every hash fits and it still runs."""
        record = self.get(runtime_id)
        findings = []
        for binary in record.binaries:
            path = Path(binary.path)
            if not path.is_file():
                findings.append(f"{path} is missing")
            elif sha256_of(path) != binary.sha256:
                findings.append(f"{path} is not the file that was built (its sha256 differs)")
        if not findings:
            try:
                seen = probe(Path(record.directory))
            except EngineRejected as error:
                findings.append(error.message)
            else:
                if seen.version != record.version:
                    findings.append(f"it says {seen.version}, the record {record.version}")
        return tuple(findings)

    def find(self, runtime_dir: Path | None) -> RuntimeRecord:
        """The engine to run:

        1. the one in `runtime_dir`, if that is given: it or nothing;
        2. the one chosen with `meshd runtime use`;
        3. the newest one built here whose files are unchanged;
        4. a llama-server on PATH, after a probe.

        Raises EngineMissing saying how to get one, or EngineRejected for 1.
        """
        if runtime_dir is not None:  # 1
            return self._adopt(runtime_dir.expanduser().absolute())
        built = [r for r in self.list() if r.unchanged()]
        chosen = self.current()
        for record in built:  # 2
            if record.id == chosen:
                return record
        if built:  # 3
            return built[0]
        on_path = shutil.which(SERVER)
        tried = ""
        if on_path is not None:  # 4
            try:
                return self._adopt(Path(on_path).parent)
            except EngineRejected as error:
                tried = f" (the one on PATH is not usable: {error.message})"
        raise EngineMissing(
            "there is no llama.cpp engine on this machine; `meshd runtime build --backend cpu` "
            f"builds one, --runtime-dir names a directory with yours{tried}"
        )

    def _adopt(self, directory: Path) -> RuntimeRecord:
        """Probe a directory, or remember the probe of its unchanged files."""
        remembered = self._remembered()
        known = remembered.get(str(directory))
        if known is not None and known.unchanged():
            return known
        record = probe(directory)
        remembered[str(directory)] = record
        lines = b"\n".join(r.model_dump_json().encode() for r in remembered.values())
        self.directory.mkdir(parents=True, exist_ok=True)
        write_atomic(self._adopted, lines)
        return record

    def _remembered(self) -> dict[str, RuntimeRecord]:
        try:
            lines = self._adopted.read_bytes().splitlines()
            records = [RuntimeRecord.model_validate_json(line) for line in lines]
        except (FileNotFoundError, ValidationError):
            return {}
        return {r.directory: r for r in records if r.unchanged()}
