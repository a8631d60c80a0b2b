"""Whether the driver sees a process of ours, also where it counts processes otherwise than we."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshd.runtime.devices import Driver, Gpu, GpuProcess, Reading
from meshd.runtime.proof.evidence import RuntimeEvidence
from meshd.runtime.proof.looks import still_there
from meshd.runtime.proof.witness import (
    CONTEXT_BYTES,
    INITIAL_PID_NAMESPACE,
    Usage,
    pids_are_ours,
    sees,
    usage_in,
)
from tests.runtime.proof import pieces

NONE = Usage()


@pytest.mark.parametrize(
    ("before", "now", "own_pids", "seen", "words"),
    [
        (NONE, Usage({7: 530 << 20}), True, True, "pid 7 uses 530 MiB"),
        (NONE, Usage({7: 0}), False, True, "pid 7 uses 0 MiB"),
        (NONE, Usage({8: 1}), True, False, "it names 8"),
        (NONE, NONE, True, False, "no process"),
        (NONE, Usage({}, 1 << 40), True, False, "no process"),
        (NONE, None, True, False, "does not answer"),
        (Usage({8: 1}), Usage({8: 1, 91: 600 << 20}), False, True, "pid 91 is new: 600 MiB"),
        (Usage({8: 1}), Usage({8: 1}), False, False, "it names 8"),
        (Usage({}, 10), Usage({}, 10 + CONTEXT_BYTES), False, True, "rose by 64 MiB"),
        (Usage({}, 10), Usage({}, 9 + CONTEXT_BYTES), False, False, "rose by 63 MiB"),
        (None, Usage({91: 1}), False, False, "it names 91"),
    ],
)
def test_what_counts_as_seen(
    before: Usage | None, now: Usage | None, own_pids: bool, seen: bool, words: str
) -> None:
    found, said = sees(before, now, 7, own_pids=own_pids)
    assert found is seen
    assert words in said


def test_usage_of_all_devices() -> None:
    processes = (GpuProcess(7, 530 << 20, "llama-server"), GpuProcess(8, None, None))
    driver = Driver("NVIDIA", "580.65.06", None)
    reading = Reading((Gpu(pieces.gpu(), 0, processes),), pieces.CPU_DEVICE, (driver,))
    assert usage_in(reading) == Usage({7: 530 << 20, 8: 0}, 1 << 30)
    silent = Reading((), pieces.CPU_DEVICE, (Driver("NVIDIA", None, "no driver"),))
    assert usage_in(silent) is None
    assert usage_in(Reading((), pieces.CPU_DEVICE, ())) is None


def test_whose_pids_they_are(tmp_path: Path) -> None:
    (tmp_path / "self" / "ns").mkdir(parents=True)
    link = tmp_path / "self" / "ns" / "pid"
    link.symlink_to("pid:[4026532201]")
    assert not pids_are_ours(tmp_path)
    link.unlink()
    link.symlink_to(INITIAL_PID_NAMESPACE)
    assert pids_are_ours(tmp_path)
    assert pids_are_ours(tmp_path / "none")


def test_engines_that_fill_a_device_stand_for_a_run() -> None:
    good = pieces.running()
    full = RuntimeEvidence("CUDA0", no_memory=True, problem="out of memory")
    stands = still_there(good, full, frozenset({77}), Usage({77: 1 << 30}))
    assert (stands.pid, stands.problem, stands.offloaded) == (77, None, good.offloaded)
    assert stands.note is not None
    broken = RuntimeEvidence("CUDA0", problem="a crash")
    for failed, serving, now in (
        (broken, frozenset({77}), Usage({77: 1})),
        (full, frozenset(), Usage({77: 1})),
        (full, frozenset({77}), Usage({78: 1})),
        (full, frozenset({77}), None),
    ):
        assert still_there(good, failed, frozenset(serving), now) is failed
