"""What is read off the files of an engine: real programs, real ELF files, every swap noticed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from meshd.runtime.devices import Driver, Reading
from meshd.runtime.probe import probe
from meshd.runtime.proof import binary
from meshd.runtime.proof.backend import read_backend
from meshd.runtime.proof.binary import executed, linked_backends, read_binary
from meshd.runtime.proof.elf import needed
from meshd.runtime.proof.evidence import Evidence
from meshd.runtime.proof.judge import Verdict, judge
from meshd.runtime.record import BuildFacts, BuiltFile, RuntimeRecord
from tests.runtime.fake_engine import make_engine, program
from tests.runtime.proof import pieces
from tests.runtime.proof.native import place_engine

FACTS = BuildFacts(
    source="toy", source_sha256=None, commit="abcdef0", cmake_args=(),
    cmake_cache={"GGML_CUDA": "ON", "GGML_RPC": "ON", "CMAKE_CUDA_ARCHITECTURES": "90"},
    compiler="c++", built_at=0.0, cache_written_at=1.0,
)  # fmt: skip


def built(directory: Path) -> RuntimeRecord:
    record = probe(directory, runtime_id="cuda-a", build=FACTS, rpc_protocol="7.0.0")
    return record.model_copy(update={"backend": "cuda"})


def verdict(record: RuntimeRecord) -> Verdict:
    return judge(Evidence(record.backend, 1.0, read_binary(record)))


@pytest.fixture
def engine(tmp_path: Path, cuda_program: Path) -> Path:
    return place_engine(cuda_program, tmp_path / "engine")


def test_a_sound_engine(engine: Path) -> None:
    record = built(engine)
    seen = read_binary(record)
    assert seen.executed == str(engine / "llama-server")
    assert seen.linked == ("cpu", "cuda")
    assert seen.version_said == record.version
    assert seen.cmake_cache == (
        *(("GGML_CUDA", "ON"), ("GGML_RPC", "ON"), ("CMAKE_CUDA_ARCHITECTURES", "90")),
    )
    assert all(f.found_sha256 == f.recorded_sha256 for f in seen.files)
    assert verdict(record).proof.level == "binary"


def test_the_old_binary_put_back(engine: Path, cpu_program: Path) -> None:
    """Same name, same times: only its bytes tell."""
    record = built(engine)
    server = engine / "llama-server"
    status = server.stat()
    server.write_bytes((cpu_program / "llama-server").read_bytes())
    os.utime(server, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "not the file that was built" in str(verdict(record).proof.problem)


def test_an_old_library_put_back(engine: Path) -> None:
    record = built(engine)
    (engine / "libggml-base.so.0").write_bytes(b"an older library")
    assert "libggml-base.so.0 is not the file" in str(verdict(record).proof.problem)


def test_binaries_older_than_their_configuration(engine: Path) -> None:
    facts = FACTS.model_copy(update={"cache_written_at": 4e9})
    record = built(engine).model_copy(update={"build": facts})
    assert "older than their CMakeCache" in str(verdict(record).proof.problem)


def test_an_engine_for_cuda_that_links_no_cuda(tmp_path: Path, cpu_program: Path) -> None:
    record = built(place_engine(cpu_program, tmp_path / "engine"))
    assert "loads no library of cuda (only cpu)" in str(verdict(record).proof.problem)


def test_a_link_to_another_engine(engine: Path, tmp_path: Path, cuda_program: Path) -> None:
    """`llama-server` leads to the old installation."""
    record = built(engine)
    old = place_engine(cuda_program, tmp_path / "old")
    (engine / "llama-server").unlink()
    (engine / "llama-server").symlink_to(old / "llama-server")
    seen = read_binary(record)
    assert seen.executed == str(old / "llama-server")


def test_what_a_wrapper_becomes(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binary, "WRAPPER_S", 0.5)
    wrapper = program(tmp_path / "llama-server", f'exec "{engine}/llama-server" "$@"\n')
    assert executed(wrapper) == str(engine / "llama-server")


def test_a_wrapper_that_stays_hides_what_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_engine(tmp_path / "wrapped")
    record = probe(directory)
    monkeypatch.setattr(binary, "WRAPPER_S", 0.2)
    seen = read_binary(record)
    assert seen.executed == str(Path("/bin/sh").resolve())
    assert "none of the files of this engine" in str(verdict(record).proof.problem)


def test_a_program_that_cannot_run(tmp_path: Path) -> None:
    assert executed(tmp_path / "llama-server") is None
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(57))
    broken.chmod(0o755)
    assert executed(broken) is None
    assert linked_backends(broken) is None


def test_what_was_installed_is_what_was_built(engine: Path) -> None:
    record = built(engine)
    server = record.binaries[0]
    linked = BuiltFile(name=server.name, sha256=server.sha256, size=server.size, mtime_ns=1)

    def with_file(file: BuiltFile) -> RuntimeRecord:
        facts = FACTS.model_copy(update={"built_files": (file,)})
        return record.model_copy(update={"build": facts})

    proof = verdict(with_file(linked)).proof
    assert proof.level == "binary"
    assert "1 with what the build linked" in " ".join(proof.evidence)
    other = linked.model_copy(update={"sha256": "0" * 64})
    assert "the build linked another file" in str(verdict(with_file(other)).proof.problem)


def test_the_choices_of_an_adopted_tree(tmp_path: Path, cuda_program: Path) -> None:
    directory = place_engine(cuda_program, tmp_path / "build" / "bin")
    (tmp_path / "build" / "CMakeCache.txt").write_text(
        "# a comment\nGGML_CUDA:BOOL=ON\nCMAKE_CUDA_ARCHITECTURES:STRING=121\nOTHER:STRING=x\n"
    )
    os.utime(tmp_path / "build" / "CMakeCache.txt", (5.0, 5.0))
    seen = read_binary(probe(directory))
    assert seen.cmake_cache == (("GGML_CUDA", "ON"), ("CMAKE_CUDA_ARCHITECTURES", "121"))
    assert seen.cache_written_at == 5.0
    assert seen.adopted


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\x7fELF", b"\x7fELF\x02\x01" * 200])
def test_what_is_no_elf_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    assert needed(path) is None
    assert needed(tmp_path / "none") is None


def test_libraries_a_program_asks_for(engine: Path) -> None:
    names = needed(engine / "llama-server")
    assert names is not None
    assert names[:2] == ("libggml-cuda.so", "libggml-cpu.so")


# -- what it lists --------------------------------------------------------------------------------


def test_a_device_list_that_has_become_empty(engine: Path) -> None:
    record = built(engine)
    (engine / "list-devices.txt").write_text(f"Available devices:\n  {pieces.LISTED[0]}\n")
    files = read_binary(record)
    devices = (pieces.gpu(), pieces.CPU_DEVICE)
    seen = read_backend(engine / "llama-server", files, lambda: devices)
    assert (seen.listed, seen.architectures, seen.devices) == (pieces.LISTED, "90", devices)
    (engine / "list-devices.txt").write_text("Available devices:\n  (none)\n")
    seen = read_backend(engine / "llama-server", files, lambda: devices)
    assert seen.listed == ()
    (engine / "list-devices.txt").unlink()
    (engine / "llama-server").chmod(0o644)
    seen = read_backend(engine / "llama-server", files, lambda: devices)
    assert seen.listed is None
    assert "Permission denied" in str(seen.problem)


def test_a_jetson_is_asked_through_its_engine(engine: Path) -> None:
    listed = "CUDA0: Orin (62841 MiB, 58000 MiB free)"
    (engine / "list-devices.txt").write_text(
        f"  Device 0: Orin, compute capability 8.7, VMM: yes\nAvailable devices:\n  {listed}\n"
    )
    driver = Driver("NVIDIA", None, "the driver of this Jetson cannot list its GPU", blind=True)
    reading = Reading((), pieces.CPU_DEVICE, (driver,))
    files = read_binary(built(engine))
    seen = read_backend(
        engine / "llama-server", files, lambda: (pieces.CPU_DEVICE,), lambda: reading
    )
    assert (seen.listed, seen.blind) == ((listed,), driver.problem)
    (device, cpu) = seen.devices
    assert (device.name, device.compute_capability, device.unified) == ("Orin", "8.7", True)
    assert cpu == pieces.CPU_DEVICE


@pytest.mark.engine
def test_the_real_engine(engine_dir: Path) -> None:
    record = probe(engine_dir)
    seen = read_binary(record)
    assert seen.executed == str((engine_dir / "llama-server").resolve())
    assert seen.linked is not None
    assert "cpu" in seen.linked
    listed = read_backend(engine_dir / "llama-server", seen, lambda: (pieces.CPU_DEVICE,))
    found = judge(Evidence(record.backend, 1.0, seen, listed))
    assert found.proof.passed, found.proof.problem
