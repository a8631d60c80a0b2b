"""Two looks, and whether what lies between them is a reason to prove again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshd.runtime.proof.occasion import ASLEEP_S, RETRY_S, Glance, glance_at, occasion
from meshd.view import DeviceView
from tests.runtime.proof.pieces import CPU_DEVICE, gpu


def glance(*devices: DeviceView, listed: tuple[str, ...] | None = ("CUDA0",)) -> Glance:
    return glance_at("e1", True, 0.0, (*devices, CPU_DEVICE), listed)


BEFORE = glance(gpu())


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (BEFORE, None),
        (replace(BEFORE, engine="e2"), "another one: e2"),
        (replace(BEFORE, unchanged=False), "files of the engine"),
        (replace(BEFORE, asleep_s=ASLEEP_S + 1), "suspended for 6 s"),
        (replace(BEFORE, asleep_s=ASLEEP_S), None),
        (glance(), "cuda device GPU-5d1c is gone"),
        (glance(gpu(problem="lost")), "cuda device GPU-5d1c is gone"),
        (glance(replace(gpu(), driver="590.10")), "is now 590.10, it was 580.65.06"),
        (glance(gpu(), replace(gpu(), uuid="GPU-2")), "cuda device GPU-2 is there again"),
        (glance(gpu(), listed=()), "now lists no device"),
        (glance(gpu(), listed=("CUDA0", "CUDA1")), "now lists CUDA0, CUDA1"),
        (glance(gpu(), listed=None), None),
        (glance(replace(gpu(), memory_free_bytes=1)), None),
    ],
)
def test_reasons(now: Glance, words: str | None) -> None:
    why = occasion(BEFORE, now, age_s=0.0, interval_s=3600.0, passed=True)
    assert (why is None) if words is None else words in str(why)


@pytest.mark.parametrize(
    ("age_s", "interval_s", "passed", "again"),
    [
        (3599.0, 3600.0, True, False),
        (3600.0, 3600.0, True, True),
        (RETRY_S - 1, 3600.0, False, False),
        (RETRY_S, 3600.0, False, True),
        (10.0, 10.0, False, True),
    ],
)
def test_time(age_s: float, interval_s: float, passed: bool, again: bool) -> None:
    why = occasion(BEFORE, BEFORE, age_s=age_s, interval_s=interval_s, passed=passed)
    assert (why is not None) is again
