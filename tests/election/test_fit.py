"""Budgets, places and corrections, by hand-made figures; the engine's own are in tests/engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.election.fit import (
    HOST,
    Budget,
    Correction,
    Corrections,
    Estimate,
    Fit,
    LayerNeed,
    budgets,
    estimate,
    fit,
    observed,
)
from meshd.election.fit.budget import ACCELERATOR_MARGIN, HOST_MARGIN
from meshd.election.fit.correction import CACHE_BOUNDS, COMPUTE_BOUNDS, MAX_KEPT
from meshd.view import DeviceView
from meshd.view.shape import LayerKind, MemoryParts, ModelShape

GIB = 1 << 30
SHAPE = ModelShape(
    architecture="llama",
    weight_unit=1024,
    weights=(100, 100, 100, 100),
    pattern="aaaa",
    kinds=(LayerKind(key=64, value=64),),
    input_bytes=5000,
    output_bytes=6000,
    width=256,
    query=256,
    attended=256,
    feed_forward=512,
    heads=4,
    vocabulary=1000,
)
NEED = Estimate(
    layers=(LayerNeed(80, 20),) * 10,
    output=30,
    output_copy=0,
    embedding=40,
    compute=50,
    masks=4,
    row=3,
    logits=1,
    projector=0,
    prompts=0,
    context=256,
    slots=1,
)


def gpu(number: int, usable: int) -> Budget:
    return Budget(f"CUDA{number}", usable, host=False, accelerator=True)


def main(usable: int) -> Budget:
    return Budget(HOST, usable, host=True, accelerator=False)


def device(backend: str, total: int, free: int, **more: object) -> DeviceView:
    view = DeviceView("d", backend, None, total, free, backend == "cpu", None)
    return replace(view, **more)  # type: ignore[arg-type]


# -- estimate -------------------------------------------------------------------------------------


def test_a_cache_grows_with_context_slots_and_type() -> None:
    plain = estimate(SHAPE, context=1024, slots=1)
    assert plain.cache == 4 * 1024 * (64 + 64) * 2
    assert estimate(SHAPE, context=1024, slots=3).cache == 3 * plain.cache
    assert estimate(SHAPE, context=2048, slots=1).cache == 2 * plain.cache
    assert estimate(SHAPE, context=1024, slots=1, kv_type="q8_0").cache == plain.cache * 34 // 64
    assert estimate(SHAPE, context=1000, slots=1) == plain  # padded
    assert plain.total == plain.weights + plain.cache + plain.compute + plain.logits
    assert plain.weights == 4 * 100 * 1024 + 5000 + 6000
    assert plain.logits == 4 * 1000
    assert estimate(SHAPE, context=1024, slots=1, prompts=99).total == plain.total + 99


def test_a_window_bounds_the_cache_and_a_state_does_not_grow() -> None:
    kinds = (LayerKind(key=64, value=64, window=300), LayerKind(state=777))
    shape = replace(SHAPE, kinds=kinds, pattern="abab")
    long = estimate(shape, context=100_000, slots=2)
    assert long.layers[0].cache == 2 * 1024 * 128 * 2  # 300 + 512, padded to 1024
    assert long.layers[1].cache == 2 * 777
    assert estimate(shape, context=256, slots=2).layers[0].cache == 2 * 256 * 128 * 2


def test_keys_alone_are_kept_where_attention_is_latent() -> None:
    shape = replace(SHAPE, kinds=(LayerKind(key=576),))
    assert estimate(shape, context=256, slots=1).layers[0].cache == 256 * 576 * 2


def test_without_flash_attention_every_head_has_its_scores() -> None:
    with_it = estimate(SHAPE, context=4096, slots=1)
    without = estimate(SHAPE, context=4096, slots=1, flash_attention=False)
    assert without.compute - with_it.compute == 512 * 4096 * (4 * 4 + 2)


def test_a_tied_embedding_is_counted_once_but_copied_to_a_device() -> None:
    tied = estimate(replace(SHAPE, tied=True), context=256, slots=1)
    assert tied.total == estimate(SHAPE, context=256, slots=1).total
    assert tied.output_copy == 5000


def test_nothing_is_not_estimated() -> None:
    with pytest.raises(ValueError, match="0 slots of 256"):
        estimate(SHAPE, context=256, slots=0)
    with pytest.raises(ValueError, match="`q9` is none of the types"):
        estimate(SHAPE, context=256, slots=1, kv_type="q9")


# -- budgets --------------------------------------------------------------------------------------


def test_a_machine_without_accelerators_has_its_main_memory() -> None:
    (found,) = budgets([device("cpu", 32 * GIB, 20 * GIB)])
    assert found == main(20 * GIB - HOST_MARGIN - GIB)


def test_an_accelerator_counts_if_its_engine_lists_it() -> None:
    card = device("cuda", 80 * GIB, 60 * GIB, engine_name="CUDA0")
    ram = device("cpu", 32 * GIB, 20 * GIB)
    assert [b.device for b in budgets([ram, card])] == ["CUDA0", HOST]
    assert budgets([ram, card])[0].usable == 60 * GIB - ACCELERATOR_MARGIN
    for wrong in (replace(card, engine_name=None), replace(card, problem="fell off the bus")):
        assert [b.device for b in budgets([ram, wrong])] == [HOST]
    assert budgets([]) == ()


def test_what_own_engines_hold_may_be_had_again() -> None:
    card = device("cuda", 80 * GIB, 10 * GIB, engine_name="CUDA0")
    assert budgets([card], held={"CUDA0": 30 * GIB})[0].usable == 40 * GIB - ACCELERATOR_MARGIN
    assert budgets([card], held={"CUDA0": 90 * GIB})[0].usable == 80 * GIB - ACCELERATOR_MARGIN


def test_unified_memory_is_counted_once() -> None:
    chip = device("cuda", 120 * GIB, 110 * GIB, engine_name="CUDA0", unified=True)
    (found,) = budgets([chip, device("cpu", 120 * GIB, 50 * GIB)])
    assert (found.device, found.host, found.accelerator) == ("CUDA0", True, True)
    assert found.usable < 50 * GIB


def test_unified_memory_is_as_fast_as_the_machine_s_unless_its_driver_tells() -> None:
    chip = device("cuda", 120 * GIB, 110 * GIB, engine_name="CUDA0", unified=True)
    card = replace(chip, engine_name="CUDA1", unified=False)
    ram = device("cpu", 120 * GIB, 50 * GIB, memory_bytes_per_s=10**11)
    assert [b.bytes_per_s for b in budgets([chip, card, ram])] == [10**11, None]
    told = replace(chip, memory_bytes_per_s=3 * 10**11)
    assert [b.bytes_per_s for b in budgets([told, ram])] == [3 * 10**11]
    assert [b.bytes_per_s for b in budgets([card, ram])] == [None, 10**11]


def test_a_limit_is_shared_by_accelerators_in_proportion() -> None:
    cards = [device("cuda", n * GIB, n * GIB, engine_name=f"CUDA{n}") for n in (9, 31)]
    ram = device("cpu", 32 * GIB, 20 * GIB)
    small, large, beside = budgets([*cards, ram], limit=19 * GIB)
    assert small.usable + large.usable == 19 * GIB
    assert small.usable == 4 * GIB
    assert beside == budgets([ram])[0]
    assert budgets([*cards, ram], limit=99 * GIB) == budgets([*cards, ram])
    assert budgets([ram], limit=GIB)[0].usable == GIB


# -- places ---------------------------------------------------------------------------------------


def test_everything_lies_in_main_memory_where_there_is_nothing_else() -> None:
    found = fit(NEED, [main(1200)])
    assert found.fits
    assert dict(found.memory) == {HOST: NEED.total} == {HOST: 1121}
    assert (found.needed, found.headroom, dict(found.layers)) == (1121, 79, {})
    assert (found.gpu_layers, found.tensor_split) == (0, ())
    short = fit(NEED, [main(1000)])
    assert (short.fits, short.missing, dict(short.memory)) == (False, 121, {})
    assert short.words == (
        "needs 1.1 kB on CPU (weights 870 B, cache 200 B for 1 × 256 tokens, computing 50 B), "
        "1.0 kB free: 121 B short"
    )


def test_no_memory_fits_nothing() -> None:
    assert fit(NEED, ()).words == "no memory of this node is known"


def test_one_device_is_taken_if_it_holds_all() -> None:
    found = fit(NEED, [gpu(0, 900), gpu(1, 1080), main(200)])
    assert found.words.startswith("takes 1.1 kB of 1.1 kB on CUDA1 and 51 B of 200 B on CPU (weig")
    assert dict(found.memory) == {"CUDA1": 1000 + 30 + 50, HOST: 40 + 1 + 10}
    assert dict(found.layers) == {"CUDA1": 10}
    assert found.headroom == 149


def test_layers_are_shared_in_proportion_to_room() -> None:
    found = fit(NEED, [gpu(0, 450), gpu(1, 880), gpu(2, 10), main(200)])
    assert dict(found.layers) == {"CUDA0": 3, "CUDA1": 7}
    assert dict(found.memory) == {"CUDA0": 371, "CUDA1": 801, HOST: 72}
    assert (found.gpu_layers, found.tensor_split) == (11, (3, 8))


def test_devices_are_filled_where_proportions_do_not_come_out_even() -> None:
    uneven = replace(NEED, layers=(LayerNeed(300, 0), *(LayerNeed(100, 0),) * 2))
    found = fit(uneven, [gpu(0, 372), gpu(1, 302), main(200)])
    assert dict(found.layers) == {"CUDA0": 1, "CUDA1": 2}


def test_a_projector_lies_on_the_first_device_and_a_copy_on_the_last() -> None:
    more = replace(NEED, projector=7, output_copy=40, prompts=100)
    found = fit(more, [gpu(0, 700), gpu(1, 700), main(200)])
    assert dict(found.memory) == {"CUDA0": 578, "CUDA1": 641, HOST: 172}


def test_too_little_main_memory_is_said() -> None:
    found = fit(NEED, [gpu(0, 5000), main(50)])
    assert not found.fits
    assert (found.needed, found.missing) == (51, 1)
    assert "needs 51 B on CPU" in found.words


def test_layers_spill_only_if_they_may() -> None:
    places = [gpu(0, 380), main(2000)]
    refused = fit(NEED, places)
    assert not refused.fits
    assert (refused.needed, refused.missing) == (1080, 700)
    found = fit(NEED, places, spill=True)
    assert dict(found.layers) == {"CUDA0": 3}
    assert dict(found.memory) == {"CUDA0": 380, HOST: 91 + 700}
    assert "; 7 of 10 layers on the CPU (" in found.words
    assert found.beside == 7
    with_projector = fit(replace(NEED, projector=60), places, spill=True)
    assert dict(with_projector.memory) == {"CUDA0": 340, HOST: 91 + 800}
    assert not fit(NEED, [gpu(0, 380), main(700)], spill=True).fits
    small = fit(NEED, [gpu(0, 20), main(2000)], spill=True)
    assert dict(small.memory) == {HOST: NEED.total}


def test_a_larger_buffer_may_leave_layers_in_main_memory() -> None:
    places = [gpu(0, 560), gpu(1, 580), main(2000)]  # room for all, but not for the copies
    assert not fit(NEED, places).fits
    found = fit(NEED, places, spill=True)
    assert dict(found.layers) == {"CUDA0": 4, "CUDA1": 4}
    assert dict(found.memory) == {"CUDA0": 450, "CUDA1": 480, HOST: 41 + 200 + 50}


def test_leases_are_not_free() -> None:
    assert fit(NEED, [main(2000)], {HOST: 1121}).fits
    assert fit(NEED, [main(2000)], {HOST: 1120}).missing == 1
    assert not fit(NEED, [main(2000)], {}).fits


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=12),
    st.lists(st.integers(0, 2000), max_size=4),
    st.integers(0, 3000),
    st.booleans(),
)
def test_what_fits_lies_somewhere_and_within_its_room(
    layers: list[int], cards: list[int], ram: int, spill: bool
) -> None:
    need = replace(NEED, layers=tuple(LayerNeed(size, 0) for size in layers), projector=9)
    places = [*(gpu(number, usable) for number, usable in enumerate(cards)), main(ram)]
    found = fit(need, places, spill=spill)
    room = {place.device: place.usable for place in places}
    assert all(size <= room[name] for name, size in found.memory.items())
    assert found.fits == bool(found.memory) == (found.missing == 0)
    if found.fits:
        used = max(0, len(found.memory) - (HOST in found.memory and bool(found.layers)))
        assert found.needed >= need.total + (used - 1) * need.compute
        assert sum(found.layers.values()) in (0, len(layers)) or spill


def test_more_room_never_hurts() -> None:
    for usable in range(0, 1500, 10):
        before: Fit | None = None
        for other in range(0, 1500, 50):
            now = fit(NEED, [gpu(0, usable), gpu(1, other), main(200)])
            assert before is None or now.fits >= before.fits, (usable, other)
            before = now


# -- corrections ----------------------------------------------------------------------------------


def test_what_was_seen_corrects_the_next_estimate() -> None:
    seen = {
        "CUDA0": MemoryParts(weights=500, cache=120, compute=140),
        "CUDA1": MemoryParts(weights=400, cache=130, compute=142),
        HOST: MemoryParts(weights=40, compute=999),
    }
    learnt = observed(NEED, seen)
    assert learnt == Correction(cache=1.25, compute=2.0)
    corrected = learnt.apply(NEED)
    assert (corrected.cache, corrected.compute) == (250, 100)
    assert corrected.weights == NEED.weights


def test_layers_in_main_memory_are_not_shared_by_several_devices() -> None:
    seen = {name: MemoryParts(cache=100, compute=75) for name in ("CUDA0", HOST)}
    assert observed(NEED, seen) == Correction(compute=1.5)


def test_an_engine_without_a_cache_teaches_its_buffer() -> None:
    assert observed(NEED, {HOST: MemoryParts(compute=100)}) == Correction(compute=2.0)


def test_a_correction_is_bounded_and_nothing_teaches_nothing() -> None:
    absurd = observed(NEED, {"CPU": MemoryParts(cache=10**9, compute=1)})
    assert absurd == Correction(CACHE_BOUNDS[1], COMPUTE_BOUNDS[0])
    assert observed(NEED, {}) == Correction()
    assert Correction().apply(NEED) == NEED


def test_corrections_are_kept_by_weights_and_engine() -> None:
    book = Corrections()
    book.keep("d1", "cuda-1", Correction(1.1, 2.0))
    assert book.find("d1", "cuda-1") == Correction(1.1, 2.0)
    assert book.find("d1", "cuda-2") == book.find("d2", "cuda-1") == Correction()
    again = Corrections.from_json(book.to_json())
    assert again.find("d1", "cuda-1") == Correction(1.1, 2.0)


def test_the_oldest_correction_is_forgotten_first() -> None:
    book = Corrections()
    for number in range(MAX_KEPT):
        book.keep(str(number), "e", Correction(1.5))
    book.keep("0", "e", Correction(1.6))
    book.keep("new", "e", Correction(1.7))
    assert book.find("1", "e") == Correction()
    assert book.find("0", "e") == Correction(1.6)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"{}", b"[1]", b'[["d", "e", 1.0]]', b'[["d", "e", "1", 1.0]]', b'[[null]]',
     b'[["%s", "e", 1.5, 1.5]]' % (b"d" * 200)],
)  # fmt: skip
def test_corrections_that_make_no_sense_are_left_out(text: bytes) -> None:
    assert Corrections.from_json(text).to_json() == b"[]"


def test_corrections_from_disk_are_bounded_too() -> None:
    book = Corrections.from_json(b'[["d", "e", 99.0, 0.0]]')
    assert book.find("d", "e") == Correction(CACHE_BOUNDS[1], COMPUTE_BOUNDS[0])
