"""Which memories of a row are filled first. Pure.

A token passes the memories of a row one after another, and each of them reads all of its layers:
the time for a token is the sum of their bytes, each over the speed of its memory. It is least if
the fastest memory is filled first. Rules, numbered as in the code:

1. Accelerators come before main memories, whatever is known of their speed: what computes beside a
   main memory is slower by far at prompts, and seldom faster at tokens.
2. Among those of one kind, memories of about the same speed are a group: all that have more than
   half the speed of the fastest one in it. In a group a share by speed would save little, and would
   change with every measurement.
3. A memory of unknown speed counts as the slowest known one of its kind. So it is filled no earlier
   than one that is known to be as fast, and none is kept waiting for it. If none is known they are
   one group: with one kind of memory alone, nothing is told apart then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, TypeAlias

ALIKE: Final = 2
"""Memories differ by less than this factor if they are of about the same speed."""

Kind: TypeAlias = tuple[bool, int | None]
"""Whether it is an accelerator's, and bytes per second if that is known."""


def ranks(memories: Sequence[Kind]) -> tuple[int, ...]:
    """The number of each memory's group; those of group 0 are filled first, and none is empty.

    Taking out whole groups from the last one on changes nothing for the others, as long as all
    speeds are known.
    """
    found: dict[Kind, int] = {}
    first = 0
    for accelerator in (True, False):  # 1
        kind = [memory for memory in memories if memory[0] is accelerator]
        numbers = _grouped(speed for _, speed in kind)
        found |= {(accelerator, speed): first + number for speed, number in numbers.items()}
        first = max(found.values(), default=-1) + 1
    return tuple(found[memory] for memory in memories)


def _grouped(speeds: Iterable[int | None]) -> Mapping[int | None, int]:
    """Numbers of groups by speed, of one kind of memory."""
    told = list(speeds)
    found: dict[int | None, int] = {}
    fastest, number = 0, -1
    for speed in sorted((speed for speed in told if speed is not None), reverse=True):
        if number < 0 or speed * ALIKE <= fastest:  # 2
            fastest, number = speed, number + 1
        found[speed] = number
    if None in told:
        found[None] = max(number, 0)  # 3
    return found
