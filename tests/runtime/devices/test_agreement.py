"""Drivers beside engines: where they agree, and every way they do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.runtime.devices import Driver, EngineList, Gpu, Reading, agree, parse_list
from meshd.runtime.devices.nvml import read_nvidia
from meshd.view import DeviceView
from tests.runtime.devices import listings
from tests.runtime.devices.fake_nvml import GIB, MIB, FakeNvml, Part

MACHINE = (128 * GIB, 100 * GIB)
CPU = DeviceView("A CPU", "cpu", None, *MACHINE, unified=True, compute_capability=None)
NO_AMD = Driver("AMD", None, "the amdgpu driver is not loaded")


def nvidia(nvml: FakeNvml) -> Reading:
    driver, gpus = read_nvidia(nvml, MACHINE, Path("/nowhere"))
    return Reading(gpus, CPU, (driver, NO_AMD))


def two_h200() -> Reading:
    return nvidia(FakeNvml(Part(uuid="GPU-aaaa"), Part(uuid="GPU-bbbb")))


def amd(name: str, total: int, *, unified: bool = False, gfx: str = "gfx1100") -> Gpu:
    return Gpu(DeviceView(name, "rocm", f"GPU-{name[-4:]}", total, total, unified, gfx), 0)


def words(reading: Reading) -> list[tuple[str | None, str | None]]:
    return [(d.engine_name, d.problem) for d in reading.devices[:-1]]


def test_both_list_the_same() -> None:
    seen = agree(two_h200(), parse_list(listings.CUDA_TWO, "cuda"), {})
    assert words(seen) == [("CUDA0", None), ("CUDA1", None)]
    assert seen.devices[-1] == CPU
    assert seen.devices[0].memory_total_bytes == 143_771 * MIB  # the driver's word, not a mean


def test_the_engine_was_built_for_the_cpu() -> None:
    seen = agree(two_h200(), parse_list(listings.CPU, "cpu"), {})
    assert [d.engine_name for d in seen.devices] == [None, None, None]
    problem = seen.devices[0].problem
    assert problem is not None
    assert problem.startswith("the driver lists it, the engine does not: it was built for cpu")
    assert "`meshd runtime build --backend cuda`" in problem
    assert seen.devices[-1].problem is None


def test_the_engine_complains() -> None:
    seen = agree(two_h200(), parse_list(listings.CUDA_FAILED, "cuda"), {})
    assert all(p and "no CUDA-capable device is detected" in p for _, p in words(seen))


def test_the_engine_is_silent() -> None:
    seen = agree(two_h200(), EngineList("cuda", ()), {})
    assert all(p and "gives no reason" in p for _, p in words(seen))


ONE = "Available devices:\n  CUDA0: NVIDIA H200 (143155 MiB, 142627 MiB free)\n"


@pytest.mark.parametrize("value", ["1", "GPU-bbbb", "GPU-bb", "1,7"])
def test_a_variable_chooses_one(value: str) -> None:
    seen = agree(two_h200(), parse_list(ONE, "cuda"), {"CUDA_VISIBLE_DEVICES": value})
    hidden, chosen = words(seen)
    assert chosen == ("CUDA0", None)
    assert hidden[0] is None
    assert hidden[1] is not None
    assert f"CUDA_VISIBLE_DEVICES={value} hides it" in hidden[1]


def test_a_variable_turns_the_order() -> None:
    listing = parse_list(listings.CUDA_TWO, "cuda")
    seen = agree(two_h200(), listing, {"CUDA_VISIBLE_DEVICES": "1,0"})
    assert words(seen) == [("CUDA1", None), ("CUDA0", None)]


@pytest.mark.parametrize("value", ["", "-1", "NoDevFiles", "7,1"])
def test_a_variable_hides_all(value: str) -> None:
    seen = agree(two_h200(), parse_list(listings.CPU, "cuda"), {"CUDA_VISIBLE_DEVICES": value})
    assert all(p and f"CUDA_VISIBLE_DEVICES={value} hides it" in p for _, p in words(seen))


def test_names_know_better_than_numbers() -> None:
    """CUDA puts the fastest first; NVML goes by PCI address."""
    reading = nvidia(
        FakeNvml(
            Part("NVIDIA T400 4GB", "GPU-slow", (4_096 * MIB, 4_000 * MIB), (7, 5)),
            Part("NVIDIA GeForce RTX 4090", "GPU-fast", (24_564 * MIB, 24_000 * MIB), (8, 9)),
        )
    )
    listing = parse_list(
        "  Device 0: NVIDIA GeForce RTX 4090, compute capability 8.9, VMM: yes\n"
        "  Device 1: NVIDIA T400 4GB, compute capability 7.5, VMM: yes\n"
        "Available devices:\n"
        "  CUDA0: NVIDIA GeForce RTX 4090 (24078 MiB, 23600 MiB free)\n"
        "  CUDA1: NVIDIA T400 4GB (3900 MiB, 3800 MiB free)\n",
        "cuda",
    )
    assert words(agree(reading, listing, {})) == [("CUDA1", None), ("CUDA0", None)]


def test_memory_differs() -> None:
    listing = parse_list(
        "Available devices:\n  CUDA0: NVIDIA H200 (71577 MiB, 71313 MiB free)\n", "cuda"
    )
    seen = agree(nvidia(FakeNvml(Part())), listing, {})
    assert words(seen) == [
        ("CUDA0", "the driver says 143771 MiB of memory, the engine (CUDA0) 71577 MiB")
    ]


def test_capability_differs() -> None:
    seen = agree(
        nvidia(FakeNvml(Part(capability=(8, 9)), Part())),
        parse_list(listings.CUDA_TWO, "cuda"),
        {},
    )
    assert words(seen)[0] == ("CUDA0", "the driver says it is 8.9, the engine (CUDA0) 9.0")
    assert words(seen)[1] == ("CUDA1", None)


def test_the_name_differs() -> None:
    seen = agree(nvidia(FakeNvml(Part(name="NVIDIA B200"))), parse_list(ONE, "cuda"), {})
    assert words(seen) == [
        ("CUDA0", "the driver says it is NVIDIA B200, the engine (CUDA0) NVIDIA H200")
    ]


def test_only_the_engine_lists_it() -> None:
    gone = nvidia(FakeNvml(init=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH))
    seen = agree(gone, parse_list(ONE, "cuda"), {})
    (device, _) = seen.devices
    assert (device.name, device.backend, device.engine_name) == ("NVIDIA H200", "cuda", "CUDA0")
    assert device.memory_total_bytes == 143_155 * MIB
    assert device.problem is not None
    assert device.problem.startswith(
        "the engine lists CUDA0 NVIDIA H200 (143155 MiB), the driver does not know it: "
    )
    assert "version mismatch" in device.problem


def test_the_engine_lists_more_than_the_driver() -> None:
    seen = agree(nvidia(FakeNvml(Part())), parse_list(listings.CUDA_TWO, "cuda"), {})
    (first, second) = words(seen)
    assert first == ("CUDA0", None)
    assert second == (
        "CUDA1",
        "the engine lists CUDA1 NVIDIA H200 (143155 MiB), the driver does not know it",
    )


def test_a_lost_gpu_the_engine_still_lists() -> None:
    reading = nvidia(FakeNvml(Part(memory=pynvml.NVML_ERROR_GPU_IS_LOST)))
    lost, listed = words(agree(reading, parse_list(ONE, "cuda"), {}))
    assert lost[0] is None
    assert lost[1] is not None
    assert "fell off the bus" in lost[1]
    assert listed[0] == "CUDA0"
    assert listed[1] is not None
    assert "the driver does not know it" in listed[1]


def test_unified_memory_is_not_compared() -> None:
    part = Part("NVIDIA GB10", memory=pynvml.NVML_ERROR_NOT_SUPPORTED, capability=(12, 1))
    driver, gpus = read_nvidia(FakeNvml(part), (16 * GIB, 12 * GIB), Path("/nowhere"))
    seen = agree(Reading(gpus, CPU, (driver,)), parse_list(listings.CUDA_OLDER, "cuda"), {})
    assert words(seen) == [("CUDA0", None)]
    assert seen.devices[0].memory_total_bytes == 16 * GIB  # what this process may use


def test_a_jetson_is_known_by_its_engine_alone() -> None:
    blind = Driver("NVIDIA", None, "the NVIDIA driver of this Jetson cannot list its GPU", True)
    listing = parse_list("Available devices:\n  CUDA0: Orin (62841 MiB, 58000 MiB free)\n", "cuda")
    cpu = DeviceView("ARM", "cpu", None, 61 * GIB, 50 * GIB, True, None)
    (device, _) = agree(Reading((), cpu, (blind,)), listing, {}).devices
    assert (device.name, device.unified, device.problem) == ("Orin", True, None)
    assert (device.memory_total_bytes, device.memory_free_bytes) == (61 * GIB, 50 * GIB)


def test_a_jetson_whose_driver_adds_to_the_name() -> None:
    part = Part("Orin (nvgpu)", memory=pynvml.NVML_ERROR_NOT_SUPPORTED, capability=(8, 7))
    listing = parse_list("Available devices:\n  CUDA0: Orin (62841 MiB, 58000 MiB free)\n", "cuda")
    assert words(agree(nvidia(FakeNvml(part)), listing, {})) == [("CUDA0", None)]


H100 = "NVIDIA H100 80GB HBM3"


def divided() -> Reading:
    small = {
        n: Part(f"{H100} MIG 1g.10gb", f"MIG-{n}", (9_856 * MIB, 9_843 * MIB)) for n in range(2)
    }
    return nvidia(FakeNvml(Part(H100, "GPU-cccc", mig=True, instances=small)))


def test_cuda_uses_one_instance_of_mig() -> None:
    listing = parse_list(
        f"Available devices:\n  CUDA0: {H100} MIG 1g.10gb (9728 MiB, 9600 MiB free)\n", "cuda"
    )
    whole, first, second = words(agree(divided(), listing, {}))
    assert whole[0] is None
    assert whole[1] is not None
    assert "MIG is on" in whole[1]
    assert first == ("CUDA0", None)
    assert second[1] is not None
    assert "CUDA_VISIBLE_DEVICES=MIG-1 chooses this one" in second[1]
    environ = {"CUDA_VISIBLE_DEVICES": "MIG-1"}
    _, first, second = words(agree(divided(), listing, environ))
    assert second == ("CUDA0", None)
    assert first[1] is not None
    assert "CUDA_VISIBLE_DEVICES=MIG-1 hides it" in first[1]


def test_amd_is_known_by_its_memory() -> None:
    """Consumer cards have no product name in sysfs."""
    reading = Reading((amd("AMD GPU gfx1100", 24_560 * MIB),), CPU, (Driver("AMD", None, None),))
    assert words(agree(reading, parse_list(listings.ROCM, "rocm"), {})) == [("ROCm0", None)]


def test_the_driver_knows_why_rocm_finds_none() -> None:
    driver = Driver("AMD", None, "/dev/kfd cannot be opened by this user")
    reading = Reading((amd("AMD GPU gfx1100", 24_560 * MIB),), CPU, (driver,))
    listing = parse_list(
        "ggml_cuda_init: failed to initialize ROCm: no ROCm-capable device is detected\n"
        "Available devices:\n  (none)\n",
        "rocm",
    )
    ((_, problem),) = words(agree(reading, listing, {}))
    assert problem == f"the driver lists it, the engine does not: {driver.problem}"


def test_an_apu_beside_a_card() -> None:
    apu = amd("AMD GPU gfx1151", 96 * GIB, unified=True, gfx="gfx1151")
    reading = Reading(
        (apu, amd("AMD GPU gfx1100", 24_560 * MIB)), CPU, (Driver("AMD", None, None),)
    )
    listing = parse_list(
        "  Device 0: AMD Radeon RX 7900 XTX, gfx1100 (0x1100), VMM: no, Wave Size: 32\n"
        "  Device 1: AMD Radeon Graphics, gfx1151 (0x1151), VMM: no, Wave Size: 32\n"
        "Available devices:\n"
        "  ROCm0: AMD Radeon RX 7900 XTX (24560 MiB, 24512 MiB free)\n"
        "  ROCm1: AMD Radeon Graphics (63950 MiB, 60000 MiB free)\n",
        "rocm",
    )
    assert words(agree(reading, listing, {})) == [("ROCm1", None), ("ROCm0", None)]


def test_vulkan_reaches_several_vendors() -> None:
    nv = nvidia(FakeNvml(Part("NVIDIA GeForce RTX 4090", "GPU-d", (24_564 * MIB, 1), (8, 9))))
    gpus = (*nv.gpus, amd("AMD GPU gfx1100", 24_560 * MIB))
    reading = Reading(gpus, CPU, (nv.drivers[0], Driver("AMD", None, None)))
    seen = agree(reading, parse_list(listings.VULKAN, "vulkan"), {})
    assert words(seen) == [("Vulkan2", None), ("Vulkan0", None), ("Vulkan1", None)]
    assert (seen.devices[2].backend, seen.devices[2].name) == (
        "vulkan",
        "Intel(R) Arc(tm) A770 Graphics (DG2)",
    )


def test_vulkan_has_numbers_of_its_own() -> None:
    environ = {"GGML_VK_VISIBLE_DEVICES": "1"}
    listing = parse_list(
        "Available devices:\n  Vulkan0: NVIDIA H200 (143771 MiB, 142627 MiB free)\n", "vulkan"
    )
    first, second = words(agree(two_h200(), listing, environ))
    assert first == ("Vulkan0", None)
    assert second[1] is not None
    assert "GGML_VK_VISIBLE_DEVICES=1 hides it" in second[1]


def test_a_gpu_two_backends_list_is_one_gpu() -> None:
    listing = parse_list(
        "Available devices:\n"
        "  CUDA0: NVIDIA H200 (143155 MiB, 142627 MiB free)\n"
        "  Vulkan0: NVIDIA H200 (143771 MiB, 142627 MiB free)\n",
        "cuda",
    )
    assert words(agree(nvidia(FakeNvml(Part())), listing, {})) == [("CUDA0", None)]


LOST = pynvml.NVML_ERROR_GPU_IS_LOST
BACKENDS = ["cpu", "cuda", "vulkan"]
NAMES = st.sampled_from(["NVIDIA H200", "NVIDIA GB10", "NVIDIA T400 4GB"])
SIZES = st.sampled_from([0, 4_096, 122_570, 143_155, 143_771])
PLUGGED = st.lists(st.tuples(NAMES, SIZES, st.booleans()), max_size=4)
LISTED = st.lists(st.tuples(st.sampled_from(["CUDA", "Vulkan"]), NAMES, SIZES), max_size=4)


@given(PLUGGED, LISTED, st.none() | st.text("0123,-GPU", max_size=6), st.sampled_from(BACKENDS))
def test_no_device_is_lost_and_no_figure_is_changed(
    plugged: list[tuple[str, int, bool]],
    listed: list[tuple[str, str, int]],
    visible: str | None,
    built_for: str,
) -> None:
    before = nvidia(
        FakeNvml(
            *(
                Part(name, f"GPU-{at}", (size * MIB, 0), handle=None if reads else LOST)
                for at, (name, size, reads) in enumerate(plugged)
            )
        )
    )
    names = [f"{kind}{at}" for at, (kind, _, _) in enumerate(listed)]
    lines = [
        f"  {n}: {d} ({s} MiB, 0 MiB free)" for n, (_, d, s) in zip(names, listed, strict=True)
    ]
    listing = parse_list("\n".join(lines), built_for)
    after = agree(before, listing, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    kept, added = after.gpus[: len(plugged)], after.gpus[len(plugged) :]
    for old, new in zip(before.gpus, kept, strict=True):
        assert replace(new.view, engine_name=None, problem=old.view.problem) == old.view
        assert new.view.engine_name is not None or new.view.problem is not None
    said = [gpu.view.engine_name for gpu in after.gpus if gpu.view.engine_name is not None]
    assert len(said) == len(set(said))
    assert set(said) <= set(names)
    assert all(gpu.view.problem for gpu in added)
    first_kind = [n for n in names if n.startswith(listed[0][0])] if listed else []
    assert set(first_kind) <= set(said)
