"""Sizes as they are rounded."""

from __future__ import annotations

import pytest

from meshd.sizes import two_digits


@pytest.mark.parametrize(
    ("count", "rounded"),
    [
        (0, 0),
        (7.4, 7),
        (99.4, 99),
        (144, 140),
        (996, 1000),
        (4_916_736_000_000.0, 4_900_000_000_000),
    ],
)
def test_two_digits_of_a_figure_stay(count: float, rounded: int) -> None:
    assert two_digits(count) == rounded
