"""What is read out of an engine's log about memory."""

from __future__ import annotations

import pytest

from meshd.runtime.reported import MIB, MemoryHeard, MemoryReport, read_report
from meshd.view.shape import MemoryParts

ON_CPU = """\
0.00.013.632 I llama_model_loader: loaded meta data with 21 key-value pairs and 39 tensors
0.00.014.511 I load_tensors: loading model tensors, this can take a while... (load_mode = mmap)
0.00.022.533 I load_tensors: offloading output layer to GPU
0.00.022.548 I load_tensors: offloaded 5/5 layers to GPU
0.00.022.556 I load_tensors:   CPU_Mapped model buffer size =     4.75 MiB
0.00.023.080 I llama_context:        CPU  output buffer size =     0.25 MiB
0.00.023.356 I llama_kv_cache:        CPU KV buffer size =    16.00 MiB
0.00.038.394 I llama_kv_cache: size =   16.00 MiB (  4096 cells,   4 layers), K (f16):    8.00 MiB
0.00.041.404 I sched_reserve:        CPU compute buffer size =     8.50 MiB
0.00.056.545 I srv  llama_server: model loaded
"""


def read(text: str) -> MemoryReport:
    report = read_report(text.splitlines())
    assert report is not None
    return report


def mib(count: float) -> int:
    return round(count * MIB)


def test_an_engine_on_the_cpu() -> None:
    report = read(ON_CPU)
    assert report.offloaded == (5, 5)
    assert dict(report.devices) == {
        "CPU": MemoryParts(mib(4.75), mib(4.75), mib(16), mib(8.5), mib(0.25))
    }
    assert report.total == mib(29.5)
    assert report.devices["CPU"].private == mib(24.75)


def test_devices_are_told_apart_and_host_buffers_are_main_memory() -> None:
    report = read(
        """\
load_tensors: offloaded 33/33 layers to GPU
load_tensors:        CUDA0 model buffer size =  4000.00 MiB
load_tensors:        CUDA1 model buffer size =  3000.00 MiB
load_tensors:   CPU_Mapped model buffer size =   500.00 MiB
load_tensors: RPC0[127.0.0.1:50052] model buffer size =   700.00 MiB
llama_context:  CUDA_Host  output buffer size =     2.00 MiB
llama_kv_cache:      CUDA0 KV buffer size =   512.00 MiB
llama_kv_cache:      CUDA1 KV buffer size =   256.00 MiB
sched_reserve:      CUDA0 compute buffer size =   300.00 MiB
sched_reserve:      CUDA1 compute buffer size =   310.00 MiB
sched_reserve:  CUDA_Host compute buffer size =    20.00 MiB
"""
    )
    assert dict(report.devices) == {
        "CUDA0": MemoryParts(weights=mib(4000), cache=mib(512), compute=mib(300)),
        "CUDA1": MemoryParts(weights=mib(3000), cache=mib(256), compute=mib(310)),
        "RPC0[127.0.0.1:50052]": MemoryParts(weights=mib(700)),
        "CPU": MemoryParts(mib(500), mib(500), compute=mib(20), output=mib(2)),
    }


def test_what_lies_on_other_nodes_is_not_of_this_one() -> None:
    lent = MemoryParts(weights=90)
    here = {"CPU": MemoryParts(weights=10), "CUDA0": MemoryParts(weights=20)}
    report = MemoryReport({**here, "RPC0[127.0.0.1:1]": lent, "RPC0[127.0.0.1:2]": lent}, (5, 5))
    assert report.total == 210
    assert report.own == MemoryReport(here)
    alone = MemoryReport(here, (5, 5))
    assert alone.own is alone


def test_metal_maps_the_file_into_the_device() -> None:
    report = read(
        "load_tensors: MTL0_Mapped model buffer size = 80.00 MiB\n"
        "sched_reserve: MTL0 compute buffer size = 1.00 MiB\n"
    )
    assert dict(report.devices) == {"MTL0": MemoryParts(mib(80), mib(80), compute=mib(1))}


def test_caches_add_up_and_a_renewed_buffer_does_not() -> None:
    report = read(
        ON_CPU
        + "llama_kv_cache:        CPU KV buffer size =     4.00 MiB\n"
        + "llama_memory_recurrent:        CPU RS buffer size =     0.50 MiB\n"
        + "sched_reserve:        CPU compute buffer size =     9.00 MiB\n"
        + "alloc_compute_meta:        CPU compute buffer size =     3.00 MiB\n"
    )
    assert report.devices["CPU"].cache == mib(20.5)
    assert report.devices["CPU"].compute == mib(12)


def test_the_last_load_counts() -> None:
    heard = MemoryHeard()
    for line in (ON_CPU + ON_CPU).splitlines():
        heard.line(line)
    assert heard.report() == read(ON_CPU)
    assert heard.model_buffers == (("CPU_Mapped", 4.75),)
    heard.line("load_tensors: loading model tensors, this can take a while...")
    assert heard.report() is None
    assert heard.offloaded is None
    assert not heard.model_buffers


def test_weights_that_were_copied_out_of_the_file_count_once() -> None:
    report = read(
        "load_tensors:   CPU_Mapped model buffer size =    21.50 MiB\n"
        "load_tensors:   CPU_REPACK model buffer size =    20.00 MiB\n"
        "sched_reserve: CPU compute buffer size = 1.00 MiB\n"
    )
    assert report.devices["CPU"].weights == mib(21.5)
    assert report.devices["CPU"].mapped == mib(1.5)


@pytest.mark.parametrize(
    "line",
    ["", "load_tensors:", "sched_reserve: CPU compute buffer size = much", "buffer size",
     "sched_reserve: CPU compute buffer size is 8.5 MiB, matches expectation of 8.5 MiB",
     "CPU compute buffer size = 8.50 MiB"],
)  # fmt: skip
def test_other_lines_say_nothing(line: str) -> None:
    assert read_report([line]) is None
