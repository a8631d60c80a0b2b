"""What makes a directory of binaries an engine, and what is said of one that is none."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from meshd.errors import EngineRejected
from meshd.ids import InstanceId, ModelId
from meshd.runtime.launch import LaunchSpec, server_argv
from meshd.runtime.probe import (
    NEEDED_FLAGS,
    backend_of,
    engine_files,
    missing_features,
    probe,
    sha256_of,
)
from meshd.runtime.registry import RECORD
from tests.conftest import wait_until
from tests.runtime.fake_engine import HELP, make_engine, program, questions
from tests.runtime.processes import ended


def test_record_of_a_usable_directory(tmp_path: Path) -> None:
    directory = make_engine(tmp_path / "e")
    record = probe(directory)
    assert record.version == "0.5.0 (build 7, commit abcdef0)"
    assert record.backend == "cpu"
    assert record.devices == ()
    assert record.server_path == str(directory / "llama-server")
    assert record.rpc_path == str(directory / "ggml-rpc-server")
    assert [b.name for b in record.binaries] == [
        *("llama-server", "ggml-rpc-server", "libggml-base.so.0")
    ]
    assert record.binaries[0].sha256 == sha256_of(directory / "llama-server")
    assert record.id == f"adopted-{record.binaries[0].sha256[:8]}"
    assert questions(directory) == ["--version", "--help", "--list-devices"]


def test_older_name_of_the_rpc_server(tmp_path: Path) -> None:
    directory = make_engine(tmp_path / "e", rpc_name="rpc-server")
    assert probe(directory).rpc_path == str(directory / "rpc-server")


def test_engine_without_rpc_server(tmp_path: Path) -> None:
    assert probe(make_engine(tmp_path / "e", rpc_name=None)).rpc_path is None


def test_a_systems_bin_directory_has_no_libraries_of_the_engine(tmp_path: Path) -> None:
    inside = make_engine(tmp_path / "x" / "bin")
    assert "libggml-base.so.0" in {p.name for p in engine_files(inside)}
    system = make_engine(tmp_path / "local" / "bin")
    assert "libggml-base.so.0" not in {p.name for p in engine_files(system)}


@pytest.mark.parametrize(
    ("listing", "backend", "count"),
    [
        ("Available devices:\n  CUDA0: NVIDIA H200 (143771 MiB, 143000 MiB free)", "cuda", 1),
        ("Available devices:\n  ROCm0: gfx1100 (1 MiB)\n  ROCm1: gfx1100 (1 MiB)", "rocm", 2),
        ("Available devices:\n  Vulkan0: llvmpipe (1 MiB)", "vulkan", 1),
        ("Available devices:\n  MTL0: Apple M4", "metal", 1),
        ("Available devices:\n  BLAS: OpenBLAS\n  CUDA0: NVIDIA", "cuda", 2),
        ("Available devices:\n  BLAS: OpenBLAS", "cpu", 1),
        ("Available devices:\n  SYCL0: Intel Arc", "sycl", 1),
        ("Available devices:\n  (none)", "cpu", 0),
    ],
)
def test_backend_is_what_the_engine_lists(
    tmp_path: Path, listing: str, backend: str, count: int
) -> None:
    record = probe(make_engine(tmp_path / "e", devices=listing))
    assert (record.backend, len(record.devices)) == (backend, count)
    assert record.lists_its_devices
    view = record.to_view()
    assert (view.backend, view.built_for) == ("cpu", backend)
    assert view.proof.passed == (backend == "cpu")


def test_an_engine_that_lists_no_device_of_its_backend_says_so(tmp_path: Path) -> None:
    record = probe(make_engine(tmp_path / "e")).model_copy(update={"backend": "cuda"})
    proof = record.to_view().proof
    assert not record.lists_its_devices
    assert (proof.level, proof.passed) == ("binary", False)
    assert "would run on the CPU" in " ".join(proof.evidence)


def test_backend_of_takes_lines_as_they_come() -> None:
    assert backend_of(("Vulkan12: a: b",)) == "vulkan"


def test_every_flag_of_a_command_line_is_probed_for() -> None:
    spec = LaunchSpec(
        *(ModelId("m"), "/m.gguf", 512, 2),
        mmproj="/p.gguf",
        gpu_layers=1,
        kv_type="f16",
        threads=2,
        talkative=True,
    )
    argv = server_argv("llama-server", spec, InstanceId("~1"), "x.sock")
    used = {word for word in argv if word.startswith("--")}
    assert used - set(NEEDED_FLAGS) == set()


def test_missing_flags_are_named(tmp_path: Path) -> None:
    old = HELP.replace("--slots ", "--slots-endpoint ").replace("--offline ", "--off ")
    with pytest.raises(EngineRejected, match=r"does not know --slots, --offline; it is too old"):
        probe(make_engine(tmp_path / "e", help_text=old))


def test_unix_sockets_are_needed() -> None:
    assert missing_features(HELP) == ()
    assert missing_features(HELP.replace("UNIX", "raw")) == ("--host with a unix socket",)


def test_directory_without_a_server(tmp_path: Path) -> None:
    with pytest.raises(EngineRejected, match="has no llama-server"):
        probe(tmp_path)


def test_not_executable(tmp_path: Path) -> None:
    directory = make_engine(tmp_path / "e")
    (directory / "llama-server").chmod(0o644)
    with pytest.raises(EngineRejected, match=r"Permission denied; `chmod \+x` it"):
        probe(directory)


def test_program_of_another_machine(tmp_path: Path) -> None:
    directory = make_engine(tmp_path / "e")
    (directory / "llama-server").write_bytes(b"\x7fELF\x02\x01\x01" + bytes(57))
    with pytest.raises(EngineRejected, match="built for another kind of machine"):
        probe(directory)


def test_missing_library_is_named(tmp_path: Path) -> None:
    words = (
        "llama-server: error while loading shared libraries: libcudart.so.13: cannot open shared "
        "object file: No such file or directory"
    )
    directory = make_engine(tmp_path / "e", extra=f'echo "{words}" >&2; exit 127')
    with pytest.raises(EngineRejected, match=r"needs libcudart\.so\.13, which is not on this mach"):
        probe(directory)


def test_instruction_the_cpu_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(EngineRejected, match="an instruction this CPU does not have"):
        probe(make_engine(tmp_path / "e", extra="kill -ILL $$"))


def test_last_line_of_a_program_that_fails(tmp_path: Path) -> None:
    directory = make_engine(tmp_path / "e", extra="echo first; echo last words; exit 3")
    with pytest.raises(EngineRejected, match="ended with status 3: last words"):
        probe(directory)


def test_program_that_is_not_llama_cpp(tmp_path: Path) -> None:
    with pytest.raises(EngineRejected, match=r"names no version; is it llama\.cpp's"):
        probe(make_engine(tmp_path / "e", version="hello"))


def test_a_program_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    directory = tmp_path / "e"
    extra = '[ "$1" = --help ] && { sleep 600 & echo $! > sleeper; wait; }'
    make_engine(directory, extra=extra)
    began = time.monotonic()
    with pytest.raises(EngineRejected, match=r"--help did not answer within 1\.5 s"):
        probe(directory, limit_s=1.5)
    assert time.monotonic() - began < 10
    sleeper = int((directory / "sleeper").read_text())
    wait_until(lambda: ended(sleeper), what="its end")


def test_settings_of_meshd_do_not_reach_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESHD_API_KEY", "secret")
    monkeypatch.setenv("LLAMA_ARG_PORT", "1")
    directory = make_engine(tmp_path / "e", extra="env > environment")
    probe(directory)
    assert "secret" not in (directory / "environment").read_text()
    assert "LLAMA_ARG_PORT" not in (directory / "environment").read_text()


@pytest.mark.engine
def test_the_real_engine(engine_dir: Path) -> None:
    began = time.monotonic()
    record = probe(engine_dir)
    assert time.monotonic() - began < 5
    assert record.rpc_path is not None
    assert {"llama-server", "ggml-rpc-server"} < {b.name for b in record.binaries}
    assert record.unchanged()
    assert record.to_view().proof.passed


@pytest.mark.engine
def test_the_real_engine_without_one_of_its_libraries(engine_dir: Path, tmp_path: Path) -> None:
    if not (engine_dir / RECORD).exists():
        pytest.skip("the engine was not built by meshd: its libraries may lie anywhere")
    copied = program(tmp_path / "llama-server", "")
    copied.write_bytes((engine_dir / "llama-server").read_bytes())
    with pytest.raises(EngineRejected, match=r"needs lib[\w-]+\.so[.\d]*, which is not on this"):
        # Engines built here find libraries beside themselves only, and there are none.
        probe(tmp_path)
