"""One verdict a file whatever was seen, and OK only for the very bytes that were promised."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.cache.facts import FileFacts
from meshd.cache.gguf_header import GgufHeader, TensorInfo
from meshd.cache.verdict import (
    PADDING_BYTES,
    Expected,
    Fault,
    Observation,
    SetVerdict,
    judge,
)

A, B = "a" * 64, "b" * 64
NEEDED = 128
SEEN_FAULTS = [fault for fault in Fault if fault not in (Fault.UNVERIFIED, Fault.OK)]


def header(number: int, count: int, *, architecture: str = "llama", **more: int) -> GgufHeader:
    """`number` from 0; a shard with one tensor that ends at byte NEEDED."""
    metadata: dict[str, int | str] = {"general.architecture": architecture}
    if count > 1:
        metadata |= {"split.no": number, "split.count": count, "split.tensors.count": count}
    metadata |= {name.replace("__", "."): value for name, value in more.items()}
    tensor = TensorInfo(f"t{number}", (16,), "F32", 64, NEEDED - 64)
    return GgufHeader(3, metadata, (tensor,), 32, 64)


def facts(number: int, size: int = NEEDED) -> FileFacts:
    return FileFacts(f"/blobs/{number}", size, 0, number, 0)


def whole(number: int, count: int, size: int = NEEDED) -> Observation:
    return Observation(f"/m/{number}", facts(number, size), header(number, count))


def judge_set(
    *seen: Observation,
    hashes: list[str | None] | None = None,
    size: int | None = NEEDED,
    sha256: str | None = A,
) -> SetVerdict:
    expected = [Expected(one.path, size, sha256) for one in seen]
    return judge(expected, seen, hashes if hashes is not None else [A] * len(seen))


def one(
    seen: Observation, sha256: str | None = A, *, size: int | None = NEEDED, want: str | None = A
) -> Fault:
    verdict = judge([Expected(seen.path, size, want)], [seen], [sha256])
    return verdict.files[0].fault


# -- one file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", SEEN_FAULTS)
def test_what_needs_no_expectation(fault: Fault) -> None:
    assert one(Observation("/m", fault=fault, problem="so")) is fault


def test_a_file_as_promised() -> None:
    assert one(whole(0, 1)) is Fault.OK
    assert one(whole(0, 1), None) is Fault.UNVERIFIED
    assert one(whole(0, 1), B) is Fault.CORRUPT


@pytest.mark.parametrize(
    ("size", "fault"), [(0, Fault.SHORT), (NEEDED - 1, Fault.SHORT), (NEEDED + 1, Fault.LONG)]
)
def test_another_size_goes_before_what_it_explains(size: int, fault: Fault) -> None:
    damaged = Observation("/m", facts(0, size), fault=Fault.CORRUPT, problem="is damaged")
    cut = Observation("/m", facts(0, size), fault=Fault.SHORT, problem="is cut off")
    for seen in (damaged, cut, whole(0, 1, size)):
        assert one(seen, B) is fault
    foreign = Observation("/m", facts(0, size), fault=Fault.FOREIGN, problem="is JSON")
    assert one(foreign) is Fault.FOREIGN


def test_a_header_that_promises_more_than_the_right_size_is_damaged() -> None:
    cut = Observation("/m", facts(0), fault=Fault.SHORT, problem="is cut off")
    assert one(cut) is Fault.CORRUPT
    assert one(cut, size=None, want=None) is Fault.SHORT
    assert one(whole(0, 1, NEEDED - 1), size=NEEDED - 1) is Fault.CORRUPT


def test_local_files_are_measured_by_their_own_header() -> None:
    def local(size: int, sha256: str | None) -> Fault:
        return one(whole(0, 1, size), sha256, size=None, want=None)

    assert local(NEEDED - 1, A) is Fault.SHORT
    assert local(NEEDED, None) is Fault.UNVERIFIED
    assert local(NEEDED, B) is Fault.OK
    assert local(NEEDED + PADDING_BYTES, A) is Fault.OK
    assert local(NEEDED + PADDING_BYTES + 1, A) is Fault.LONG


def test_an_observation_is_whole_or_wrong() -> None:
    good = header(0, 1)
    for facts_, header_, fault in [
        (None, good, None),
        (facts(0), None, None),
        (facts(0), good, Fault.CORRUPT),
        (facts(0), None, Fault.OK),
        (None, None, Fault.UNVERIFIED),
        (None, None, None),
    ]:
        with pytest.raises(ValueError, match="whole or wrong"):
            Observation("/m", facts_, header_, fault)


def test_a_set_has_files() -> None:
    with pytest.raises(ValueError, match="a file at least"):
        judge([], [], [])
    with pytest.raises(ValueError, match="argument"):
        judge([Expected("/m")], [whole(0, 1)], [])


# -- sets -----------------------------------------------------------------------------------------


def test_what_has_to_be_hashed() -> None:
    verdict = judge_set(whole(0, 2), whole(1, 2), hashes=[A, None])
    assert not verdict.ok
    assert verdict.needs_hash
    assert [file.path for file in verdict.unverified] == ["/m/1"]
    verdict = judge_set(whole(0, 2), whole(1, 2), hashes=[B, None])
    assert not verdict.needs_hash
    assert verdict.worst.path == "/m/0"
    assert [file.path for file in verdict.unverified] == ["/m/1"]


def test_out_of_step() -> None:
    """A file that nothing else is wrong with; hashes that are right do not save it."""
    good = whole(0, 2)

    def second(**more: int) -> SetVerdict:
        return judge_set(
            good, replace(whole(1, 2), header=header(1, 2, architecture="llama", **more))
        )

    assert second().ok
    for verdict, words in [
        (second(split__no=0), "holds shard 1"),
        (second(split__count=3), "of 3 shards, its name says 2"),
        (second(split__count=1), "not split"),
        (second(split__tensors__count=3), "promises 3 tensors in the set, its first shard 2"),
        (judge_set(good, replace(whole(1, 2), header=good.header)), "holds shard 1"),
    ]:
        assert verdict.files[0].fault is Fault.OK
        assert verdict.files[1].fault is Fault.CORRUPT
        assert words in verdict.files[1].problem


def test_tensors_of_a_set() -> None:
    more = header(1, 2)
    twice = replace(more, tensors=(more.tensors[0]._replace(name="t0"),))
    verdict = judge_set(whole(0, 2), replace(whole(1, 2), header=twice))
    assert verdict.worst.problem == "holds tensor 't0', which shard 1 holds too"
    none = replace(more, tensors=())
    verdict = judge_set(whole(0, 2), replace(whole(1, 2, 64), header=none), size=None, sha256=None)
    assert verdict.worst.problem == "promises 2 tensors, the set holds 1"


def test_a_missing_shard_leaves_the_others_their_own_verdicts() -> None:
    gone = Observation("/m/1", fault=Fault.MISSING, problem="is missing")
    misplaced = replace(whole(2, 3), header=header(0, 3))
    verdict = judge_set(whole(0, 3), gone, misplaced)
    assert [file.fault for file in verdict.files] == [Fault.OK, Fault.MISSING, Fault.CORRUPT]


def test_a_projector() -> None:
    projector = Observation("/m/mmproj", facts(9), header(0, 1, architecture="clip"))
    expected = [Expected("/m/0", NEEDED, A), Expected("/m/mmproj", NEEDED, B, projector=True)]
    verdict = judge(expected, [whole(0, 1), projector], [A, B])
    assert verdict.ok
    assert [(file.number, file.total) for file in verdict.files] == [(1, 1), (0, 1)]
    model = replace(projector, header=header(0, 1))
    verdict = judge(expected, [whole(0, 1), model], [A, B])
    assert verdict.worst.words == (
        "projector /m/mmproj is no projector: its architecture is llama, not clip"
    )
    gone = Observation("/m/mmproj", fault=Fault.MISSING, problem="is missing")
    assert judge(expected, [whole(0, 1), gone], [A, None]).worst.path == "/m/mmproj"


# -- words ----------------------------------------------------------------------------------------


def test_the_missions_case_in_one_line() -> None:
    gone = Observation("/hub/m-00003-of-00004.gguf", fault=Fault.MISSING, problem="is missing")
    seen = [whole(0, 4), whole(1, 4), gone, whole(3, 4)]
    error = judge_set(*seen, size=None).to_error("meshd cache repair owner/repo:Q8_0")
    assert error.message == (
        "shard 00003-of-00004 /hub/m-00003-of-00004.gguf is missing; run "
        "`meshd cache repair owner/repo:Q8_0`"
    )
    assert error.path == gone.path
    assert error.detail == {"path": gone.path}
    assert "expected 128 bytes" in judge_set(*seen).to_error(None).message
    assert "put the right file there" in judge_set(*seen).to_error(None).message


def test_sizes_and_hashes_are_told() -> None:
    short = replace(whole(0, 1), facts=facts(0, 5_000_000))
    message = judge_set(short, size=5_100_000).to_error("x").message
    assert message == (
        "/m/0 is 100000 bytes too short (expected 5.1 MB, 5100000 bytes, found 5.0 MB, "
        "5000000 bytes); run `x`"
    )
    message = judge_set(whole(0, 1), hashes=[B]).to_error("x").message
    assert f"expected sha256 {A}, found sha256 {B}" in message
    seen = [whole(number, 3) for number in range(3)]
    message = judge_set(*seen, hashes=[B, A, B]).to_error("x").message
    assert "1 more of the set not usable" in message
    assert "\n" not in message


# -- any ------------------------------------------------------------------------------------------

SIZES = st.sampled_from([0, 64, NEEDED - 1, NEEDED, NEEDED + 1, NEEDED + PADDING_BYTES + 1])
HASHES = st.sampled_from([A, B, None])


@st.composite
def observations(draw: st.DrawFn, number: int, count: int) -> Observation:
    path = f"/m/{number}"
    if draw(st.booleans()):
        seen = whole(draw(st.sampled_from([number, 0])), draw(st.sampled_from([count, 1, 5])))
        return replace(seen, path=path, facts=facts(number, draw(SIZES)))
    fault = draw(st.sampled_from(SEEN_FAULTS))
    readable = facts(number, draw(SIZES)) if draw(st.booleans()) else None
    return Observation(path, readable, None, fault, "so")


@st.composite
def sets(
    draw: st.DrawFn,
) -> tuple[list[Expected], list[Observation], list[str | None]]:
    count = draw(st.integers(1, 4))
    seen = [draw(observations(number, count)) for number in range(count)]
    sizes = st.sampled_from([NEEDED, NEEDED - 1, None])
    expected = [Expected(one.path, draw(sizes), draw(HASHES)) for one in seen]
    return expected, seen, [draw(HASHES) for _ in seen]


@given(sets())
def test_any_observations_have_exactly_one_verdict(
    case: tuple[list[Expected], list[Observation], list[str | None]],
) -> None:
    expected, seen, hashes = case
    verdict = judge(expected, seen, hashes)
    assert verdict == judge(expected, seen, hashes)
    assert [file.path for file in verdict.files] == [one.path for one in expected]
    assert verdict.ok == all(file.fault is Fault.OK for file in verdict.files)
    assert verdict.ok == (verdict.worst.fault is Fault.OK)
    assert verdict.needs_hash <= bool(verdict.unverified)
    for file in verdict.files:
        assert (file.fault is Fault.OK) == (file.problem == "")


@given(sets())
def test_no_missing_or_wrong_byte_is_ok(
    case: tuple[list[Expected], list[Observation], list[str | None]],
) -> None:
    expected, seen, hashes = case
    count = len(seen)
    verdict = judge(expected, seen, hashes)
    for number, (file, want, look, sha256) in enumerate(
        zip(verdict.files, expected, seen, hashes, strict=True)
    ):
        if file.fault not in (Fault.OK, Fault.UNVERIFIED):
            continue
        assert look.facts is not None
        assert look.header is not None
        assert want.size in (None, look.facts.size)
        assert look.facts.size >= look.header.needed_bytes
        assert (file.fault is Fault.OK) == (sha256 is not None)
        assert want.sha256 is None or sha256 in (None, want.sha256)
        assert look.header.split == ((number, count, count) if count > 1 else None)
