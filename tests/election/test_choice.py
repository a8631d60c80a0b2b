"""What `--auto` deploys."""

from __future__ import annotations

import pytest

from meshd.election.choice import BESIDE_BYTES, CPU_BYTES, Candidate, choose, usable_bytes
from meshd.election.fit import HOST, Budget
from tests.election.words import GB


def model(name: str, size: int, on_disk: bool = False) -> Candidate:
    return Candidate(name, f"org/{name}", size, on_disk)


def gpu(usable: int, device: str = "CUDA0") -> Budget:
    return Budget(device, usable, host=False, accelerator=True)


def main(usable: int) -> Budget:
    return Budget(HOST, usable, host=True, accelerator=False)


def chosen(memory: list[Budget], *catalog: Candidate) -> str | None:
    found = choose(catalog, memory)
    return None if found is None else found.name


def test_1_a_quarter_more_and_a_gibibyte_must_be_there() -> None:
    enough = 5 * GB + BESIDE_BYTES
    assert chosen([gpu(enough)], model("m", 4 * GB)) == "m"
    assert chosen([gpu(enough - 1)], model("m", 4 * GB)) is None


@pytest.mark.parametrize(
    ("memory", "usable"),
    [
        ([gpu(10), gpu(20, "CUDA1"), main(500)], 30),
        ([main(64 * GB)], CPU_BYTES),
        ([main(4 * GB)], 4 * GB),
        ([Budget("CUDA0", 90 * GB, host=True, accelerator=True)], 90 * GB),
        ([], 0),
    ],
)
def test_2_accelerators_count_or_else_a_part_of_main_memory(
    memory: list[Budget], usable: int
) -> None:
    assert usable_bytes(memory) == usable


def test_3_the_largest_that_fits() -> None:
    catalog = [model("s", GB), model("l", 9 * GB), model("m", 5 * GB)]
    assert chosen([gpu(24 * GB)], *catalog) == "l"
    assert chosen([gpu(8 * GB)], *catalog) == "m"
    assert chosen([gpu(GB)], *catalog) is None
    assert chosen([gpu(24 * GB)]) is None


@pytest.mark.parametrize(
    ("size", "name"), [(5 * GB, "here"), (5 * GB - 1, "l"), (90 * GB, "l"), (10 * GB, "here")]
)
def test_3_what_is_on_the_disk_goes_before_it_within_a_factor_of_two(size: int, name: str) -> None:
    catalog = [model("l", 10 * GB), model("here", size, True), model("tiny", GB, True)]
    assert chosen([gpu(24 * GB)], *catalog) == name


def test_4_the_first_of_equal_ones() -> None:
    equal = [model("a", GB), model("b", GB)]
    assert chosen([gpu(24 * GB)], *equal) == "a"
    assert chosen([gpu(24 * GB)], *(model(c.name, GB, True) for c in reversed(equal))) == "b"
