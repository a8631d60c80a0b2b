"""What goes when the cache is too large: literal cases, then what holds for every cache."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from meshd.cache.budget import (
    BROKEN,
    FITS,
    IN_USE,
    LAST_COPY,
    NO_BUDGET,
    NOT_ENOUGH,
    OLDEST,
    PINNED,
    Holding,
    Item,
    Leftover,
    LeftoverKind,
    PrunePlan,
    objection,
    own_bytes,
    plan,
)


def held(name: str, size: int = 10, *, used: float = 0.0, **changes: object) -> Holding:
    """A set of one blob that another node has too."""
    made = Holding(name, name, (f"o/{name}",), {f"{name}.blob": size}, used, elsewhere=True)
    return replace(made, **changes)  # type: ignore[arg-type]


def leftover(path: str, size: int = 5, *, useless: bool = True) -> Leftover:
    return Leftover(path, LeftoverKind.PARTIAL, size, useless, "why")


def names(items: tuple[tuple[Item, str], ...]) -> list[tuple[str, str]]:
    return [(i.model if isinstance(i, Holding) else i.path, reason) for i, reason in items]


def used(sets: list[Holding], leftovers: list[Leftover]) -> int:
    blobs = {path: size for holding in sets for path, size in holding.blobs.items()}
    return sum(blobs.values()) + sum(item.size_bytes for item in leftovers)


# -- literal cases --------------------------------------------------------------------------------


def test_the_one_used_longest_ago_goes_first() -> None:
    sets = [held("b", used=2), held("c", used=3), held("a", used=1)]
    made = plan(sets, used_bytes=30, budget_bytes=15)
    assert names(made.remove) == [("a", OLDEST), ("b", OLDEST)]
    assert names(made.keep) == [("c", FITS)]
    assert (made.freed_bytes, made.still_over_bytes) == (20, 0)


def test_room_for_what_is_to_come() -> None:
    sets = [held("a", used=1), held("b", used=2)]
    assert plan(sets, used_bytes=20, budget_bytes=20).remove == ()
    made = plan(sets, used_bytes=20, budget_bytes=20, need_bytes=1)
    assert names(made.remove) == [("a", OLDEST)]


def test_without_a_budget_only_useless_leftovers_go() -> None:
    sets = [held("a")]
    leftovers = [leftover("x"), leftover("fresh", useless=False)]
    made = plan(sets, leftovers, used_bytes=20, budget_bytes=None, need_bytes=1 << 40)
    assert names(made.remove) == [("x", "why")]
    assert names(made.keep) == [("a", NO_BUDGET), ("fresh", "why")]
    assert (made.freed_bytes, made.still_over_bytes) == (5, 0)


def test_leftovers_go_before_sets() -> None:
    made = plan([held("a")], [leftover("x", 5)], used_bytes=15, budget_bytes=10)
    assert names(made.remove) == [("x", "why")]
    assert names(made.keep) == [("a", FITS)]


def test_what_is_protected_stays_and_says_why() -> None:
    sets = [
        held("engine", used=1, in_use=True),
        held("pin", used=2, pinned=True),
        held("last", used=3, elsewhere=False),
        held("alone", used=4, elsewhere=None),
        held("free", used=5),
    ]
    made = plan(sets, used_bytes=50, budget_bytes=0)
    assert names(made.remove) == [("free", OLDEST)]
    assert names(made.keep) == [
        ("engine", IN_USE),
        ("pin", PINNED),
        ("last", LAST_COPY),
        ("alone", LAST_COPY),
    ]
    assert (made.freed_bytes, made.still_over_bytes) == (10, 40)
    forced = plan(sets, used_bytes=50, budget_bytes=0, force=True)
    assert [name for name, _ in names(forced.remove)] == ["last", "alone", "free"]


def test_a_broken_copy_is_no_copy() -> None:
    made = plan([held("a", elsewhere=False, intact=False)], used_bytes=10, budget_bytes=0)
    assert names(made.remove) == [("a", BROKEN)]


def test_shared_blobs_are_freed_with_the_last_set_that_has_them() -> None:
    shared = {"shared.blob": 100}
    sets = [held("a", used=1, blobs=shared), held("b", used=2, blobs={**shared, "b.blob": 1})]
    one = plan(sets, used_bytes=101, budget_bytes=100)
    assert names(one.remove) == [("b", OLDEST)]
    assert one.freed_bytes == 1
    both = plan(sets, used_bytes=101, budget_bytes=99)
    assert [name for name, _ in names(both.remove)] == ["a", "b"]
    assert both.freed_bytes == 101
    assert own_bytes(sets[0], sets) == 0
    assert own_bytes(sets[1], sets) == 1


def test_nothing_goes_that_makes_no_room() -> None:
    shared = {"shared.blob": 10}
    sets = [held("a", blobs=shared), held("b", blobs=shared, in_use=True)]
    made = plan(sets, used_bytes=10, budget_bytes=5)
    assert made.remove == ()
    assert names(made.keep) == [("a", NOT_ENOUGH), ("b", IN_USE)]
    assert made.still_over_bytes == 5


def test_a_small_old_one_stays_if_a_large_one_has_to_go_anyway() -> None:
    made = plan([held("small", 1, used=1), held("large", 9, used=2)], used_bytes=10, budget_bytes=5)
    assert names(made.remove) == [("large", OLDEST)]


def test_objections_to_naming_a_set() -> None:
    assert objection(held("a"), force=False) is None
    assert objection(held("a", in_use=True), force=True) == IN_USE
    assert objection(held("a", pinned=True), force=False) == PINNED
    assert objection(held("a", pinned=True), force=True) is None
    assert objection(held("a", elsewhere=False), force=False) == LAST_COPY
    assert objection(held("a", elsewhere=False), force=True) is None
    assert objection(held("a", elsewhere=None), force=False) is None
    assert objection(held("a", elsewhere=False, intact=False), force=False) is None


# -- what holds for every cache -------------------------------------------------------------------

SIZES = {f"blob{n}": 3 * n + 1 for n in range(8)}


@st.composite
def caches(draw: st.DrawFn) -> tuple[list[Holding], list[Leftover]]:
    sets = [
        Holding(
            digest=f"set{number}",
            model=f"set{number}",
            refs=(),
            blobs={name: SIZES[name] for name in draw(st.sets(st.sampled_from(sorted(SIZES))))},
            last_used_at=draw(st.integers(0, 4)),
            pinned=draw(st.booleans()),
            in_use=draw(st.booleans()),
            intact=draw(st.booleans()),
            elsewhere=draw(st.sampled_from([True, True, False, None])),
        )
        for number in range(draw(st.integers(0, 6)))
    ]
    leftovers = [
        leftover(f"left{number}", draw(st.integers(0, 20)), useless=draw(st.booleans()))
        for number in range(draw(st.integers(0, 3)))
    ]
    return sets, leftovers


def removed_sets(made: PrunePlan) -> list[Holding]:
    return [item for item, _ in made.remove if isinstance(item, Holding)]


@given(caches(), st.integers(0, 150), st.integers(0, 40), st.booleans())
def test_properties(
    cache: tuple[list[Holding], list[Leftover]], budget: int, need: int, force: bool
) -> None:
    sets, leftovers = cache
    before = used(sets, leftovers)

    def planned(sets: list[Holding], leftovers: list[Leftover]) -> PrunePlan:
        return plan(
            sets,
            leftovers,
            used_bytes=used(sets, leftovers),
            budget_bytes=budget,
            need_bytes=need,
            force=force,
        )

    made = planned(sets, leftovers)
    gone = removed_sets(made)

    # Everything is either removed or kept, with a reason.
    sorted_all = sorted(map(repr, [*sets, *leftovers]))
    assert sorted(repr(item) for item, _ in (*made.remove, *made.keep)) == sorted_all
    assert all(reason for _, reason in (*made.remove, *made.keep))

    # What is protected stays.
    for holding in gone:
        assert not holding.in_use
        assert not holding.pinned
        assert force or holding.elsewhere or not holding.intact

    # It frees what it says, and enough if that is possible at all.
    kept_sets = [item for item in sets if item not in gone]
    kept_leftovers = [item for item in leftovers if not item.useless]
    after = used(kept_sets, kept_leftovers)
    assert before - made.freed_bytes == after
    assert made.still_over_bytes == max(0, after + need - budget)
    allowed = [
        s for s in sets
        if not s.in_use and not s.pinned and (force or s.elsewhere or not s.intact)
    ]  # fmt: skip
    if made.still_over_bytes:
        assert after == used([s for s in sets if s not in allowed], kept_leftovers)

    # No set goes in vain: any one of them, put back, breaks the budget again or frees nothing.
    for holding in gone:
        without = used([*kept_sets, holding], kept_leftovers)
        assert without + need > budget
        assert without > after

    # Oldest first: no other choice spares what this one removes by removing only older ones.
    assert [s.last_used_at for s in gone] == sorted(s.last_used_at for s in gone)
    if gone and not made.still_over_bytes:
        newest = gone[-1].last_used_at
        older = [s for s in allowed if s.last_used_at < newest]
        for count in range(len(older) + 1):
            for others in combinations(older, count):
                rest = used([s for s in sets if s not in others], kept_leftovers)
                assert rest + need > budget

    # Doing it leaves nothing to do.
    assert planned(kept_sets, kept_leftovers).remove == ()
