"""What engines said they take: kept, forgotten, read back from anything."""

from __future__ import annotations

from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.kernel import Pool
from meshd.runtime.measured import MAX_KEPT, Launch, Measured
from meshd.runtime.measuring import Measurements
from meshd.runtime.reported import MemoryReport
from meshd.view.shape import MemoryParts

LAUNCH = Launch("sha256:ab", 5_000_000, "cuda-0c1e570", 8192, 4)
REPORT = MemoryReport(
    {"CUDA0": MemoryParts(weights=4_000_000, cache=1_000_000, compute=500_000)}, (5, 5)
)


def test_what_was_kept_is_found_again_after_it_was_written() -> None:
    measured = Measured()
    assert measured.keep(LAUNCH, REPORT)
    assert not measured.keep(LAUNCH, REPORT), "no news: nothing to write"
    again = Measured.from_json(measured.to_json())
    assert again.find(LAUNCH) == REPORT
    other = Launch("sha256:ab", 5_000_000, "cuda-0c1e570", 8192, 8)
    assert again.find(other) is None, "more slots take more"


def test_the_longest_unused_is_forgotten() -> None:
    measured = Measured()
    launches = [Launch(f"sha256:{n}", 1, "cpu", 512, 1) for n in range(MAX_KEPT + 1)]
    for launch in launches[:-1]:
        measured.keep(launch, REPORT)
    measured.keep(launches[0], REPORT)  # used again
    measured.keep(launches[-1], REPORT)
    assert measured.find(launches[0]) == REPORT
    assert measured.find(launches[1]) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*Launch.__dataclass_fields__, "devices", "offloaded", "weights"]),
            inner,
            max_size=8,
        )
    ),
    max_leaves=20,
)


@given(st.binary(max_size=50) | st.lists(json_values, max_size=3).map(repr).map(str.encode))
def test_any_file_is_read(text: bytes) -> None:
    assert Measured.from_json(text).find(LAUNCH) is None


def test_a_row_that_makes_no_sense_is_left_out() -> None:
    measured = Measured()
    measured.keep(LAUNCH, REPORT)
    text = measured.to_json()
    for wrong in (
        text.replace(b'"CUDA0":{', b'"CUDA0":{"colour":1,'),
        text.replace(b"[5,5]", b"[5]"),
        text.replace(b'"offloaded":[5,5]', b'"offloaded":7'),
        text.replace(b'"context":8192', b'"context":"much"'),
        text.replace(b'"engine"', b'"motor"'),
    ):
        assert wrong != text
        assert Measured.from_json(wrong).find(LAUNCH) is None


async def test_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pool, path = Pool("test", workers=1), tmp_path / "measured.json"
    waiting: list[Coroutine[Any, Any, None]] = []
    first = Measurements(path, pool, waiting.append)
    first.keep(LAUNCH, REPORT)
    first.keep(LAUNCH, REPORT)
    assert len(waiting) == 1
    await waiting.pop()
    assert path.stat().st_mode & 0o777 == 0o600
    assert Measurements(path, pool, waiting.append).find(LAUNCH) == REPORT
    path.unlink()
    path.mkdir()
    unreadable = Measurements(path, pool, waiting.append)
    assert unreadable.find(LAUNCH) is None
    unreadable.keep(LAUNCH, REPORT)
    await waiting.pop()
    assert [r.getMessage().split(": ")[0] for r in caplog.records] == [
        f"{path} cannot be read",
        f"{path} cannot be written",
    ]
    pool.close()
